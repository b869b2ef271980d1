"""Says so when a step hangs: a thread that looks at the engines' clocks."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from typing import Any

from jaxpaged.engine import Engine
from jaxpaged.replicas import FrontDoor

log = logging.getLogger(__name__)


class Watchdog:
    """After `timeout` seconds in one step: stacks of all threads on standard error, the scheduler's state in the log, once a
    step. `cause` says what is wrong as long as it is."""

    def __init__(self, engine: FrontDoor, timeout: float):
        self.timeout = timeout
        self._engines = engine.engines
        self._stop = threading.Event()
        self._reported: dict[int, float] = {}  # engine -> when the step began that has been reported
        self._thread = threading.Thread(target=self._watch, name="jaxpaged-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    @property
    def cause(self) -> str | None:
        return next((self._cause(i, began) for i, began in self._hanging()), None)

    def _hanging(self) -> list[tuple[int, float]]:
        """(engine, when its step began) of those that have been too long in one."""
        began, now = [one.step_began for one in self._engines], time.monotonic()
        return [(i, at) for i, at in enumerate(began) if at is not None and now - at > self.timeout]

    def _cause(self, engine: int, began: float) -> str:
        where = f" in engine {engine}" if len(self._engines) > 1 else ""
        return f"a step has been running for {time.monotonic() - began:.0f} s{where}"

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 4)):
            new = [(i, began) for i, began in self._hanging() if self._reported.get(i) != began]
            if new:
                self._reported.update(new)
                self._report(new)

    def _report(self, hanging: list[tuple[int, float]]) -> None:
        for i, began in hanging:
            state = _state(self._engines[i].engine)
            log.error("%s: it hangs. State of the scheduler: %s. Stacks of all threads:", self._cause(i, began), state)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def _state(engine: Engine) -> dict[str, Any]:
    """Read while the engine's thread stands still inside the step; a few of many requests."""
    state = engine.state
    seats = state.seats
    requests: Any = state.requests.read()
    counts = lambda slot: {
        name: int(getattr(seats, name)[slot]) for name in ("num_prompt", "num_tokens", "num_computed", "num_pages")
    }
    running = {requests[slot].id: counts(slot) for slot in seats.active.nonzero()[0][:32].tolist()}
    pool = state.pool
    return {"running": running, "num_running": int(seats.active.sum()), "num_waiting": len(state.waiting),
            "pages": {"held": pool.num_held, "cached": pool.num_cached, "free": pool.num_free}}  # fmt: skip
