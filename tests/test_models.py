"""Decoders equal transformers' on tiny random models of every family: whole sequences, through the engine, gradients."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import save_file
from transformers.activations import ACT2FN

from jaxpaged import LLM, SamplingParams, weights
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door
from jaxpaged.models.layers import ACTIVATIONS
from jaxpaged.models.standard import HF_ACTIVATIONS, TIED
from jaxpaged.runner import abstract_decoder

# Largest relative error of a vector, |x - y| / |y|. float32: sums in another order; 3e-6 at most was seen. bfloat16
# against float32: its half unit is 2e-3, and all roundings from the embedding to the head add up, most where attention
# or a norm decides between close values: 4e-2 was seen, in transformers' own bfloat16 too.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
LENGTH, WINDOW = 320, 20  # past position 256, where bfloat16 positions would be told apart no more
SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24}
VARIANTS = {  # of each family: the simplest, and one with all that it can have
    "Llama": ({"hidden_act": "gelu_pytorch_tanh"}, {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ({"sliding_window": None}, {"sliding_window": WINDOW}),
    "Qwen2": ({}, SLIDING),
    "Qwen3": ({}, {"attention_bias": True, **SLIDING}),
    "Gemma3Text": (GEMMA, {"attention_bias": True, **GEMMA, **CAPS}),
}
ALL = list(itertools.product(VARIANTS, HEADS, (False, True), (0, 1)))
FEW = [(f, *few) for f in VARIANTS for few in (("MHA", False, 1), ("GQA", True, 1), ("MQA", False, 0))]
CASES = [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in ALL]
PLAIN = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def make(folder: Path, family: str, variant: int = 1, **changes):
    """A random model of a family, saved by transformers as it saves models, and the model."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **VARIANTS[family][variant], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


def randomise(model) -> None:
    """Everything counts: attention far from uniform, norms that are not 1, biases that are not 0 (and not so large that
    every token is followed by the same one)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim == 2
            parameter.copy_(noise * parameter.shape[1] ** -0.5 if wide else parameter + 0.1 * noise)


def reference(model, tokens) -> torch.Tensor:
    """transformers' logits [B, T, V]. Its Gemma 3 can cap attention but does not tell itself the config's cap."""
    cap = getattr(model.config, "attn_logit_softcapping", None)
    return model(torch.as_tensor(tokens), use_cache=False, **({} if cap is None else {"softcap": cap})).logits


def logits_of(model, tokens) -> np.ndarray:
    with torch.inference_mode():
        return reference(model, tokens).float().numpy()


def load(folder: Path, dtype: str = "float32"):
    """Graph and weights of the decoder that the engine would make of a folder."""
    checkpoint = open_checkpoint(folder)
    hf = HFConfig(checkpoint.config, source=folder)
    family = door(hf["model_type"])
    config = family.decoder_config(hf)
    hf.finish()
    graph, treedef, leaves = abstract_decoder(config, dtype)
    ignore = (*family.IGNORED, *(TIED if config.tie else ()))
    arrays = weights.load(checkpoint, leaves, family.names(config), progress=False, ignore=ignore)
    checkpoint.close()
    return graph, jax.tree.unflatten(treedef, [arrays[path] for path in leaves])


def forward(folder: Path, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    graph, state = load(folder, dtype)
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, jnp.asarray(tokens, jnp.int32))
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def prompts(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)


def errors(found, wanted) -> np.ndarray:
    """Relative error of each vector of the last axis."""
    return np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def edit(folder: Path, change) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def check_file(folder: Path) -> None:
    """Both sides read the same folder and agree."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = prompts(1, LENGTH)
    assert errors(forward(folder, tokens), logits_of(model, tokens)).max() < TOLERANCE["float32"]


# -- whole sequences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, heads, tie, variant", CASES)
def test_logits(tmp_path, family, heads, tie, variant):
    model = make(tmp_path, family, variant, num_key_value_heads=HEADS[heads], tie_word_embeddings=tie)
    tokens = prompts(2, LENGTH)
    assert errors(forward(tmp_path, tokens), logits_of(model, tokens)).max() < TOLERANCE["float32"]


@pytest.mark.parametrize("family", VARIANTS)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path, family):
    model = make(tmp_path, family)
    tokens = prompts(2, LENGTH)
    wanted = logits_of(model, tokens)
    ours = errors(forward(tmp_path, tokens, "bfloat16"), wanted)
    theirs = errors(logits_of(model.to(torch.bfloat16), tokens), wanted)
    assert ours.max() < TOLERANCE["bfloat16"]
    assert 1e-3 < ours.mean() < 1.2 * theirs.mean()  # not float32 in disguise either


def test_logits_of_a_token_do_not_depend_on_later_ones(tmp_path):
    make(tmp_path, "Gemma3Text")
    tokens = prompts(2, LENGTH)
    tokens[1, :300] = tokens[0, :300]
    first, second = forward(tmp_path, tokens)
    assert np.array_equal(first[:300], second[:300]) and not np.allclose(first[300:], second[300:], atol=0.1)


