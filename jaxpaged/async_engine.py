"""The engine for asyncio: it steps in a thread of its own, outputs arrive in the event loop.

    engine = AsyncEngine(Engine(...))
    engine.start()                                   # in a running loop
    with engine.submit("a", ids, params) as stream:  # leaving the block early aborts the request
        async for output in stream: ...

Everything but the stepping happens in the loop's thread, so nothing here needs a lock. The engine's state belongs to its
thread: `call` runs a function there, between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, overload

from jaxpaged.adapter import Adapter
from jaxpaged.engine import Engine
from jaxpaged.outputs import merged
from jaxpaged.request import EmbeddingRequestOutput, EngineOutput, PoolingParams, RequestError, RequestOutput, SamplingParams
from jaxpaged.scheduler import Stats

log = logging.getLogger(__name__)
T = TypeVar("T")
Output = TypeVar("Output", RequestOutput, EmbeddingRequestOutput)


GIVE_UP = 10.0  # seconds that the end of a step is waited for when everything is to end
HURRY = 1.0  # likewise, when there is nothing left to save


class EngineDeadError(RuntimeError):
    """The engine's thread has ended with an exception; nothing can be served any more."""


class StepTimes(NamedTuple):
    """Of one step. `num_tokens`: computed by the batch that it dispatched (0: it dispatched none). In seconds."""

    num_tokens: int
    seconds: float
    waited: float  # part of `seconds`: the host had nothing to do but to wait for the device


class StepReport(NamedTuple):
    """What steps since the last report have brought, for those who observe. `at`: when the last of them ended, on the
    monotonic clock."""

    outputs: list[EngineOutput]
    stats: Stats
    steps: list[StepTimes]
    at: float


class Observer(Protocol):
    """Sees everything that happens, in the event loop's thread."""

    def submitted(self, stream: Stream) -> None:
        """A request has been taken."""

    def rejected(self, reason: str) -> None:
        """A request has been refused because of a limit: "queue", "draining"."""

    def stepped(self, report: StepReport, streams: dict[str, Stream]) -> None:
        """A step has ended. `streams`: by request id, those that ended with this step included."""


