"""The real engine and scheduler against the cost model, on a clock that is only counted: `jaxpaged plan --simulate`.

The engine is `engine.Engine`, as it is; its runner is `PaperRunner`, whose steps take the time that `cost` predicts and whose
tokens are all 0. What the scheduler decides (chunks, batches, preemptions, shared prefixes) is what it would decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxpaged import scheduler
from jaxpaged.batch import Batch, Sampled
from jaxpaged.cost import Rows, StepCost, host_seconds
from jaxpaged.engine import Engine
from jaxpaged.memory import MemoryPlan
from jaxpaged.plan_model import Setting
from jaxpaged.plan_times import itl, room, speed
from jaxpaged.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.simulate_traces import Traced, arrivals, tokens

Progress = Callable[[str], None]


class Ticket(NamedTuple):
    """A step on its way: when it will be done, and what it gives."""

    end: float
    sampled: Sampled


class PaperRunner:
    """A `Runner` whose device is arithmetic. `now`: seconds, moved on by whoever waits. A pipeline stage begins a step when it
    is free and the stage before is done with it. (Tokens that a step before has sampled are there then: with several stages the
    engine waits for them.)"""

    embed_dim = 1

    def __init__(self, cost: StepCost):
        self.cost, self.now = cost, 0.0
        self._free = [0.0] * len(cost.stages)  # when each stage is
        self.busy = 0.0  # of the slowest stage

    def dispatch(self, batch: Batch) -> Ticket:
        rows = int(batch.counts[1])
        self.now += host_seconds(rows)
        count = np.diff(batch.query_start[: rows + 1]).astype(np.int64)
        of_stages = self.cost.of_stages((len(batch.tokens), len(batch.slots)),
                                        Rows(batch.kv_lens[:rows].astype(np.int64) - count, count))  # fmt: skip
        end = self.now
        for stage, spent in enumerate(of_stages):
            end = max(end, self._free[stage]) + spent.total
            self._free[stage] = end
        self.busy += max(spent.total for spent in of_stages)
        size = len(batch.slots)
        return Ticket(end, Sampled(np.zeros(size, np.int32), np.ones(size, bool), None, None))

    def collect(self, handle: Ticket) -> Sampled:
        self.now = max(self.now, handle.end)
        return handle.sampled

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        pass


@dataclass
class Served:
    """A request: when it came, and when each of its tokens did."""

    arrival: float
    prompt: int
    output: int
    times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def gaps(self) -> np.ndarray:
        return np.diff(self.times)


class Result(NamedTuple):
    """Of one request rate. Seconds; p50, p99 and mean of each. Tokens a second of all engines over the whole run."""

    rate: float
    requests: int
    refused: int
    duration: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    ttft: dict[str, float]
    itl: dict[str, float]
    e2e: dict[str, float]
    busy: float
    preemptions: int
    prefix_hits: float
    peak_running: int


def make_engine(setting: Setting, plan: MemoryPlan) -> tuple[Engine, PaperRunner]:
    """As `build` makes it, with a device of paper."""
    limits = setting.limits(plan.num_pages)
    runner = PaperRunner(setting.cost)
    return Engine(limits, runner, setting.buckets, async_scheduling=setting.config.async_scheduling), runner


class Replica:
    """One engine and the requests that come to it."""

    def __init__(self, setting: Setting, plan: MemoryPlan):
        self.engine, self.runner = make_engine(setting, plan)
        self.served: dict[str, Served] = {}
        self.refused, self.peak = 0, 0

    def run(self, requests: Sequence[tuple[float, int, Traced]]) -> None:
        """requests: (arrival, number, what is asked), in the order of arrival. Until all are done."""
        waiting = list(reversed(requests))
        while waiting or self.engine.has_work:
            if not self.engine.has_work:
                self.runner.now = max(self.runner.now, waiting[-1][0])
            while waiting and waiting[-1][0] <= self.runner.now:
                self._submit(*waiting.pop())
            self.engine.advance()
            self.peak = max(self.peak, len(self.engine.state.slot_of))
            self._take()

    def _submit(self, at: float, number: int, request: Traced) -> None:
        limits = self.engine.limits
        request = request._replace(prompt=min(request.prompt, limits.max_model_len + 1))  # no more, only to be refused
        params = SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True, detokenize=False,
                                output_kind=RequestOutputKind.DELTA)  # fmt: skip
        prompt = tokens(number, request, limits.vocab_size).tolist()
        try:
            self.engine.submit(str(number), prompt, params)
        except RequestError:  # longer than max_model_len
            self.refused += 1
        else:
            self.served[str(number)] = Served(at, request.prompt, request.output)

    def _take(self) -> None:
        for output in self.engine.take_outputs():
            new: Any = output.outputs
            self.served[output.request_id].times += [self.runner.now] * len(new[0].token_ids)


def simulate(setting: Setting, plan: MemoryPlan, requests: list[Traced], rate: float, own_times: bool = False,
             seed: int = 0) -> Result:  # fmt: skip
    """At `rate` requests a second. Several engines get requests in turn, each on a clock of its own."""
    numbered = list(zip(arrivals(requests, rate, own_times, seed).tolist(), range(len(requests)), requests))
    replicas = []
    for i in range(setting.sizes.data):
        replica = Replica(setting, plan)
        replica.run(numbered[i :: setting.sizes.data])
        replicas.append(replica)
    return _result(rate, replicas)


def _result(rate: float, replicas: list[Replica]) -> Result:
    served = [one for replica in replicas for one in replica.served.values()]
    refused = sum(replica.refused for replica in replicas)
    if not served:
        raise RequestError("no request of the trace fits max_model_len; raise it, or take another trace.", "simulate")
    end = max(one.times[-1] for one in served)
    duration = end - min(one.arrival for one in served)
    outputs, prompts = sum(one.output for one in served), sum(one.prompt for one in served)
    stats = [scheduler.stats(replica.engine.state) for replica in replicas]
    gaps = np.concatenate([one.gaps for one in served])
    queries = sum(s.prefix_queries for s in stats)
    return Result(
        rate, len(served), refused, duration, outputs / duration, (outputs + prompts) / duration, len(served) / duration,
        _summary([one.ttft for one in served]), _summary(gaps), _summary([one.times[-1] - one.arrival for one in served]),
        max(replica.runner.busy for replica in replicas) / duration, sum(s.num_preemptions for s in stats),
        sum(s.prefix_hits for s in stats) / queries if queries else 0.0, max(replica.peak for replica in replicas),
    )  # fmt: skip


def _summary(values: Any) -> dict[str, float]:
    found = np.asarray(values, float)
    if not len(found):  # outputs of one token have no gaps
        found = np.zeros(1)
    return {"p50": float(np.percentile(found, 50)), "p99": float(np.percentile(found, 99)), "mean": float(found.mean())}


def sweep(setting: Setting, plan: MemoryPlan, requests: list[Traced], rates: Sequence[float], own_times: bool = False,
          seed: int = 0, progress: Progress = lambda line: None) -> list[Result]:  # fmt: skip
    """`simulate` at each rate; progress: gets the table, line by line."""
    results = []
    progress(HEADER)
    for rate in rates:
        results.append(simulate(setting, plan, requests, rate, own_times, seed))
        progress(row(results[-1]))
    return results


SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2)  # of the capacity, that are tried


def rates_to_try(setting: Setting, plan: MemoryPlan, requests: Sequence[Traced]) -> list[float]:
    """Requests a second, around what should be possible: prompts and tokens of the mean request at full batches."""
    most = int(setting.config.max_model_len or 0) - 1
    prompt = max(1, min(most, int(np.mean([r.prompt for r in requests]))))
    output = float(np.mean([r.output for r in requests]))
    batch = max(1, room(setting, plan, int(prompt + output)))
    together = max(1, min(batch, int(setting.config.max_num_batched_tokens) // prompt))
    prompts_per_s = speed(setting, plan, together, prompt).prompt_tokens_per_s / setting.sizes.data
    seconds = prompt / prompts_per_s + output * itl(setting, batch, int(prompt + output / 2))[0] / batch
    capacity = setting.sizes.data / seconds
    return [float(f"{capacity * share:.2g}") for share in SHARES]


HEADER = (f"{'requests/s':>10}{'done/s':>9}{'output tok/s':>14}{'TTFT p50':>12}{'p99':>11}{'ITL p50':>11}{'p99':>10}"
          f"{'busy':>7}{'running':>9}{'hits':>6}")  # fmt: skip


def row(result: Result) -> str:
    ms = lambda seconds, width: f"{seconds * 1e3:>{width},.1f}"
    return (f"{result.rate:>10g}{result.requests_per_s:>9.2f}{result.output_tokens_per_s:>14,.0f}"
            f"{ms(result.ttft['p50'], 9)} ms{ms(result.ttft['p99'], 8)} ms{ms(result.itl['p50'], 8)} ms"
            f"{ms(result.itl['p99'], 7)} ms{result.busy:>7.0%}{result.peak_running:>9}{result.prefix_hits:>6.0%}")  # fmt: skip
