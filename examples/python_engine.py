"""No server at all: the engine inside a Python program, for asyncio. Requests come and go while it runs; it batches them.

    pip install jaxpaged
    python examples/python_engine.py [MODEL]     # default: demo

(For a list of prompts and nothing else, `jaxpaged.LLM(...).generate(prompts)` is shorter.)
"""

import asyncio
import sys

from jaxpaged import EngineConfig, RequestOutputKind, SamplingParams
from jaxpaged.async_engine import AsyncEngine
from jaxpaged.build import build_engine

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo"
QUESTIONS = ["What is the capital of France?", "Write a sentence about the sea.", "What is 2 + 2?"]
# DELTA: each output has what is new since the last one.
PARAMS = SamplingParams(temperature=0, max_tokens=40, output_kind=RequestOutputKind.DELTA)


async def ask(engine: AsyncEngine, tokenizer, name: str, question: str) -> None:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=True, add_generation_prompt=True)
    text = ""
    async for output in engine.generate(name, prompt, PARAMS):
        text += output.outputs[0].text
    print(f"{name}: {text!r} ({output.outputs[0].finish_reason}, {output.metrics.num_generation_tokens} tokens)")


async def leave_early(engine: AsyncEngine, tokenizer) -> None:
    """Leaving the block ends the request: nothing is computed for somebody who no longer listens."""
    with engine.submit("cut", tokenizer.encode("One, two, three,"), PARAMS) as stream:
        async for output in stream:
            print(f"cut: {output.outputs[0].text!r} and no more")
            break


async def main() -> None:
    # enforce_eager: programs are compiled when they are first needed. A server compiles all of them before it serves.
    sizes = {"max_model_len": 2048, "max_num_seqs": 8, "max_num_batched_tokens": 128, "enforce_eager": True}
    built = build_engine(EngineConfig(model=MODEL, **sizes))
    engine = AsyncEngine(built.engine)
    engine.start()
    try:
        await asyncio.gather(*(ask(engine, built.tokenizer, f"q{i}", one) for i, one in enumerate(QUESTIONS)))
        await leave_early(engine, built.tokenizer)
        stats = await engine.call(lambda inner: inner.counters)  # runs between two steps, in the engine's thread
        print(f"{stats.generated_tokens} tokens in {stats.steps} steps")
    finally:
        await engine.close()


if __name__ == "__main__":
    asyncio.run(main())
