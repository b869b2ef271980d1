"""What less memory costs: perplexity of a model on a fixed public text, for every form of its weights and of its KV cache.

    python -m benchmarks.perplexity --model demo --json results/perplexity.json

The text is most of the Declaration of Independence (1776; public domain), read in windows of --window tokens, each by
itself; perplexity is exp of the mean negative log-likelihood of all tokens but each window's first.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks import common
from jaxpaged import LLM, SamplingParams

TEXT = Path(__file__).parent / "data" / "declaration.txt"
FORMS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "weights int8": {"quantization": "int8"},
    "weights fp8": {"quantization": "fp8"},
    "weights int4": {"quantization": "int4"},
    "GGUF blocks": {"quantization": "gguf"},
    "KV cache int8": {"kv_cache_dtype": "int8"},
    "KV cache fp8": {"kv_cache_dtype": "fp8"},
}


def measure(model: str, window: int, settings: dict) -> dict[str, float]:
    """Perplexity, bytes of the weights, and bytes of the cache for each token."""
    settings = {"dtype": "float32", **settings}
    with LLM(model, enforce_eager=True, use_tqdm=False, max_model_len=window + 1, max_num_seqs=1,
             max_num_batched_tokens=window, enable_prefix_caching=False, **settings) as llm:  # fmt: skip
        tokens = llm.get_tokenizer().encode(TEXT.read_text())
        windows = [tokens[i : i + window] for i in range(0, len(tokens), window)]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        outputs = llm.generate([w for w in windows if len(w) > 1], params, use_tqdm=False)
        plan = llm._built.plan
    found = [entry[token].logprob for output in outputs
             for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:])]  # fmt: skip
    return {"perplexity": math.exp(-sum(found) / len(found)), "weights_bytes": plan.weights, "tokens": len(found),
            "cache_bytes_per_token": plan.page_bytes / llm._built.config.block_size}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--forms", nargs="*", default=[name for name in FORMS if name != "GGUF blocks"], choices=list(FORMS),
                        help="GGUF blocks: of a GGUF file only")  # fmt: skip
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    print(f"{'':<16}{'perplexity':>12}{'change':>9}{'weights MiB':>13}{'cache B/token':>15}")
    for name in args.forms:
        found = results[name] = measure(args.model, args.window, FORMS[name])
        change = found["perplexity"] / next(iter(results.values()))["perplexity"] - 1
        print(f"{name:<16}{found['perplexity']:>12.3f}{change:>+9.2%}{found['weights_bytes'] / 2**20:>13.1f}"
              f"{found['cache_bytes_per_token']:>15,.0f}", flush=True)  # fmt: skip
    if args.json:
        about = {"machine": common.machine(), "model": args.model, "window": args.window}
        common.write_json(str(args.json), {**about, "results": results})


if __name__ == "__main__":
    main()
