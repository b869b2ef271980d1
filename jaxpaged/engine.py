"""The engine: the one owner of mutation. inbox -> schedule -> dispatch -> collect -> commit -> outputs.

Everything it drives is a value or a protocol: the scheduler's `State` goes through pure functions, the device is behind
`Runner`. With `async_scheduling` a step is dispatched before the previous one's tokens are read: the host then works
while the device does. Tokens are the same either way.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxpaged import admission, batch, scheduler
from jaxpaged.adapter import Adapter
from jaxpaged.batch import Batch, Bucket, Sampled
from jaxpaged.journal import Aborted, Added, Committed, Failed, Journal, Reset, Scheduled, sequences
from jaxpaged.outputs import Group, Track
from jaxpaged.request import EngineOutput, FinishReason, PoolingParams, Request, RequestError, SamplingParams
from jaxpaged.scheduler import Limits, Plan
from jaxpaged.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NOT_SAMPLED = ("the model's logits are not numbers (NaN or infinite: its weights or activations overflow), or "
               "allowed_token_ids and bad_words left nothing to sample.")  # fmt: skip
NOT_POOLED = "the embedding is not made of numbers (NaN or infinite: the model's weights or activations overflow)."


class Runner(Protocol):
    """The device, as the engine sees it."""

    @property
    def embed_dim(self) -> int:
        """Numbers of a hidden state: E."""
        ...

    def dispatch(self, batch: Batch) -> Any:
        """Enqueues one step and returns a handle at once."""

    def collect(self, handle: Any) -> Sampled:
        """Waits for the step of a handle."""
        ...

    def recover(self) -> bool:
        """After a step that failed: makes the device fit to go on. True if the cache's contents were lost."""
        ...

    def close(self) -> None:
        """Frees the device memory."""


class InFlight(NamedTuple):
    plan: Plan
    batch: Batch
    handle: Any


