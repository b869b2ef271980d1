"""Engines over several devices do what one on one device does: tokens, logprobs, chunks, shared prefixes, preemption."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpaged import LLM, BeamSearchParams, LoRARequest, SamplingParams
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door
from jaxpaged.models.decoder import Decoder

BASE = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": False}  # fmt: skip
MODELS = {
    "llama": {**BASE, "model_type": "llama", "rope_theta": 10000.0},
    "wide": {**BASE, "model_type": "llama", "rope_theta": 10000.0, "head_dim": 32, "intermediate_size": 256},
    "qwen3": {**BASE, "model_type": "qwen3", "rope_theta": 10000.0, "tie_word_embeddings": True, "num_key_value_heads": 2},
    "gemma3": {**BASE, "model_type": "gemma3_text", "sliding_window": 24, "query_pre_attn_scalar": 16, "num_key_value_heads": 1,
               "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
               "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_theta": 10000.0,
               "rope_local_base_freq": 10000.0},
    "moe": {**BASE, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 10000.0},
    "gpt-oss": {**BASE, "model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True, "swiglu_limit": 7.0,
                "rope_theta": 10000.0},
    "mla": {**BASE, "model_type": "deepseek_v3", "num_key_value_heads": 8, "kv_lora_rank": 24, "q_lora_rank": 20,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_routed_experts": 8,
            "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
            "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_theta": 10000.0},
}  # fmt: skip
ENGINE = {"skip_tokenizer_init": True, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, "max_model_len": 128,
          "enforce_eager": True, "use_tqdm": False, "max_logprobs": 101}  # fmt: skip
PREFIX = [(7 * i) % 101 for i in range(45)]
PROMPTS = [PREFIX, [*PREFIX, 5, 6], [11, 12, 13], [*PREFIX[:20], 9], [(3 * i + 1) % 101 for i in range(60)], [42] * 10]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=101, prompt_logprobs=101)
SHAPES = {
    "tp2": {"tensor_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4},
    "tp8": {"tensor_parallel_size": 8},
    "pp2": {"pipeline_parallel_size": 2},
    "pp4": {"pipeline_parallel_size": 4},
    "tp2 pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "tp2 pp4": {"tensor_parallel_size": 2, "pipeline_parallel_size": 4},
    "dp2 tp2": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "ep4": {"tensor_parallel_size": 4, "enable_expert_parallel": True},
    "ep2 pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True},
}


def wanted(model: str, shape: str) -> bool:
    if model in ("wide", "gpt-oss"):
        return model == "gpt-oss" and shape in ("tp4", "ep4")
    return "ep" not in shape or model in ("moe", "mla")


QUICK = (("llama", "tp4"), ("gemma3", "tp2 pp2"), ("moe", "ep4"), ("mla", "tp2"), ("llama", "pp4"))
CASES = [
    pytest.param(model, shape, id=f"{model} {shape}", marks=() if (model, shape) in QUICK else pytest.mark.slow)
    for model in MODELS
    for shape in SHAPES
    if wanted(model, shape)
]  # fmt: skip


@functools.cache
def params(name: str) -> dict:
    """Random weights in which rounding decides nothing."""
    hf = HFConfig(MODELS[name])
    config = door(hf["model_type"], hf).decoder_config(hf)
    state = nnx.split(Decoder(config, jnp.dtype(jnp.float32), nnx.Rngs(1)))[1]
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def make(name: str, **changes) -> LLM:
    return LLM(MODELS[name], params=params(name), **{**ENGINE, **changes})


def generate(llm: LLM, params: SamplingParams = GREEDY, prompts=PROMPTS) -> list:
    outputs = llm.generate([list(p) for p in prompts], params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return outputs


def tokens(outputs: list) -> list:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def scores(outputs: list) -> np.ndarray:
    """Logprobs of every word, of every token of prompts and outputs: [n, V]."""
    entries = [e for o in outputs for e in (*(o.prompt_logprobs or [])[1:], *o.outputs[0].logprobs)]
    return np.array([[entry[word].logprob for word in range(101)] for entry in entries])


@functools.cache
def expected(name: str) -> tuple[list, np.ndarray, list]:
    with make(name) as llm:
        outputs = generate(llm)
        return tokens(outputs), scores(outputs), tokens(generate(llm, SAMPLED))


SAMPLED = SamplingParams(temperature=1.0, seed=5, n=2, top_p=0.9, top_k=30, max_tokens=6, ignore_eos=True,
                         repetition_penalty=1.2, logit_bias={3: 2.0})  # fmt: skip


@pytest.mark.parametrize("model, shape", CASES)
def test_it_is_the_same_as_on_one_device(model, shape):
    """Chunks of 16 tokens, prefixes shared, all words' logprobs; then two samples of each prompt."""
    words, logprobs, sampled = expected(model)
    with make(model, **SHAPES[shape]) as llm:
        outputs = generate(llm)
        assert tokens(outputs) == words
        np.testing.assert_allclose(scores(outputs), logprobs, atol=1e-4)
        assert tokens(generate(llm, SAMPLED)) == sampled
        again = generate(llm, GREEDY.clone(logprobs=None, prompt_logprobs=None))
        assert tokens(again) == words and sum(output.num_cached_tokens or 0 for output in again) > 100


