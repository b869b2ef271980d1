"""How long the stages of a pipeline have nothing to do: the real engine and scheduler on paper devices (`jaxpaged plan`).

    python -m benchmarks.pipeline [--json FILE]

Llama-3-70B on H200s, three times as many requests as run at once, all there at the beginning. Idle: of the time of the slowest
stage until the last token, what it spends on no step. Times are the cost model's: no GPU is used, and none was measured.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from benchmarks.common import write_json
from benchmarks.compile_report import LLAMA_3_8B
from jaxpaged.config import EngineConfig
from jaxpaged.devices import DEVICES
from jaxpaged.plan_model import Source, fit, setting
from jaxpaged.simulate import Replica
from jaxpaged.simulate_traces import Traced

LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64
}  # fmt: skip


class Case(NamedTuple):
    stages: int
    running: int  # sequences
    prompt: int
    output: int


CASES = [Case(stages, running, 512, 256) for stages in (2, 4) for running in (1, 4, 16, 64, 256)]
CASES += [Case(4, 256, 2048, 64), Case(4, 256, 64, 512)]


def idle(case: Case, budget: int = 2048) -> float:
    """Share of the time."""
    config = EngineConfig(
        model="Llama-3-70B", pipeline_parallel_size=case.stages, tensor_parallel_size=2, max_num_seqs=case.running,
        max_num_batched_tokens=max(budget, case.running), max_model_len=4096,
    )  # fmt: skip
    found, memory = fit(setting(Source(LLAMA_3_70B), config, DEVICES["h200"]))
    replica = Replica(found, memory)
    requests = [(0.0, number, Traced(0.0, case.prompt, case.output)) for number in range(3 * case.running)]
    replica.run(requests)
    served = sorted(replica.served.values(), key=lambda one: one.times[-1])
    return 1 - replica.runner.busy / served[-1].times[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    print("| stages | running | prompt | output | idle |\n|---|---|---|---|---|")
    for case in CASES:
        results.append({**case._asdict(), "idle": idle(case)})
        print(f"| {case.stages} | {case.running} | {case.prompt} | {case.output} | {results[-1]['idle']:.1%} |", flush=True)
    write_json(options.json, {"cases": results})


if __name__ == "__main__":
    main()