class Stream(Generic[Output]):
    """The outputs of one request, in order: iterate over it, inside `with`. Outputs that come while nobody reads are
    merged into one, so a slow reader costs no more than the text. `trace_headers`: the caller's W3C trace context, for
    those who observe."""

    def __init__(self, engine: AsyncEngine, request_id: str, params: SamplingParams | PoolingParams, num_prompt_tokens: int,
                 trace_headers: Mapping[str, str] | None = None):  # fmt: skip
        self.request_id, self.params, self.num_prompt_tokens = request_id, params, num_prompt_tokens
        self.trace_headers = trace_headers
        self.finished = False  # the last output has been read, or nobody wants it
        self._engine = engine
        self._unread: Output | None = None
        self._reader: asyncio.Future[None] | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Stream[Output]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __aiter__(self) -> Stream[Output]:
        return self

    async def __anext__(self) -> Output:
        while self._unread is None:
            if self._error is not None:
                raise EngineDeadError(f"the engine has stopped: {self._error!r}") from self._error
            if self.finished:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        output, self._unread = self._unread, None
        self.finished = output.finished
        return output

    async def last(self) -> Output:
        """The last output: all there is, for a request with output_kind FINAL_ONLY or CUMULATIVE."""
        output = None
        async for output in self:  # noqa: B007
            pass
        assert output is not None, "a request ends with an output"
        return output

    def close(self) -> None:
        """Ends the request, if it has not ended."""
        if not self.finished:
            self.finished = True
            self._unread = None
            self._engine.abort(self.request_id)

    def put(self, output: Output) -> None:
        """For the engine: something new."""
        if self.finished:
            return
        if self._unread is None:
            self._unread = output
        else:
            self._unread = merged(self._unread, output, self.params.output_kind)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """For the engine: nothing more will come."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class AsyncEngine:
    """An `Engine` and the thread it steps in.

    max_num_queued_reqs: sequences that may wait for a slot; requests are refused from then on, with 503. None: no limit.
    on_death: called in the loop's thread when the engine's thread has ended with an exception.
    num_queued: sequences that wait for a slot; None: the engine's.
    """

    def __init__(self, engine: Engine, observers: Sequence[Observer] = (), max_num_queued_reqs: int | None = None,
                 on_death: Callable[[BaseException], None] = lambda error: None,
                 num_queued: Callable[[], int] | None = None):  # fmt: skip
        self.engine, self.observers = engine, list(observers)
        self.max_num_queued_reqs, self.on_death = max_num_queued_reqs, on_death
        self._num_queued = num_queued or (lambda: engine.num_queued)
        self.streams: dict[str, Stream] = {}  # of every request that the engine has not ended
        self.error: BaseException | None = None
        self.draining = False
        self.step_began: float | None = None  # monotonic time; None while no step runs
        self._calls: deque[tuple[Callable[[Engine], Any], asyncio.Future[Any]]] = deque()
        self._wake = threading.Event()
        self._taken = threading.Event()  # the loop has passed on the last report
        self._taken.set()
        self._steps: list[StepTimes] = []  # since the last report
        self._idle: asyncio.Event | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    # -- for the loop's thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine's thread. Call it in the event loop that will read the outputs."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="jaxpaged-engine", daemon=True)
        self._thread.start()

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        """Those behind this front door: itself. `Replicas` has several."""
        return (self,)

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self.error is None and not self._stopping

    @overload
    def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, priority: int = ...,
               cache_salt: str = ..., prompt_text: str | None = ..., adapter: Adapter | None = ...,
               trace_headers: Mapping[str, str] | None = ...) -> Stream[RequestOutput]: ...  # fmt: skip

    @overload
    def submit(self, request_id: str, prompt: Sequence[int], params: PoolingParams, *, priority: int = ...,
               cache_salt: str = ..., prompt_text: str | None = ..., adapter: Adapter | None = ...,
               trace_headers: Mapping[str, str] | None = ...) -> Stream[EmbeddingRequestOutput]: ...  # fmt: skip

    def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams | PoolingParams, *, priority: int = 0,
               cache_salt: str = "", prompt_text: str | None = None, adapter: Adapter | None = None,
               trace_headers: Mapping[str, str] | None = None) -> Stream[Any]:  # fmt: skip
        """A request; its outputs come from the stream: of PoolingParams one, the embedding. RequestError (400, or 503 at a
        limit), and nothing is kept, if it cannot be served."""
        self._check_admission()
        self.engine.submit(request_id, prompt, params, priority, cache_salt, prompt_text, adapter)
        stream = self.streams[request_id] = Stream(self, request_id, params, len(prompt), trace_headers)
        assert self._idle is not None, "start() comes first"
        self._idle.clear()
        self._tell(lambda observer: observer.submitted(stream))
        self._wake.set()
        return stream

    async def generate(self, request_id: str, prompt: Sequence[int], params: SamplingParams,
                       **options: Any) -> AsyncIterator[RequestOutput]:  # fmt: skip
        """`submit` as an asynchronous generator: closing or cancelling it aborts the request."""
        with self.submit(request_id, prompt, params, **options) as stream:
            async for output in stream:
                yield output

    def abort(self, request_id: str) -> None:
        """Ends a request within two steps; its stream ends with finish_reason "abort". Unknown ids are ignored."""
        self.engine.abort(request_id)
        self._wake.set()

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Runs `function(engine)` in the engine's thread between two steps, e.g. to look at `engine.state`."""
        if not self.is_running:
            raise EngineDeadError(f"the engine is not running: {self.error!r}")
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.append((function, future))
        self._wake.set()
        return await future

    async def reset_prefix_cache(self) -> None:
        """Forgets every cached page that no running request holds."""
        await self.call(Engine.reset_prefix_cache)

    async def drain(self, timeout: float | None) -> bool:
        """Takes no more requests and waits until all have ended; after `timeout` seconds the rest is aborted. True if none
        had to be."""
        self.draining = True
        if await self._wait_idle(timeout):
            return True
        log.warning("aborting %d requests that did not end in %s s", len(self.streams), timeout)
        for request_id in list(self.streams):
            self.abort(request_id)
        await self._wait_idle(GIVE_UP)
        return False

    async def _wait_idle(self, timeout: float | None) -> bool:
        assert self._idle is not None, "start() comes first"
        if not self._idle.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout)
        return self._idle.is_set()

    def end(self, error: BaseException) -> None:
        """From any thread: nothing can be served any more, though a step may hang. As if the engine's thread had ended so."""
        if self._thread is None:  # nobody has asked for anything yet
            self.error = self.error or error
            return
        self._in_loop(self._die, error)

    async def close(self) -> None:
        """Stops the thread and frees the device memory; streams that still run end with an error."""
        self._stopping = True
        self._wake.set()
        deadline = time.monotonic() + (GIVE_UP if self.error is None else HURRY)
        while self._thread is not None and self._thread.is_alive():  # its last reports need this loop
            if time.monotonic() > deadline:
                log.error("a step hangs: the engine's thread is left behind")
                return
            await asyncio.sleep(0.005)
        self._end_streams(RuntimeError("the engine was closed"))
        self.engine.close()

    def _check_admission(self) -> None:
        if self.error is not None:
            raise EngineDeadError(f"the engine has stopped: {self.error!r}") from self.error
        if self.draining:
            self._reject("draining", "the server is shutting down and takes no more requests; send it to another one.")
        limit = self.max_num_queued_reqs
        if limit is not None and (waiting := self._num_queued()) >= limit:
            self._reject("queue", f"{waiting} sequences are waiting already and max_num_queued_reqs is {limit}; "
                         "try again later.")  # fmt: skip

    def _reject(self, reason: str, message: str) -> None:
        self._tell(lambda observer: observer.rejected(reason))
        raise RequestError(message, status=503)

    def _deliver(self, report: StepReport) -> None:
        for output in report.outputs:
            stream = self.streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
        self._tell(lambda observer: observer.stepped(report, self.streams))
        for output in report.outputs:
            if output.finished:
                self.streams.pop(output.request_id, None)
        if not self.streams and self._idle is not None:
            self._idle.set()
        self._loop.call_soon(self._taken.set)  # after the readers that have been woken

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            try:
                what(observer)
            except Exception:  # whoever watches must not stop what is watched
                log.exception("an observer of the engine failed")

    def _die(self, error: BaseException) -> None:
        self.error = self.error or error
        self._end_streams(error)
        self.on_death(error)

    def _end_streams(self, error: BaseException) -> None:
        for stream in self.streams.values():
            stream.fail(error)
        self.streams.clear()
        while self._calls:
            _resolve(self._calls.popleft()[1], None, EngineDeadError(f"the engine has stopped: {error!r}"))
        if self._idle is not None:
            self._idle.set()

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                self._answer_calls()
                if self.engine.has_work:
                    self._step()
                else:
                    self._wake.wait()
        except BaseException as error:  # a bug: a step that fails is the engine's own business
            log.exception("the engine's thread has ended")
            self._in_loop(self._die, error)

    def _step(self) -> None:
        """One step. While the loop is still busy with the last report there is no new one: tokens gather in the engine, and
        come in fewer and longer outputs."""
        if self.engine.only_reports and not self._taken.wait(0.1):
            return
        counters = self.engine.counters
        tokens, waited, began = counters.computed_tokens, counters.wait_time, time.monotonic()
        self.step_began = began
        self.engine.advance()
        report = self._taken.is_set()  # now, not before: the loop works while the device does
        outputs = self.engine.take_outputs() if report else []
        self.step_began = None
        at = time.monotonic()
        self._steps.append(StepTimes(counters.computed_tokens - tokens, at - began, counters.wait_time - waited))
        if report:
            self._taken.clear()
            steps, self._steps = self._steps, []
            self._in_loop(self._deliver, StepReport(outputs, self.engine.stats(), steps, at))

    def _answer_calls(self) -> None:
        while self._calls:
            function, future = self._calls.popleft()
            try:
                self._in_loop(_resolve, future, function(self.engine), None)
            except Exception as error:
                self._in_loop(_resolve, future, None, error)

    def _in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