@pytest.mark.parametrize("name", HF_ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    found = ACTIVATIONS[HF_ACTIVATIONS[name]](jnp.asarray(x))
    assert np.allclose(found, ACT2FN[name](torch.from_numpy(x)).numpy(), atol=1e-6)


# -- through the engine ------------------------------------------------------------------------------------------------


def scores(entries: list, first: int) -> list[tuple[int, int, float]]:
    """(position, token, logprob) of all that is reported from `first` on."""
    return [(i, t, lp.logprob) for i, e in enumerate(entries) if i >= first for t, lp in e.items()]


def check_output(output, model, scored_from: int) -> None:
    """Tokens, their logprobs and the prompt's logprobs from a position on, all equal to those of a full forward pass.
    (Each token is the argmax after those before it: so they are what a greedy loop would find.)"""
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    tokens = completion.token_ids
    logprobs = jax.nn.log_softmax(logits_of(model, [prompt + tokens])[0])
    assert tokens == logprobs[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert [entry is None for entry in output.prompt_logprobs] == [i < scored_from for i in range(len(prompt))]
    found = scores(output.prompt_logprobs + completion.logprobs, scored_from)
    assert len(found) >= 3 * (len(prompt) + len(tokens) - scored_from)  # three alternatives each, and the token itself
    at, ids, values = map(np.array, zip(*found))
    assert errors(values, np.asarray(logprobs)[at - 1, ids]) < TOLERANCE["float32"]


@pytest.mark.parametrize("family", VARIANTS)
def test_engine(tmp_path, family):
    """Prompts in chunks of 32 that straddle pages and window; the second and third begin with pages of the first."""
    model = make(tmp_path, family, tie_word_embeddings=family == "Qwen3")
    rows = prompts(3, LENGTH)
    rows[1:, :100] = rows[0, :100]
    first, second, third = rows[0].tolist(), rows[1, :-7].tolist(), rows[2, :-40].tolist()
    params = PLAIN.clone(logprobs=3, prompt_logprobs=3)
    settings = {"block_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 2, "max_model_len": 336}
    with LLM(str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, use_tqdm=False, **settings) as llm:
        (alone,) = llm.generate([first], params, use_tqdm=False)
        both = llm.generate([second, third], params.clone(skip_reading_prefix_cache=False), use_tqdm=False)
    assert alone.num_cached_tokens == 0
    assert len({tuple(output.outputs[0].token_ids) for output in (alone, *both)}) == 3
    check_output(alone, model, scored_from=1)
    for output in both:
        assert output.num_cached_tokens == 96  # six whole pages of the 100 tokens they share
        check_output(output, model, scored_from=97)


# -- rotations ---------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 256},
    "yarn": YARN,
    "yarn, its length from max_position_embeddings": {"rope_type": "yarn", "factor": 4.0},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn, betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, both mscales": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.4},
    "yarn, one mscale, which is then not used": {**YARN, "mscale": 3.0},
}  # fmt: skip


def older(config: dict) -> dict:
    """rope_parameters as written before transformers 5: rope_theta, rope_scaling, and Gemma's rope_local_base_freq."""
    parameters = config.pop("rope_parameters")
    local = parameters.get("sliding_attention")
    if local is not None:
        config["rope_local_base_freq"] = local["rope_theta"]
    scaling = dict(parameters.get("full_attention", parameters))
    config["rope_theta"] = scaling.pop("rope_theta")
    return {**config, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


def oldest(config: dict) -> dict:
    """With the key `type` instead of `rope_type`."""
    config = older(config)
    if config["rope_scaling"] is not None:
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    return config


FORMS = [*itertools.product(SCALINGS, (dict, older)), *((kind, oldest) for kind in ("linear", "llama3", "yarn"))]


@pytest.mark.parametrize("scaling, form", FORMS)
def test_rope_scalings(tmp_path, scaling, form):
    parameters = {"rope_theta": 50000.0, **SCALINGS[scaling]}
    changes = {"head_dim": 32, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    make(tmp_path, "Llama", 0, **changes, rope_parameters=dict(parameters))
    edit(tmp_path, lambda config: form({**config, "rope_parameters": parameters}))  # without what transformers adds
    written = json.loads((tmp_path / "config.json").read_text())
    assert ("rope_parameters" in written) == (form is dict)
    check_file(tmp_path)


def test_gemma3_as_it_was_written_before_transformers_5(tmp_path):
    """No layer_types but a pattern; rope_scaling is for the full layers only."""
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 80000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 900.0}}  # fmt: skip
    make(tmp_path, "Gemma3Text", layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4,
         attn_logit_softcapping=None, rope_parameters=rope)  # fmt: skip

    def change(config):
        del config["layer_types"], config["_sliding_window_pattern"]
        return {**older(config), "sliding_window_pattern": 2}

    edit(tmp_path, change)
    check_file(tmp_path)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_without_layer_types(tmp_path, family):
    make(tmp_path, family, **SLIDING)
    edit(tmp_path, lambda config: {k: v for k, v in older(config).items() if k != "layer_types"})
    check_file(tmp_path)


# -- gradients ---------------------------------------------------------------------------------------------------------


def loss_of(logits, targets):
    """Mean negative log-likelihood of the next tokens."""
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, targets[:, 1:, None], -1).mean()


def their_gradients(model, tokens: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    logits = reference(model, tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.as_tensor(tokens)[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family, tie", [("Llama", False), ("Gemma3Text", True)])
def test_gradients(tmp_path, family, tie):
    """Of a loss by every weight. torch's gradients are saved and loaded as if they were weights, into our places."""
    model = make(tmp_path, family, tie_word_embeddings=tie, pad_token_id=None)  # torch gives the padding no gradient
    tokens = prompts(2, 48)
    their_loss, gradients = their_gradients(model, tokens)
    graph, state = load(tmp_path)
    step = jax.jit(jax.value_and_grad(lambda state, x: loss_of(nnx.merge(graph, state)(x), x)))
    loss, ours = step(state, jnp.asarray(tokens, jnp.int32))
    save_file(gradients, tmp_path / "model.safetensors")
    _, theirs = load(tmp_path)
    theirs = dict(nnx.to_flat_state(theirs))
    assert float(loss) == pytest.approx(their_loss, rel=TOLERANCE["float32"])
    for path, gradient in nnx.to_flat_state(ours):
        found, wanted = np.ravel(gradient[...]), np.ravel(theirs[path][...])
        assert errors(found, wanted) < TOLERANCE["float32"], path
