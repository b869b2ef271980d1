"""The engine with random weights of a real model's shape: for machines without a network. `python -m benchmarks.engine_dummy`

Tokens a second and latency do not depend on what the weights are. Each load is run once to warm up, then --runs times;
figures are medians. Beside them the floor that memory sets: a step reads all weights once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jax

import jaxpaged
from benchmarks.compile_report import LLAMA_3_8B

TINY = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
            vocab_size=4096)  # fmt: skip
LOADS = {  # name -> (requests at once, prompt tokens, output tokens)
    "one request": (1, 128, 128),
    "64 requests": (64, 512, 128),
    "prompts of 4k": (8, 4096, 1),
}


def run(llm: jaxpaged.LLM, load: tuple[int, int, int], vocab_size: int, seed: int) -> dict[str, float]:
    """Seconds and tokens of one load; every prompt is new, so that no prefix is shared."""
    count, prompt, output = load
    words = random.Random(seed)
    prompts = [{"prompt_token_ids": [words.randrange(vocab_size) for _ in range(prompt)]} for _ in range(count)]
    params = jaxpaged.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "output_tokens_per_s": count * output / seconds,
        "prompt_tokens_per_s": count * prompt / seconds,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    config = LLAMA_3_8B | (TINY if options.tiny else {})
    limits = (4, 64, 8) if options.tiny else (64, 4096, 128)
    loads = {name: tuple(map(min, load, limits)) for name, load in LOADS.items()}
    start = time.perf_counter()
    # Programs are compiled in the run that warms up, those that the loads need and no others.
    llm = jaxpaged.LLM(config, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=limits[0],
                       max_num_batched_tokens=min(2048, 2 * limits[1]), max_model_len=2 * limits[1],
                       kernel_backend=options.kernel_backend)  # fmt: skip
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "kernel_backend": options.kernel_backend,
        "start_seconds": time.perf_counter() - start, "weight_bytes": llm.memory_plan.weights, "loads": {},
    }  # fmt: skip
    with llm:
        for name, load in loads.items():
            runs = [run(llm, load, config["vocab_size"], seed) for seed in range(options.runs + 1)][1:]
            found = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            count, prompt, output = load
            result["loads"][name] = {"requests": count, "prompt": prompt, "output": output, **found}
            rates = f"{found['output_tokens_per_s']:.1f} output tokens/s, {found['prompt_tokens_per_s']:.0f} prompt tokens/s"
            print(f"{name} ({count} x {prompt} + {output} tokens): {found['seconds']:.3f} s, {rates}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel-backend", default="auto")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model and loads that a CPU can do, to try this script")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
