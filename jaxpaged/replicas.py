"""Several engines behind one front door: to whoever asks, `Replicas` is an `AsyncEngine`.

    replicas = Replicas([Engine(...), Engine(...)])
    replicas.start()
    with replicas.submit("a", ids, params) as stream: ...

Each engine steps in a thread of its own; a `Router` says which one gets a request. What is sampled does not depend on that:
seeds are drawn by the number of a request among all (`share_numbers`).
"""

from __future__ import annotations

import asyncio
from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from typing import Any

from jaxpaged.adapter import Adapter
from jaxpaged.async_engine import AsyncEngine, EngineDeadError, StepReport, Stream
from jaxpaged.engine import Engine
from jaxpaged.request import EngineOutput, PoolingParams, RequestError, RequestOutput, SamplingParams
from jaxpaged.router import Router


def share_numbers(engines: Sequence[Engine]) -> None:
    """From now on requests are numbered by all of them together: the same requests in the same order get the same seeds,
    whichever engines they go to."""
    for engine in engines[1:]:
        engine.numbers = engines[0].numbers


def router_of(engines: Sequence[Engine]) -> Router:
    """For engines that are alike."""
    limits = engines[0].limits
    num_pages = limits.num_pages if limits.enable_prefix_caching else 0
    return Router(len(engines), limits.page_size, num_pages, limits.max_num_seqs)


class Replicas:
    """The engines are alike: same model, same limits. If one dies, no more requests are taken, as by an AsyncEngine; those of
    the others go on. Observers, limits and `on_death` are each engine's own."""

    def __init__(self, engines: Sequence[Engine]):
        share_numbers(engines)
        self.router = router_of(engines)
        self.engines = tuple(
            AsyncEngine(engine, [_Follower(self.router, i)], num_queued=self._num_queued) for i, engine in enumerate(engines)
        )
        self.streams: MutableMapping[str, Stream] = ChainMap(*(one.streams for one in self.engines))
        self.draining = False

    @property
    def engine(self) -> Engine:
        """One of them, for what is the same in all: limits, tokenizer."""
        return self.engines[0].engine

    @property
    def error(self) -> BaseException | None:
        return next((one.error for one in self.engines if one.error is not None), None)

    @property
    def is_running(self) -> bool:
        return all(one.is_running for one in self.engines)

    def start(self) -> None:
        for one in self.engines:
            one.start()

    def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams | PoolingParams, *,
               cache_salt: str = "", adapter: Adapter | None = None, **options: Any) -> Stream[Any]:  # fmt: skip
        """As `AsyncEngine.submit`."""
        if self.error is not None:
            raise EngineDeadError(f"an engine has stopped: {self.error!r}") from self.error
        if self.router.engine_of(request_id) is not None:  # an engine knows its own requests only
            raise RequestError(f"request id {request_id!r} is in use; ids must be unique among live requests.", "id")
        route = self.router.route(prompt, params, cache_salt, adapter)
        submit = self.engines[route.engine].submit
        stream = submit(request_id, prompt, params, cache_salt=cache_salt, adapter=adapter, **options)
        self.router.began(request_id, route)
        return stream

    def abort(self, request_id: str) -> None:
        """As `AsyncEngine.abort`."""
        engine = self.router.engine_of(request_id)
        if engine is not None:
            self.engines[engine].abort(request_id)

    async def reset_prefix_cache(self) -> None:
        """Of all engines."""
        await asyncio.gather(*(one.reset_prefix_cache() for one in self.engines))
        self.router.forget()

    async def drain(self, timeout: float | None) -> bool:
        """As `AsyncEngine.drain`, all at the same time."""
        self.draining = True
        return all(await asyncio.gather(*(one.drain(timeout) for one in self.engines)))

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self.engines))

    def _num_queued(self) -> int:
        return sum(one.engine.num_queued for one in self.engines)


FrontDoor = AsyncEngine | Replicas
"""What a server knows: both have submit, abort, streams, start, drain, close, ..., and `engines` to look at each."""


def front_door(engines: Sequence[Engine]) -> FrontDoor:
    return AsyncEngine(engines[0]) if len(engines) == 1 else Replicas(engines)


class _Follower:
    """Tells the router how far an engine is: an observer."""

    def __init__(self, router: Router, engine: int):
        self._router, self._engine = router, engine

    def submitted(self, stream: Stream) -> None:
        """The router knows."""

    def rejected(self, reason: str) -> None:
        """It was not sent anywhere."""

    def stepped(self, report: StepReport, streams: dict[str, Stream]) -> None:
        self._router.computed(self._engine, sum(step.num_tokens for step in report.steps))
        for output in report.outputs:
            if output.finished:
                self._router.ended(output.request_id, _computed(output))


def _computed(output: EngineOutput) -> bool:
    """Whether the request's prompt has been."""
    if isinstance(output, RequestOutput):
        return output.metrics.first_token_time is not None
    return output.outputs is not None
