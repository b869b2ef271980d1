"""Cost of the host's part of a step, in microseconds, and how it grows with the load. numpy only: no device, no model.

    python -m benchmarks.scheduler [--quick] [--json results/scheduler.json] [--plot results/scheduler.png]

A step is `schedule`, `batch.choose` and `batch.build`, `commit`, in the engine's order with one step in flight: step n + 1
is scheduled before step n is committed. The load is steady: every running sequence gets one token a step. Prefix caching
is on, pages have 16 tokens, and the sequences are staggered, so in each step one of 16 fills a page, publishes it and
takes another. Unless the row says otherwise: 256 running, 10^5 pages, nobody waiting, temperature and top-p sampling.

A number is the mean over 64 steps (32 where the pages hold no more) of the least time that each of them took in several
rounds from the same beginning: what the work costs when nothing else runs on the machine. `median`: the total once more,
with the median over the rounds in place of the least.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import common
from jaxpaged import batch, pages, scheduler
from jaxpaged.batch import Batch, Bucket, Sampled
from jaxpaged.engine import Engine
from jaxpaged.request import Request, RequestOutputKind, SamplingParams
from jaxpaged.scheduler import Limits, State

PAGE, VOCAB, MODEL_LEN, BUDGET = 16, 50_000, 2048, 8192
WARM_UP = 2  # steps that are not counted
PARTS = ("schedule", "build", "commit")

GREEDY = SamplingParams(temperature=0, ignore_eos=True, detokenize=False)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=1, ignore_eos=True, detokenize=False)
EDITED = SAMPLED.clone(presence_penalty=0.5, min_tokens=4)


@dataclass(frozen=True)
class Load:
    """What the scheduler has to carry while it is timed."""

    running: int = 256
    pages: int = 100_000
    waiting: int = 0
    context: int = 0  # tokens of the shortest prompt, less one
    model_len: int = MODEL_LEN
    params: SamplingParams = SAMPLED
    crowded: bool = False  # every free page is cached: to take one is to evict one

    @property
    def steps(self) -> int:
        longest = -(-(self.context + PAGE + WARM_UP + 64) // PAGE)
        return 64 if self.running * longest < self.pages else 32

    def limits(self, running: int | None = None) -> Limits:
        return Limits(running or self.running, BUDGET, PAGE, self.pages, self.model_len, VOCAB)


# -- beginnings -----------------------------------------------------------------------------------------------------------


def prompts(load: Load) -> Iterator[tuple[int, ...]]:
    """Without end. Random words: nothing is shared. Lengths go round a page, so that pages fill up evenly."""
    rng, i = np.random.default_rng(common.SEED), 0
    while True:
        yield tuple(rng.integers(0, VOCAB, load.context + 1 + i % PAGE).tolist())
        i += 1


def requests(load: Load, count: int) -> list[Request]:
    source = prompts(load)
    return [Request(f"r{i}", next(source), load.params, arrival=i, max_total_tokens=MODEL_LEN) for i in range(count)]


def tokens(number: int, count: int) -> np.ndarray:
    """What step `number` samples."""
    return np.random.default_rng((common.SEED, number)).integers(0, VOCAB, count, dtype=np.int32)


def all_admitted(state: State) -> State:
    """Schedules and commits until nobody waits."""
    while scheduler.stats(state).num_waiting:
        state, plan = scheduler.schedule(state)
        state, _ = scheduler.commit(state, plan, tokens(-1 % 2**32, len(plan.slots)), np.ones(len(plan.slots), bool))
    return state


def crowd(state: State) -> State:
    """Fills the pool with the pages of requests that have been and gone."""
    rng, number = np.random.default_rng(common.SEED + 1), 0
    size = min(MODEL_LEN - 1, (state.limits.num_pages - 2) * PAGE)
    while state.pool.num_cached < state.pool.num_free - size // PAGE:
        prompt = tuple(rng.integers(0, VOCAB, size).tolist())
        request = Request(f"crowd {number}", prompt, GREEDY, arrival=-1, max_total_tokens=size + 1)
        state, number = all_admitted(scheduler.add(state, request)), number + 1
    return state


def beginning(load: Load, arrivals: list[Request]) -> State:
    """All that run are running, the others wait."""
    state = scheduler.initial(load.limits())
    if load.crowded:
        state = crowd(state)
    for request in arrivals[: load.running]:
        state = scheduler.add(state, request)
    state = all_admitted(state)
    for request in arrivals[load.running :]:
        state = scheduler.add(state, request)
    return state


# -- a steady load --------------------------------------------------------------------------------------------------------


def steps(load: Load, state: State, sampled: list[np.ndarray], finite: np.ndarray) -> list[tuple[float, float, float]]:
    """One round: seconds in `PARTS`, a row a step."""
    buckets, times = batch.ladder(BUDGET, load.running), []
    state, before = scheduler.schedule(state)
    clock = time.perf_counter
    for drawn in sampled:
        start = clock()
        state, plan = scheduler.schedule(state)
        scheduled = clock()
        batch.build(state, plan, batch.choose(buckets, plan))
        built = clock()
        state, _ = scheduler.commit(state, before, drawn, finite)
        times.append((scheduled - start, built - scheduled, clock() - built))
        assert len(plan.slots) == load.running and not plan.preempted, "the load is not steady"
        before = plan
    return times[WARM_UP:]


def steady(load: Load, rounds: int) -> dict[str, float]:
    arrivals = requests(load, load.running + load.waiting)
    sampled = [tokens(i, load.running) for i in range(WARM_UP + load.steps)]
    finite = np.ones(load.running, bool)
    times = 1e6 * np.array([steps(load, beginning(load, arrivals), sampled, finite) for _ in range(rounds)])
    parts, median = times.min(axis=0).mean(axis=0), np.median(times.sum(axis=2), axis=0).mean()
    return {**dict(zip(PARTS, parts.tolist())), "total": float(parts.sum()), "median": float(median)}


class NoRunner:
    """A device that takes no time."""

    def __init__(self, running: int):
        self._finite, self._number, self._running = np.ones(running, bool), 0, running

    def dispatch(self, batch: Batch) -> Sampled:
        self._number += 1
        return Sampled(tokens(self._number, self._running), self._finite[: len(batch.slots)], None, None)

    def collect(self, handle: Sampled) -> Sampled:
        return handle

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        pass


def engine_steps(load: Load) -> list[float]:
    """One round: seconds of each `Engine.step`, less what the runner spends on drawing its tokens."""
    engine = Engine(load.limits(), NoRunner(load.running), batch.ladder(BUDGET, load.running))
    source = prompts(load)
    for i in range(load.running):
        engine.submit(f"r{i}", next(source), load.params)
    while engine.stats().num_running < load.running:
        engine.step()
    times, clock = [], time.perf_counter
    drawing = min(_seconds(lambda: tokens(0, load.running)) for _ in range(100))
    for _ in range(WARM_UP + load.steps):
        start = clock()
        engine.step()
        times.append(clock() - start - drawing)
    assert engine.counters.generated_tokens >= load.running * len(times)
    return times[WARM_UP:]


def whole_engine(kind: RequestOutputKind, rounds: int) -> float:
    """Microseconds a step at the default load."""
    load = Load(params=SAMPLED.clone(output_kind=kind, max_tokens=MODEL_LEN - PAGE))
    return float(1e6 * np.min([engine_steps(load) for _ in range(rounds)], axis=0).mean())


# -- single operations ----------------------------------------------------------------------------------------------------


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def admission(waiting: int, rounds: int) -> dict[str, float]:
    """Microseconds to queue a request, and to give one a seat (prompts of 1 to 16 tokens), behind `waiting` others."""
    load, count = Load(waiting=waiting), 64
    arrivals, queueing, seating = requests(load, waiting + count), [], []
    for _ in range(rounds):
        state = scheduler.initial(load.limits(count))
        for request in arrivals[count:]:
            state = scheduler.add(state, request)
        start = time.perf_counter()
        for request in arrivals[:count]:
            state = scheduler.add(state, request)
        added = time.perf_counter()
        state, plan = scheduler.schedule(state)
        seating.append((time.perf_counter() - added) / count)
        queueing.append((added - start) / count)
        assert len(plan.admitted) == count
    return {"add": 1e6 * min(queueing), "admit": 1e6 * min(seating)}


def matching(rounds: int) -> float:
    """Microseconds to find 1,000 tokens of a prompt in the cache."""
    load = Load()
    prompt = next(prompts(replace(load, context=MODEL_LEN - PAGE)))
    request = Request("r", prompt, GREEDY, max_total_tokens=MODEL_LEN)
    state = all_admitted(scheduler.add(scheduler.initial(load.limits()), request))
    asked = np.asarray(prompt, np.int32)
    assert len(pages.match(state.pool, asked, "").keys) == (len(prompt) - 1) // PAGE
    return 1e6 * min(_seconds(lambda: pages.match(state.pool, asked, "")) for _ in range(20 * rounds)) * 1000 / len(prompt)


def packing_time(params: SamplingParams, rounds: int) -> float | None:
    """Microseconds to lay a step's fields into the buffers that go to the device. None without JAX."""
    if importlib.util.find_spec("jax") is None:
        return None
    from jaxpaged import packing, programs

    load = Load(params=params)
    state, plan = scheduler.schedule(beginning(load, requests(load, load.running)))
    bucket: Bucket = batch.choose(batch.ladder(BUDGET, load.running), plan)
    built = batch.build(state, plan, bucket)
    lim = load.limits()
    dims = programs.Dims(lim.max_num_seqs, lim.columns, lim.num_pages, PAGE, MODEL_LEN, VOCAB, 20)
    layouts = programs.forward_layout(bucket, dims), programs.sample_layout(bucket.num_rows, built.variant, dims)
    fields = built._asdict() | built.sampling._asdict()
    if built.edits is not None:
        fields |= built.edits._asdict() | {"carried": built.carried[np.maximum(built.query_start[1:] - 1, 0)]}
    return 1e6 * min(_seconds(lambda: [packing.pack(layout, fields) for layout in layouts]) for _ in range(20 * rounds))


