"""Latency of a single request (workload A, 128 + 128 tokens): jaxpaged, Hugging Face, and the floor that memory sets.

    python -m benchmarks.latency [--runs 5] [--json results/latency.json]

The floor of a decode step is the time to read every weight once: weight bytes / measured read bandwidth.
"""

from __future__ import annotations

import argparse
import time

from benchmarks import common
from jaxpaged import LLM, SamplingParams
from jaxpaged.request import RequestOutputKind


def one_request(llm: LLM, item: common.Item, run: int) -> dict[str, float]:
    """Time to the first token and time per token after it, in seconds."""
    params = SamplingParams(temperature=0, max_tokens=item.output, ignore_eos=True, detokenize=False,
                            output_kind=RequestOutputKind.DELTA)  # fmt: skip
    engine, stamps = llm.engine, []
    start = time.perf_counter()
    engine.submit(f"latency-{run}", item.prompt, params)
    while engine.has_work:
        for output in engine.step():
            stamps += [time.perf_counter()] * sum(len(o.token_ids) for o in output.outputs)
    return {"ttft": stamps[0] - start, "tpot": (stamps[-1] - stamps[0]) / (len(stamps) - 1), "total": stamps[-1] - start}


def measure_hf(model: str, runs: int, vocab: int) -> dict[str, float]:
    from benchmarks import hf

    reference = hf.load(model)

    def measure(run: int) -> dict[str, float]:
        item = common.workload("A", vocab, run).items[0]
        first = hf.timed(reference, [common.Item(item.prompt, 1)], 1)
        total = hf.timed(reference, [item], 1)
        return {"ttft": first, "tpot": (total - first) / (item.output - 1), "total": total}

    return common.median_of(runs, measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-hf", action="store_true", help="only jaxpaged")
    parser.add_argument("--json")
    args = parser.parse_args()
    before = common.read_bandwidth()
    with LLM(args.model, max_num_seqs=1, max_model_len=2048) as llm:
        vocab, weights = llm.engine.limits.vocab_size, llm.memory_plan.weights
        ours = common.median_of(args.runs, lambda run: one_request(llm, common.workload("A", vocab, run).items[0], run))
    bandwidth = max(before, common.read_bandwidth())
    floor = weights / bandwidth
    ours["share_of_floor"] = floor / ours["tpot"]
    results = {"jaxpaged": ours, "floor_s": floor, "read_bandwidth": bandwidth, "weight_bytes": weights}
    print(f"memory: {bandwidth / 1e9:.1f} GB/s; {weights / 1e6:.0f} MB of weights: a step takes at least {1e3 * floor:.1f} ms")
    print(f"jaxpaged: TTFT {1e3 * ours['ttft']:.0f} ms, TPOT {1e3 * ours['tpot']:.1f} ms = "
          f"{100 * ours['share_of_floor']:.0f} % of the floor's speed")  # fmt: skip
    if not args.no_hf:
        theirs = results["transformers"] = measure_hf(args.model, args.runs, vocab)
        print(f"transformers: TTFT {1e3 * theirs['ttft']:.0f} ms, TPOT {1e3 * theirs['tpot']:.1f} ms; "
              f"jaxpaged is {theirs['tpot'] / ours['tpot']:.2f} x as fast a token")  # fmt: skip
    common.write_json(args.json, results)


if __name__ == "__main__":
    main()
