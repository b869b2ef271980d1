"""The demo: a real model answers several prompts at once, and shows what paging and prefix sharing did."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jaxpaged.request import RequestOutput, SamplingParams

QUESTIONS = (
    "What is the capital of France?",
    "What is gravity?",
    "What does a compiler do?",
    "Write a haiku about the sea.",
    "Give me three tips for better sleep.",
    "What is photosynthesis?",
)
COMPLETIONS = ("Once upon a time, in a village by the sea,", "def fibonacci(n):\n")
PARAMS = SamplingParams(temperature=0.0, max_tokens=48)


def run(build: Callable[..., Any]) -> None:
    """`build(**engine)` makes the LLM; the demo asks for a small context, so that few programs are compiled."""
    began = time.perf_counter()
    with build(max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64) as llm:
        ready = time.perf_counter() - began
        tokenizer = llm.get_tokenizer()
        prompts: list[Any] = list(COMPLETIONS)
        titles = [text.strip() for text in COMPLETIONS]
        if tokenizer.chat_template is not None:
            prompts = [{"prompt_token_ids": _question(tokenizer, q)} for q in QUESTIONS] + prompts
            titles = list(QUESTIONS) + titles
        start = time.perf_counter()
        outputs = llm.generate(prompts, PARAMS)
        seconds = time.perf_counter() - start
        metrics = {m.name: m.value for m in llm.get_metrics()}
    for title, output in zip(titles, outputs):
        print(f"\n> {title}\n{output.outputs[0].text.strip()}")
    print("\n" + _summary(outputs, seconds, ready, metrics))
    print(NEXT)


def _question(tokenizer: Any, question: str) -> list[int]:
    return tokenizer.apply_chat_template([{"role": "user", "content": question}])


def _summary(outputs: list[RequestOutput], seconds: float, ready: float, metrics: dict[str, float]) -> str:
    new = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return "\n".join([
        f"ready after {ready:.1f} s; {len(outputs)} requests at once, {new} tokens in {seconds:.1f} s: "
        f"{new / seconds:.1f} tokens/s",
        f"pages: at most {metrics['kv_pages_peak']:.0f} of {metrics['kv_pages_total']:.0f} held at once, "
        f"{metrics['kv_pages_held']:.0f} held now",
        f"prefix cache: {metrics['prefix_cache_hits']:.0f} of {metrics['prefix_cache_queries']:.0f} prompt tokens were "
        "shared, not computed",
    ])  # fmt: skip


NEXT = """
Next:
  jaxpaged chat                                          talk with this model
  jaxpaged generate "The capital of France is"           complete a prompt
  jaxpaged generate --help                               models, sampling, memory
  python -c "from jaxpaged import LLM; print(LLM('demo').generate('Hello')[0].outputs[0].text)"
(`source .venv/bin/activate` puts `jaxpaged` on the path after `make demo`.)"""
