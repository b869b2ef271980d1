"""Steps engines until they have nothing to do, offline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence

from jaxpaged.engine import Engine
from jaxpaged.request import EngineOutput

Message = EngineOutput | BaseException | None
"""From an engine's thread: an output, what ended it, or that it has nothing more to do."""


def outputs_of(engines: Sequence[Engine]) -> Generator[EngineOutput, None, None]:
    """What the engines say, as it comes, until none has work. One steps in the caller's thread, several in a thread each. An
    exception, of an engine or of the caller, leaves them where they are, between two steps: close the generator then."""
    busy = [engine for engine in engines if engine.has_work]
    if len(engines) > 1 and busy:
        yield from _side_by_side(busy)
        return
    for engine in busy:
        while engine.has_work:
            yield from engine.step()


def _side_by_side(engines: Sequence[Engine]) -> Generator[EngineOutput, None, None]:
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    stop = threading.Event()
    thread = lambda i, engine: threading.Thread(target=_step_all, args=(engine, messages, stop), name=f"jaxpaged-engine-{i}")
    threads = [thread(i, engine) for i, engine in enumerate(engines)]
    for one in threads:
        one.start()
    try:
        working = len(threads)
        while working:
            message = messages.get()
            if message is None:
                working -= 1
            elif isinstance(message, BaseException):
                raise message
            else:
                yield message
    finally:  # also Ctrl-C, which only this thread sees
        stop.set()
        for one in threads:
            one.join()


def _step_all(engine: Engine, messages: queue.SimpleQueue[Message], stop: threading.Event) -> None:
    try:
        while engine.has_work and not stop.is_set():
            for output in engine.step():
                messages.put(output)
        messages.put(None)
    except BaseException as error:  # it is the caller's
        messages.put(error)