# -- reporting ------------------------------------------------------------------------------------------------------------


def series() -> dict[str, dict[str, Load]]:
    """Axis -> label -> load. The first three are what must stay flat, or grow with the running only."""
    return {
        "running": {f"{n:,}": Load(running=n) for n in (16, 64, 256, 1024)},
        "pages": {f"{n:,}": Load(pages=n) for n in (1_000, 10_000, 100_000, 1_000_000)},
        "waiting": {f"{n:,}": Load(waiting=n) for n in (0, 1_000, 100_000)},
        "context": {f"{n:,}": Load(context=n) for n in (0, 512, 1536)},
        "model_len": {f"{n:,}": Load(model_len=n) for n in (2_048, 32_768, 131_072)},
        "kind": {
            "greedy": Load(params=GREEDY),
            "sampled": Load(),
            "penalties": Load(params=EDITED),
            "evicting": Load(pages=3_000, crowded=True),
        },
    }


def report_steady(rounds: int, only: list[str] | None) -> dict[str, dict[str, dict[str, float]]]:
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'us a step':24}" + "".join(f"{part:>10}" for part in (*PARTS, "total", "median")))
    for axis, loads in series().items():
        if only and axis not in only:
            continue
        results[axis] = {}
        for label, load in loads.items():
            row = results[axis][label] = steady(load, rounds)
            print(f"{axis:10}{label:14}" + "".join(f"{value:10.1f}" for value in row.values()), flush=True)
    return results


