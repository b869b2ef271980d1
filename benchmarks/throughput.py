"""Throughput: jaxpaged and Hugging Face `generate` on the same prompts in one run, and their ratio.

python -m benchmarks.throughput                      workload B (and C with and without prefix sharing)
python -m benchmarks.throughput --workloads C --runs 3 --json results/throughput.json
"""

from __future__ import annotations

import argparse
import time

from benchmarks import common
from jaxpaged import LLM, SamplingParams


def run_jaxpaged(llm: LLM, work: common.Workload) -> float:
    """Seconds for a workload. Greedy, every output exactly as long as asked."""
    params = [SamplingParams(temperature=0, max_tokens=i.output, ignore_eos=True, detokenize=False) for i in work.items]
    start = time.perf_counter()
    outputs = llm.generate([i.prompt for i in work.items], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert [len(o.outputs[0].token_ids) for o in outputs] == [i.output for i in work.items]
    return seconds


def measure_jaxpaged(model: str, name: str, runs: int, **engine) -> dict[str, float]:
    with LLM(model, max_num_seqs=common.workload(name, 10_000, 0).max_running, max_model_len=2048, **engine) as llm:
        vocab = llm.engine.limits.vocab_size

        def measure(run: int) -> dict[str, float]:
            work = common.workload(name, vocab, run)
            seconds = run_jaxpaged(llm, work)
            return {"seconds": seconds, "output_tokens_per_s": work.output_tokens / seconds}

        result = common.median_of(runs, measure)
        assert llm.engine.stats().num_held_pages == 0, "pages are still held after the run"
        return result


def measure_hf(model: str, name: str, vocab: int) -> dict[str, float]:
    """One run: it is slow and its spread is small beside the ratio."""
    from benchmarks import hf

    work = common.workload(name, vocab, 1)
    seconds = hf.timed(hf.load(model), work.items, work.max_running)
    return {"seconds": seconds, "output_tokens_per_s": work.output_tokens / seconds}


def compare(title: str, ours: dict[str, float], theirs: dict[str, float], whose: str) -> dict:
    ratio = ours["output_tokens_per_s"] / theirs["output_tokens_per_s"]
    print(f"{title}: jaxpaged {ours['output_tokens_per_s']:.1f} tokens/s, {whose} "
          f"{theirs['output_tokens_per_s']:.1f} tokens/s: {ratio:.2f} x")  # fmt: skip
    return {"jaxpaged": ours, whose: theirs, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--workloads", default="B,C")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-hf", action="store_true", help="only jaxpaged")
    parser.add_argument("--json")
    args = parser.parse_args()
    results = {}
    for name in args.workloads.split(","):
        ours = measure_jaxpaged(args.model, name, args.runs)
        print(f"{name}: jaxpaged {ours['output_tokens_per_s']:.1f} output tokens/s ({ours['seconds']:.1f} s)", flush=True)
        results[name] = {"jaxpaged": ours}
        if name == "C":
            alone = measure_jaxpaged(args.model, name, args.runs, enable_prefix_caching=False)
            results[name] = compare("C, prefix sharing on and off", ours, alone, "without sharing")
        elif not args.no_hf:
            results[name] = compare(name, ours, measure_hf(args.model, name, 49152), "transformers")
    common.write_json(args.json, results)


if __name__ == "__main__":
    main()
