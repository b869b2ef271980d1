"""Decoders and transformers' tiny random models: bfloat16, causality, rotations as configs write them, gradients. What every
family must show is in test_families.py."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import WINDOW, Row
from families.gemma import CAPS, LAYERS
from families.qwen import SLIDING
from flax import nnx
from safetensors.torch import save_file
from tiny_hf import TOLERANCE, check_file, edit, errors, forward, load, logits_of, make, prompts, reference
from transformers.activations import ACT2FN

from jaxpaged.models.layers import ACTIVATIONS
from jaxpaged.models.standard import HF_ACTIVATIONS

LENGTH = 320
FAMILIES = {
    "Llama": Row("", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": Row("", "Mistral", {"sliding_window": WINDOW}),
    "Qwen2": Row("", "Qwen2", SLIDING),
    "Qwen3": Row("", "Qwen3", {"attention_bias": True, **SLIDING}),
    "Gemma3Text": Row("", "Gemma3Text", {"attention_bias": True, **LAYERS, **CAPS}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path, family):
    model = make(tmp_path, FAMILIES[family])
    tokens = prompts(2, LENGTH)
    wanted = logits_of(model, tokens)
    ours = errors(forward(tmp_path, tokens, "bfloat16"), wanted)
    theirs = errors(logits_of(model.to(torch.bfloat16), tokens), wanted)
    assert ours.max() < TOLERANCE["bfloat16"]
    assert 1e-3 < ours.mean() < 1.2 * theirs.mean()  # not float32 in disguise either


def test_logits_of_a_token_do_not_depend_on_later_ones(tmp_path):
    make(tmp_path, FAMILIES["Gemma3Text"])
    tokens = prompts(2, LENGTH)
    tokens[1, :300] = tokens[0, :300]
    first, second = forward(tmp_path, tokens)
    assert np.array_equal(first[:300], second[:300]) and not np.allclose(first[300:], second[300:], atol=0.1)


@pytest.mark.parametrize("name", HF_ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    found = ACTIVATIONS[HF_ACTIVATIONS[name]](jnp.asarray(x))
    assert np.allclose(found, ACT2FN[name](torch.from_numpy(x)).numpy(), atol=1e-6)


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
    make(tmp_path, Row("", "Llama"), **changes, rope_parameters=dict(parameters))
    edit(tmp_path, lambda config: form({**config, "rope_parameters": parameters}))  # without what transformers adds
    written = json.loads((tmp_path / "config.json").read_text())
    assert ("rope_parameters" in written) == (form is dict)
    check_file(tmp_path)


def test_gemma3_as_it_was_written_before_transformers_5(tmp_path):
    """No layer_types but a pattern; rope_scaling is for the full layers only."""
    rope = {"full_attention": {"rope_type": "linear", "rope_theta": 80000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 900.0}}  # fmt: skip
    make(tmp_path, FAMILIES["Gemma3Text"], layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4,
         attn_logit_softcapping=None, rope_parameters=rope)  # fmt: skip

    def change(config):
        del config["layer_types"], config["_sliding_window_pattern"]
        return {**older(config), "sliding_window_pattern": 2}

    edit(tmp_path, change)
    check_file(tmp_path)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_without_layer_types(tmp_path, family):
    make(tmp_path, FAMILIES[family])
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
    model = make(tmp_path, FAMILIES[family], tie_word_embeddings=tie, pad_token_id=None)  # torch gives the padding no gradient
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
