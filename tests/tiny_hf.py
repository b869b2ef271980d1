"""Tiny random models: transformers' logits, and ours of the same folder."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from families import Row
from flax import nnx

from jaxpaged import weights
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door, standard
from jaxpaged.stage import abstract_decoder

# Largest relative error of a vector, |x - y| / |y|. float32: sums in another order; 3e-6 at most was seen. bfloat16
# against float32: its half unit is 2e-3, and all roundings from the embedding to the head add up, most where attention
# or a norm decides between close values: 4e-2 was seen, in transformers' own bfloat16 too.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}


def make(folder: Path, row: Row, heads: str | None = None, tie: bool | None = None, **changes):
    """A random model of a row, saved by transformers as it saves models, and the model."""
    config = getattr(transformers, f"{row.config}Config")(**{**row.settings(heads, tie), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=row.attention).eval()
    randomise(model)
    model.save_pretrained(folder)
    if row.convert is not None:
        row.convert(folder)
    return model


def randomise(model) -> None:
    """Everything counts: attention far from uniform, norms that are not 1, biases that are not 0 (and not so large that
    every token is followed by the same one)."""
    generator = torch.Generator().manual_seed(0)
    learned = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for parameter in [*model.parameters(), *learned]:
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim >= 2
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if wide else parameter + 0.1 * noise)


def reference(model, tokens) -> torch.Tensor:
    """transformers' logits [B, T, V]. Its Gemma 3 can cap attention but does not tell itself the config's cap."""
    cap = model.config.attn_logit_softcapping if model.config.model_type == "gemma3_text" else None
    return model(torch.as_tensor(tokens), use_cache=False, **({} if cap is None else {"softcap": cap})).logits


def logits_of(model, tokens) -> np.ndarray:
    with torch.inference_mode():
        return reference(model, tokens).float().numpy()


def opened(folder: Path):
    """The checkpoint, the decoder's config, its graph, tree and leaves, rules and what is ignored: as the engine has them."""
    checkpoint = open_checkpoint(folder)
    hf = HFConfig(checkpoint.config, source=folder)
    family = door(hf["model_type"])
    config = family.decoder_config(hf)
    hf.finish()
    return checkpoint, config, family.names(config), standard.ignored(family, config)


def load(folder: Path, dtype: str = "float32", longest: int | None = None):
    """Graph and weights of the decoder that the engine would make of a folder, for sequences of at most so many tokens."""
    checkpoint, config, names, ignore = opened(folder)
    config = config.for_length(longest or config.max_positions)
    graph, treedef, leaves = abstract_decoder(config, dtype)
    arrays = weights.load(checkpoint, leaves, names, progress=False, ignore=ignore)
    checkpoint.close()
    return graph, jax.tree.unflatten(treedef, [arrays[path] for path in leaves])


def forward(folder: Path, tokens: np.ndarray, dtype: str = "float32") -> np.ndarray:
    graph, state = load(folder, dtype, longest=tokens.shape[1])
    logits = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, jnp.asarray(tokens, jnp.int32))
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def prompts(*shape: int, vocab_size: int = 101, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


def errors(found, wanted) -> np.ndarray:
    """Relative error of each vector of the last axis."""
    return np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def edit(folder: Path, change) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def check_file(folder: Path, length: int = 320) -> None:
    """Both sides read the same folder and agree."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = prompts(1, length)
    assert errors(forward(folder, tokens), logits_of(model, tokens)).max() < TOLERANCE["float32"]
