"""Ways to spread requests over replicas, on conversations of several turns: hits of the prefix cache, balance, waiting. Without
a device, a model or a clock: real engines and routers; a step costs what a model of it says.

    python -m benchmarks.routing [--quick] [--engines 4] [--json results/routing.json]

Conversations begin as a Poisson process. Each has one of a few system prompts (the first most often), some turns with time to
think between them, and a turn's prompt is all that was said before. A step takes 8 ms and 0.05 ms a token computed: more or
less an 8B model on an H100. hits: part of the prompt tokens that were found in the cache. balance: tokens computed by the
busiest engine over the mean. TTFT and the time of a request in ms.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import common
from jaxpaged.batch import Batch, Sampled, ladder
from jaxpaged.engine import Engine
from jaxpaged.request import RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.router import Route, Router
from jaxpaged.scheduler import Limits

STEP_SECONDS, TOKEN_SECONDS = 0.008, 0.00005
VOCAB, PAGE = 32_000, 16
LINE = ("{trace:<20} {policy:<13} {requests:>5} requests  hits {hits:6.1%}  balance {balance:4.2f}  TTFT {ttft_mean:5.0f} "
        "(p99 {ttft_p99:5.0f})  request {request_mean:6.0f}")  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """per_second: conversations that begin. pages: of each engine. Lengths are means, in tokens."""

    name: str
    conversations: int = 80
    per_second: float = 4.0
    turns: float = 5.0
    systems: int = 4
    system: int = 400
    question: int = 80
    answer: int = 150
    thinking: float = 8.0
    pages: int = 4000


TRACES = (
    Trace("chat"),
    Trace("chat, busy", per_second=40.0, conversations=240),
    Trace("chat, small caches", pages=800),
    Trace("chat, one at a time", per_second=0.05, conversations=20),
    Trace("long documents", systems=20, system=6000, turns=3.0, answer=60, per_second=1.5),
    Trace("one prompt for all", systems=1, system=2000, turns=1.0, per_second=25.0, conversations=200),
    Trace("nothing in common", systems=10**9, turns=1.0, per_second=25.0, conversations=200),
)


class NullRunner:
    """A device that does nothing."""

    embed_dim = 1

    def dispatch(self, batch: Batch) -> Sampled:
        rows = len(batch.slots)
        return Sampled((batch.kv_lens % VOCAB).astype(np.int32), np.ones(rows, bool), None, None)

    def collect(self, handle: Sampled) -> Sampled:
        return handle

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        pass


class RoundRobin(Router):
    """One after the other."""

    def route(self, *request: Any) -> Route:
        return super().route(*request)._replace(engine=len(self.seen) % len(self.loads), matched=0)

    def began(self, request_id: str, route: Route) -> None:
        super().began(request_id, route)
        self.seen.append(request_id)

    def __init__(self, *given: int):
        super().__init__(*given)
        self.seen: list[str] = []


class Thresholds(Router):
    """The rule of SGLang's and vLLM's routers: where 30 % of the prompt is remembered, or else where the least is; but to the
    engine with the fewest requests if the most are 64 and half as many again above that."""

    def route(self, *request: Any) -> Route:
        route, engines = super().route(*request), self._engines
        matched = [one.memory.longest(route.marks) * PAGE for one in engines]
        live = [one.num_live for one in engines]
        if max(live) - min(live) > 64 and max(live) > 1.5 * min(live):
            chosen = live.index(min(live))
        elif max(matched) > 0.3 * route.tokens:
            chosen = matched.index(max(matched))
        else:
            chosen = min(range(len(engines)), key=lambda i: engines[i].memory.size)
        return route._replace(engine=chosen, matched=matched[chosen])


def least_loaded(num_engines: int, page_size: int, num_pages: int, max_num_seqs: int) -> Router:
    return Router(num_engines, page_size, 0, max_num_seqs)


POLICIES: dict[str, Callable[[int, int, int, int], Router]] = {
    "round robin": RoundRobin, "least loaded": least_loaded, "thresholds": Thresholds, "affinity": Router,
}  # fmt: skip


@dataclass
class Conversation:
    said: list[int]
    turns: int
    thinking: list[float]
    lengths: list[tuple[int, int]]  # question, answer of each turn
    done: int = 0


@dataclass
class Simulation:
    """Engines on a clock of their own making."""

    trace: Trace
    engines: list[Engine]
    router: Router
    rng: np.random.Generator
    events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    arrived: dict[str, float] = field(default_factory=dict)
    of: dict[str, Conversation] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    busy: set[int] = field(default_factory=set)
    numbers: Any = field(default_factory=itertools.count)

    def at(self, time: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self.events, (time, next(self.numbers), what))

    def run(self) -> None:
        while self.events:
            time, _, what = heapq.heappop(self.events)
            what(time)

    def ask(self, conversation: Conversation, now: float) -> None:
        question, answer = conversation.lengths[conversation.done]
        conversation.said += self.rng.integers(0, VOCAB, question).tolist()
        params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False,
                                output_kind=RequestOutputKind.DELTA)  # fmt: skip
        request_id = str(len(self.arrived))
        self.arrived[request_id], self.of[request_id] = now, conversation
        guess = params.clone(max_tokens=None)  # a chat says no limit: the router knows none
        route = self.router.route(conversation.said, guess)
        self.engines[route.engine].submit(request_id, list(conversation.said), params)
        self.router.began(request_id, route)
        if route.engine not in self.busy:
            self.busy.add(route.engine)
            self.at(now, lambda time: self.step(route.engine, time))

    def step(self, number: int, now: float) -> None:
        engine = self.engines[number]
        before = engine.counters.computed_tokens
        outputs = engine.step()
        computed = engine.counters.computed_tokens - before
        end = now + STEP_SECONDS + TOKEN_SECONDS * computed
        self.at(end, lambda time: self.told(number, computed, outputs, time))

    def told(self, number: int, computed: int, outputs: Sequence[Any], now: float) -> None:
        self.router.computed(number, computed)
        for output in outputs:
            self.hear(output, now)
        if self.engines[number].has_work:
            self.step(number, now)
        else:
            self.busy.discard(number)

    def hear(self, output: RequestOutput, now: float) -> None:
        conversation, arrived = self.of[output.request_id], self.arrived[output.request_id]
        if output.metrics.num_generation_tokens == len(output.outputs[0].token_ids):
            self.first.append(now - arrived)
        conversation.said += output.outputs[0].token_ids
        if not output.finished:
            return
        self.router.ended(output.request_id)
        self.whole.append(now - arrived)
        conversation.done += 1
        if conversation.done < conversation.turns:
            self.at(now + conversation.thinking[conversation.done], lambda time: self.ask(conversation, time))


def conversations(trace: Trace, rng: np.random.Generator) -> list[tuple[float, Conversation]]:
    """When each begins, and what it will be: the same for every policy."""
    spread = lambda mean, n: np.maximum(1, rng.lognormal(np.log(mean) - 0.32, 0.8, n)).astype(int).tolist()
    weights = 1 / np.arange(1, min(trace.systems, 1000) + 1)
    begins, found = np.cumsum(rng.exponential(1 / trace.per_second, trace.conversations)).tolist(), []
    for begin in begins:
        which = int(rng.choice(len(weights), p=weights / weights.sum())) if trace.systems < 1000 else int(rng.integers(2**40))
        system = np.random.default_rng(which).integers(0, VOCAB, trace.system).tolist()
        turns = int(rng.geometric(1 / trace.turns))
        lengths = list(zip(spread(trace.question, turns), [min(n, 1000) for n in spread(trace.answer, turns)]))
        found.append((begin, Conversation(system, turns, rng.exponential(trace.thinking, turns).tolist(), lengths)))
    return found


def engine(trace: Trace) -> Engine:
    limits = Limits(max_num_seqs=64, max_num_batched_tokens=2048, page_size=PAGE, num_pages=trace.pages, vocab_size=VOCAB,
                    max_model_len=min(32_768, (trace.pages - 1) * PAGE))  # fmt: skip
    return Engine(limits, NullRunner(), ladder(2048, 64), async_scheduling=False)


def measure(trace: Trace, policy: str, num_engines: int) -> dict[str, Any]:
    engines = [engine(trace) for _ in range(num_engines)]
    limits = engines[0].limits
    router = POLICIES[policy](num_engines, PAGE, limits.num_pages, limits.max_num_seqs)
    simulation = Simulation(trace, engines, router, np.random.default_rng(1))
    for begin, conversation in conversations(trace, np.random.default_rng(0)):
        simulation.at(begin, lambda time, one=conversation: simulation.ask(one, time))
    simulation.run()
    stats, computed = [one.stats() for one in engines], [one.counters.computed_tokens for one in engines]
    first, whole = np.array(simulation.first) * 1e3, np.array(simulation.whole) * 1e3
    return {"trace": trace.name, "policy": policy, "requests": len(whole),
            "hits": sum(s.prefix_hits for s in stats) / sum(s.prefix_queries for s in stats),
            "balance": max(computed) / np.mean(computed).item(),
            "ttft_mean": first.mean().item(), "ttft_p99": np.percentile(first, 99).item(),
            "request_mean": whole.mean().item()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a tenth of the conversations of two traces")
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args()
    rows = []
    for trace in TRACES[:2] if options.quick else TRACES:
        if options.quick:
            trace = Trace(trace.name, conversations=30, pages=trace.pages)
        for policy in POLICIES:
            row = measure(trace, policy, options.engines)
            rows.append(row)
            print(LINE.format(**row), flush=True)
    if options.json:
        common.write_json(options.json, {"engines": options.engines, "rows": rows})


if __name__ == "__main__":
    main()