@dataclass
class Counters:
    """Totals since the engine was built. Times in seconds."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    host_time: float = 0.0
    wait_time: float = 0.0
    failed_steps: int = 0
    peak_pages: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Requests in, outputs out, one `step()` at a time.

    `tokenizer` may be None: then prompts are token ids and there is no text. `seed` draws the seeds of requests that
    bring none: the same requests in the same order get the same seeds.
    """

    def __init__(
        self,
        limits: Limits,
        runner: Runner,
        buckets: Sequence[Bucket],
        tokenizer: Tokenizer | None = None,
        eos_ids: frozenset[int] = frozenset(),
        max_logprobs: int = 20,
        async_scheduling: bool = True,
        seed: int = 0,
    ):
        self.limits, self.runner, self.tokenizer = limits, runner, tokenizer
        self.eos_ids, self.max_logprobs = eos_ids, max_logprobs
        self.async_scheduling, self.seed = async_scheduling, seed
        self.state = scheduler.initial(limits)
        self._closed = False
        self.journal: Journal | None = None  # is told of whatever changes the state
        self.counters = Counters()
        self._buckets = tuple(buckets)
        self._inbox: deque[tuple[str, Any]] = deque()  # append and popleft are atomic: any thread may submit
        self._in_flight: deque[InFlight] = deque()
        self._depth = max(2, limits.pipeline) if async_scheduling else 1  # steps in flight while one is waited for
        self._groups: dict[str, Group] = {}
        self._tracks: dict[str, tuple[Group, Track]] = {}  # by the id of the single-sample request
        self._touched: dict[str, Group] = {}  # by request id: what has changed since the last report
        self._reserved: set[str] = set()  # ids submitted and not finished
        self.numbers = itertools.count(1)  # of requests, in the order they came in; replicas share one
        self._num_queued = -limits.max_num_seqs  # below 0: free slots

    # -- asking ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | PoolingParams,
        priority: int = 0,
        cache_salt: str = "",
        prompt_text: str | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Checks a request and puts it into the inbox: to be completed, or with PoolingParams to be embedded. adapter: a LoRA
        adapter to compute it with. RequestError, and nothing is kept, if it can never be served."""
        if self._closed:
            raise RequestError("this engine has been closed; build another one.")
        if request_id in self._reserved:
            raise RequestError(f"request id {request_id!r} is in use; ids must be unique among live requests.", "id")
        more = {"priority": priority, "cache_salt": cache_salt, "prompt_text": prompt_text}
        if isinstance(params, PoolingParams):
            request = admission.make_pooling_request(request_id, prompt, params, self.limits, self.tokenizer,
                                                     self.runner.embed_dim, **more)  # fmt: skip
        else:
            request = admission.make_request(request_id, prompt, params, self.limits, self.tokenizer, self.eos_ids,
                                             self.max_logprobs, **more)  # fmt: skip
        number = next(self.numbers)
        request = replace(request, arrival=number, params=self._with_seed(request.params, number), adapter=adapter)
        scheduler.check_fits(self.limits, request)
        self._reserved.add(request_id)
        self._inbox.append(("add", (request, time.monotonic())))

    def abort(self, request_id: str) -> None:
        """Ends a request; what it has produced so far comes with finish_reason "abort". Unknown ids are ignored."""
        self._inbox.append(("abort", request_id))

    def reset_prefix_cache(self) -> None:
        """Forgets every cached page that no running request holds, and shares none of those held."""
        self._inbox.append(("reset", None))

    def stats(self) -> scheduler.Stats:
        """What runs, what waits, where the pages are."""
        return scheduler.stats(self.state)

    def num_cached_tokens(self, sequence_id: str) -> int:
        """Prompt tokens that a sequence found in the cache when it was admitted."""
        return self._tracks[sequence_id][0].num_cached_tokens or 0

    @property
    def num_queued(self) -> int:
        """Sequences beyond those that have a slot to run in. May be read from any thread."""
        return max(0, self._num_queued + sum(what == "add" for what, _ in self._inbox.copy()))

    @property
    def only_reports(self) -> bool:
        """Nothing is left to compute: there are only outputs to take."""
        return not (self._inbox or self._in_flight or len(self.state.slot_of) or len(self.state.waiting))

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._groups or self._in_flight)

    def _with_seed(self, params: SamplingParams, number: int) -> SamplingParams:
        if params.seed is not None or params.greedy:
            return params
        drawn = hashlib.blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        return params.clone(seed=int.from_bytes(drawn, "little"))

    # -- stepping ----------------------------------------------------------------------------------------------------

    def step(self) -> list[EngineOutput]:
        """`advance`, and what is new."""
        self.advance()
        return self.take_outputs()

    def advance(self) -> None:
        """Takes events, dispatches at most one batch, and reads the oldest one that has run."""
        start = time.perf_counter()
        self._take_events()
        batch_ = self._schedule()
        try:
            dispatched = batch_ is not None and self._dispatch(*batch_)
            filling = dispatched and len(self._in_flight) < self._depth
            sampled = None if filling or not self._in_flight else self._wait()
        except Exception as error:  # a step that fails takes its own requests down, not the engine
            self._fail(error)
        else:
            if sampled is not None:
                self._commit(self._in_flight.popleft(), sampled)
        self._count_queued()
        self.counters.host_time += time.perf_counter() - start

    def take_outputs(self) -> list[EngineOutput]:
        """What is new since they were taken last. Whoever has not yet passed on the last ones had better wait: fewer, longer
        outputs cost less."""
        start = time.perf_counter()
        outputs, touched, self._touched = list[EngineOutput](), self._touched, {}
        for group in touched.values():
            output = group.output()
            if output is not None:
                outputs.append(output)
            if group.finished:
                self._forget(group)
        self.counters.host_time += time.perf_counter() - start
        return outputs

    def _take_events(self) -> None:
        while self._inbox:
            kind, value = self._inbox.popleft()
            if kind == "add":
                self._add(*value)
            elif kind == "abort":
                self._abort(value)
            else:
                self._reset()
        self._count_queued()

    def _count_queued(self) -> None:
        self._num_queued = len(self.state.waiting) + len(self.state.slot_of) - self.limits.max_num_seqs

    def _add(self, request: Request, arrived: float) -> None:
        if self.journal is not None:
            self.journal(Added(request))
        children = sequences(request)
        tracks = [Track(i, child, self.tokenizer) for i, child in enumerate(children)]
        group = Group(request, tracks, arrived)
        self._groups[request.id] = group
        self.counters.prompt_tokens += len(request.prompt)
        for child, track in zip(children, tracks):
            self.state = scheduler.add(self.state, child)
            self._tracks[child.id] = group, track

    def _abort(self, request_id: str) -> None:
        group = self._groups.get(request_id)
        if group is None:
            return
        going = [track for track in group.tracks if track.finish_reason is None]
        if self.journal is not None and going:
            self.journal(Aborted(tuple(track.request.id for track in going)))
        for track in going:
            self.state = scheduler.abort(self.state, track.request.id)
            track.end(FinishReason.ABORT)
            group.changed.add(track.index)
            self._touched[request_id] = group

    def _reset(self) -> None:
        if self.journal is not None:
            self.journal(Reset())
        self.state = scheduler.reset_prefix_cache(self.state)

    def _schedule(self) -> tuple[Plan, Batch] | None:
        """The next batch; None if there is nothing to compute now."""
        if self.journal is not None:
            self.journal(Scheduled())
        self.state, plan = scheduler.schedule(self.state)
        self._note_scheduled(plan)
        if not len(plan.slots):
            return None
        return plan, batch.build(self.state, plan, batch.choose(self._buckets, plan))

    def _dispatch(self, plan: Plan, built: Batch) -> bool:
        # In flight before it is dispatched: if dispatching fails, the plan is undone with the others.
        self._in_flight.append(InFlight(plan, built, None))
        self._in_flight[-1] = InFlight(plan, built, self.runner.dispatch(built))
        self.counters.steps += 1
        self.counters.peak_pages = max(self.counters.peak_pages, self.state.pool.num_held)
        self.counters.computed_tokens += int(plan.num_tokens.sum())
        return True

    def _wait(self) -> Sampled:
        """The results of the oldest step in flight, which stays there until they are committed."""
        start = time.perf_counter()
        sampled = self.runner.collect(self._in_flight[0].handle)
        self.counters.wait_time += time.perf_counter() - start
        return sampled

    def _note_scheduled(self, plan: Plan) -> None:
        now = time.monotonic()
        for request_id, num_cached in plan.admitted:
            group = self._tracks[request_id][0]
            if group.num_cached_tokens is None:
                group.num_cached_tokens = num_cached
                group.scheduled_time = now
        for request_id in plan.preempted:
            self._tracks[request_id][0].num_preemptions += 1

    def _commit(self, step: InFlight, sampled: Sampled) -> None:
        finite = sampled.finite if sampled.pooled is None else self._pool(step, sampled.pooled, sampled.finite)
        self.state, committed = scheduler.commit(self.state, step.plan, sampled.tokens, finite)
        if sampled.prompt_logprobs is not None:
            self._score_prompts(step, sampled)
        ended, now = [], time.monotonic()
        for request_id, slot, generation, token, finish, row in committed.items():
            group, track = self._tracks[request_id]
            self._touched[group.request.id] = group
            if self._push(group, track, token, finish, sampled, row, now):
                self.state = scheduler.finish(self.state, slot, generation)
                ended.append((slot, generation))
        if self.journal is not None:
            n = len(step.plan.slots)
            self.journal(Committed(sampled.tokens[:n], finite[:n], tuple(ended)))

    def _push(self, group: Group, track: Track, token: int, finish: FinishReason | None, sampled: Sampled, row: int,
              now: float) -> bool:  # fmt: skip
        """One token for one track, or the end of one that is pooled; True if a stop string ended it."""
        group.changed.add(track.index)
        pooled = group.request.pooling is not None
        if finish is FinishReason.ERROR:
            group.error = NOT_POOLED if pooled else NOT_SAMPLED
        if finish is FinishReason.ERROR or pooled:
            track.end(finish or FinishReason.STOP)
            return False
        self.counters.generated_tokens += 1
        group.note_token(now)
        return track.push(token, finish, sampled.logprobs, row)

    def _pool(self, step: InFlight, pooled: np.ndarray, finite: np.ndarray) -> np.ndarray:
        """Hands each request to pool what the step has computed of it. Returns `finite`, for their rows that of the
        vectors."""
        finite = finite.copy()
        for row, request in enumerate(step.plan.requests):
            entry = self._tracks.get(request.id)
            if request.pooling is not None and entry is not None:
                vector = entry[0].pool(int(step.plan.start[row]), pooled[0, row], pooled[1, row])
                finite[row] = np.isfinite(vector).all()
        return finite

    def _score_prompts(self, step: InFlight, sampled: Sampled) -> None:
        assert sampled.prompt_logprobs is not None
        for row, request in enumerate(step.plan.requests):
            entry = self._tracks.get(request.id)
            if entry is None or request.params.prompt_logprobs is None:
                continue
            at = int(step.batch.query_start[row])
            count = int(step.plan.num_tokens[row])
            entry[0].score_prompt(int(step.plan.start[row]), count, sampled.prompt_logprobs, at, self.tokenizer)

    def _forget(self, group: Group) -> None:
        for track in group.tracks:
            self._tracks.pop(track.request.id, None)
            reason = str(track.finish_reason)
            self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        self._groups.pop(group.request.id, None)
        self._reserved.discard(group.request.id)

    # -- failing -----------------------------------------------------------------------------------------------------

    def _fail(self, error: Exception) -> None:
        """Ends the requests of every step in flight; the others go on."""
        log.exception("a step failed; its requests end with an error")
        self.counters.failed_steps += 1
        failed: set[str] = set()
        while self._in_flight:
            self.state, ids = scheduler.fail(self.state, self._in_flight.popleft().plan)
            failed.update(ids)
        lost = self.runner.recover()
        if self.journal is not None:
            self.journal(Failed(lost))
        if lost:
            self.state, ids = scheduler.fail_running(self.state)
            failed.update(ids)
        for request_id in failed:
            group, track = self._tracks[request_id]
            group.error = f"{type(error).__name__}: {error}"
            track.end(FinishReason.ERROR)
            group.changed.add(track.index)
            self._touched[group.request.id] = group

    def close(self) -> None:
        """Ends everything and frees the device memory; there are no more requests."""
        self._closed = True
        self._in_flight.clear()
        self.runner.close()
