"""Greedy tokens of real models equal Hugging Face's in float32, whatever the engine does around them."""

import pytest

from benchmarks import hf
from jaxpaged import LLM, SamplingParams

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "Question: What is 17 + 25?\nAnswer:",
    "To bake bread you need flour, water,",
    "In 1969, the first human beings",
    "Die Hauptstadt von Deutschland ist",
)
LENGTH = 64
MODELS = ("demo", "demo-gemma3")


class Reference:
    """Prompts of a model and what transformers makes of them, worked out once."""

    def __init__(self, model: str):
        from jaxpaged import hub
        from jaxpaged.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(hub.resolve(model))
        self.model = model
        self.prompts = [tokenizer.encode(text) for text in TEXTS]
        words = tokenizer.encode(" ".join(f"{text} {i}." for i in range(200) for text in TEXTS))
        self.long_prompt = words[:2000]
        self._hf, self._tokens = None, {}

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        known = self._tokens.get(tuple(prompt), [])
        if len(known) < num_tokens:
            self._hf = self._hf or hf.load(self.model)
            known = self._tokens[tuple(prompt)] = hf.greedy(self._hf, [prompt], num_tokens)[0]
        return known[:num_tokens]


@pytest.fixture(scope="module", params=MODELS)
def reference(request) -> Reference:
    return Reference(request.param)


def open_llm(reference: Reference, **changes) -> LLM:
    settings = {"max_model_len": 2304, "max_num_seqs": 8, "max_num_batched_tokens": 64, "use_tqdm": False, **changes}
    return LLM(reference.model, **settings)


def tokens(llm: LLM, prompts: list[list[int]], num_tokens: int = LENGTH, **changes) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **changes)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def metric(llm: LLM, name: str) -> float:
    return {m.name: m.value for m in llm.get_metrics()}[name]


def test_first_tokens_equal_transformers(demo_gguf):
    reference = Reference("demo")
    with open_llm(reference, max_model_len=256, max_num_seqs=2, max_num_batched_tokens=16, enforce_eager=True) as llm:
        found = tokens(llm, reference.prompts[:2], 12)
    assert found == [reference.greedy(p, 12) for p in reference.prompts[:2]]


@pytest.mark.slow
def test_alone_together_and_from_the_prefix_cache(reference):
    expected = [reference.greedy(p, LENGTH) for p in reference.prompts]
    with open_llm(reference) as llm:
        assert [tokens(llm, [p])[0] for p in reference.prompts[:3]] == expected[:3]
        llm.reset_prefix_cache()
        assert tokens(llm, reference.prompts) == expected
        hits = metric(llm, "prefix_cache_hits")
        assert tokens(llm, [[*p, *e[:40]] for p, e in zip(reference.prompts, expected)], LENGTH - 40) == [
            e[40:] for e in expected
        ]
        assert metric(llm, "prefix_cache_hits") > hits
        assert metric(llm, "kv_pages_held") == 0


@pytest.mark.slow
def test_without_overlap_and_without_prefix_caching(reference):
    expected = [reference.greedy(p, LENGTH) for p in reference.prompts]
    with open_llm(reference, async_scheduling=False, enable_prefix_caching=False) as llm:
        assert tokens(llm, reference.prompts) == expected


@pytest.mark.slow
def test_long_prompt_in_small_chunks_and_in_large_ones(reference):
    expected = reference.greedy(reference.long_prompt, LENGTH)
    with open_llm(reference) as llm:
        assert tokens(llm, [reference.long_prompt]) == [expected]
        # 36 more tokens are new: the rest comes from the cache, with other requests around it.
        mixed = tokens(llm, [*reference.prompts[:4], reference.long_prompt])
        assert mixed == [*(reference.greedy(p, LENGTH) for p in reference.prompts[:4]), expected]
    with open_llm(reference, max_num_batched_tokens=512) as llm:
        assert tokens(llm, [reference.long_prompt]) == [expected]


@pytest.mark.slow
def test_pool_too_small_for_all(reference):
    """Pages for about three of the eight sequences at their end: the newest are preempted and computed again."""
    expected = [reference.greedy(p, LENGTH) for p in reference.prompts]
    with open_llm(reference, max_model_len=128, num_gpu_blocks_override=16) as llm:
        assert tokens(llm, reference.prompts) == expected
        assert metric(llm, "num_preemptions") > 0
        assert metric(llm, "kv_pages_held") == 0


@pytest.mark.slow
def test_four_samples_that_can_only_be_greedy(reference):
    """top_k = 1 is greedy by another way, and allows n = 4: four equal samples on shared pages."""
    prompt = reference.prompts[1]
    params = SamplingParams(n=4, temperature=1.0, top_k=1, max_tokens=LENGTH, ignore_eos=True)
    with open_llm(reference) as llm:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert [o.token_ids for o in output.outputs] == [reference.greedy(prompt, LENGTH)] * 4