DEMOS = [
    ("demo", {"tensor_parallel_size": 3}), ("demo", {"pipeline_parallel_size": 4}),
    ("demo", {"tensor_parallel_size": 3, "pipeline_parallel_size": 2}), ("demo", {"data_parallel_size": 2}),
    ("demo-gemma3", {"tensor_parallel_size": 2}), ("demo-gemma3", {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}),
]  # fmt: skip
TEXTS = ["The capital of France is", "def fibonacci(n):", "The capital of France is Paris, and that of Italy"]


@functools.cache
def texts(model: str, **shape: int) -> list[str]:
    small = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 64, "enforce_eager": True, "use_tqdm": False}
    with LLM(model, **small, **shape) as llm:
        outputs = llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("model, shape", DEMOS, ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())))
def test_a_real_model_says_the_same(model, shape):
    assert texts(model, **shape) == texts(model)


def test_the_newest_is_preempted_in_a_pipeline_too():
    """Pages for one and a half of the sequences: they take turns, and nothing is lost."""
    words = expected("llama")[0]
    with make("llama", pipeline_parallel_size=2, num_gpu_blocks_override=33) as llm:
        assert tokens(generate(llm)) == words
        preempted = sum(metric.value for metric in llm.get_metrics() if "preempt" in metric.name)
        assert preempted > 0 and all(m.value == 0 for m in llm.get_metrics() if m.name.endswith("kv_pages_held"))


KEPT_SMALL = {
    "int8": {"quantization": "int8"}, "int4": {"quantization": "int4"}, "fp8": {"quantization": "fp8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
}  # fmt: skip


SMALL_CASES = [("llama", "int8"), ("llama", "int8 cache"), ("llama", "fp8"), ("wide", "int4"), ("moe", "int8"), ("mla", "int8")]


@pytest.mark.parametrize("model, way", [pytest.param(*case, marks=() if case == SMALL_CASES[0] else pytest.mark.slow)
                                        for case in SMALL_CASES])  # fmt: skip
def test_small_weights_and_caches_are_cut_too(model, way):
    """Scales lie where their numbers do. (int4: in groups of 128, which the parts on 2 devices have too.)"""
    with make(model, **KEPT_SMALL[way]) as one:
        words = tokens(generate(one))
    with make(model, **KEPT_SMALL[way], **SHAPES["tp2 pp2"]) as llm:
        assert tokens(generate(llm)) == words


LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 4}


def adapter(number: int) -> LoRARequest:
    """PEFT's names; every product of the layers, some of whose rows and columns are each device's."""
    rng, sizes = np.random.default_rng(number), {"q": (128, 64), "k": (64, 64), "v": (64, 64), "o": (64, 128)}
    places = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
    places |= {"mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
    arrays = {}
    for layer in range(4):
        for name, (n_out, n_in) in places.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            arrays[f"{at}.lora_A.weight"] = rng.normal(size=(4, n_in)).astype(np.float32) * 0.2
            arrays[f"{at}.lora_B.weight"] = rng.normal(size=(n_out, 4)).astype(np.float32) * 0.2
    return LoRARequest(str(number), number, tensors=arrays, config={"r": 4, "lora_alpha": 8})


@pytest.mark.parametrize("shape", ["tp4", *(pytest.param(s, marks=pytest.mark.slow) for s in ("tp8", "tp2 pp2"))])
def test_adapters_are_cut_as_their_products_are(shape):
    asked = [adapter(1), None, adapter(2), adapter(1), None, adapter(2)]
    found = []
    for more in ({}, SHAPES[shape]):
        with make("llama", **LORA, **more) as llm:
            outputs = llm.generate([list(p) for p in PROMPTS], GREEDY.clone(prompt_logprobs=None), lora_request=asked,
                                   use_tqdm=False)  # fmt: skip
            found.append((tokens(outputs), scores(outputs)))
    assert found[0][0] == found[1][0] and found[0][0] != expected("llama")[0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)


def test_embeddings_and_beams_are_the_same():
    found = []
    for more in ({}, SHAPES["tp2 pp2"]):
        with make("llama", **more) as llm:
            vectors = [output.outputs.embedding for output in llm.embed([list(p) for p in PROMPTS], use_tqdm=False)]
            (beams,) = llm.beam_search([{"prompt_token_ids": list(PROMPTS[1])}], BeamSearchParams(beam_width=2, max_tokens=4))
            found.append((np.array(vectors), [sequence.tokens for sequence in beams.sequences]))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][1] == found[1][1]