def report_single(rounds: int) -> dict[str, dict]:
    results: dict[str, Any] = {"admission": {}}
    print("\nus a request, behind so many waiting: to queue it, to admit it")
    for waiting in (0, 1_000, 100_000):
        row = results["admission"][f"{waiting:,}"] = admission(waiting, rounds)
        print(f"{waiting:<24,}{row['add']:10.1f}{row['admit']:10.1f}", flush=True)
    results["match_1000_tokens"] = matching(rounds)
    print(f"\n{'us to match 1,000 tokens':40}{results['match_1000_tokens']:10.1f}")
    kinds = {"greedy": GREEDY, "sampled": SAMPLED, "penalties": EDITED}
    results["pack"] = {kind: packing_time(params, rounds) for kind, params in kinds.items()}
    for kind, value in results["pack"].items():
        print(f"{f'us to pack a step, {kind}':40}" + ("    no JAX" if value is None else f"{value:10.1f}"))
    results["engine_step"] = {kind.name.lower(): whole_engine(kind, rounds) for kind in RequestOutputKind}
    for kind, value in results["engine_step"].items():
        print(f"{f'us an Engine.step, {kind} outputs':40}{value:10.1f}", flush=True)
    return results


def plot(path: str, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Three panels: total time over the running, the pages, the waiting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for panel, axis in zip(panels, ("running", "pages", "waiting")):
        x = [int(label.replace(",", "")) for label in results[axis]]
        for name in (*PARTS, "total"):
            panel.plot(x, [row[name] for row in results[axis].values()], marker="o", label=name)
        panel.set_xscale("symlog" if 0 in x else "log")
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("us a step")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three rounds: the shape, not the digits")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--only", nargs="+", choices=list(series()), help="these axes only, and no single operations")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    steady_results = report_steady(rounds, args.only)
    single_results = {} if args.only else report_single(rounds)
    if args.plot and not args.only:
        plot(args.plot, steady_results)
    common.write_json(args.json, {"us_a_step": steady_results, **single_results})


if __name__ == "__main__":
    main()
