"""Hugging Face transformers on the same weights: the reference of the greedy tests and of the benchmarks (torch, CPU)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from benchmarks.common import Item
from jaxpaged import hub
from jaxpaged.checkpoint import open_checkpoint


def load(model: str):
    """The model named `model` (as for `LLM`) as a transformers model in float32, from our own reading of the file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(hub.resolve(model))
    settings = {k: v for k, v in checkpoint.config.items() if k not in ("architectures", "torch_dtype", "dtype")}
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    hf = hf.to_empty(device="cpu").float()
    tensors = {n: torch.from_numpy(np.array(checkpoint.read(n), np.float32)) for n in checkpoint.names()}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    hf.load_state_dict(tensors, strict=True)
    _remake_buffers(hf, config)
    return hf.eval()


def _remake_buffers(hf, config) -> None:
    """Buffers that are computed, not stored (rotary frequencies, embedding scales), were lost on the meta device. They come
    from a small model with one layer of each kind: there is a buffer of frequencies for each kind."""
    from transformers import AutoModelForCausalLM

    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or [None]))
    small = {"num_hidden_layers": len(kinds), "layer_types": None if kinds == [None] else kinds, "vocab_size": 8}
    fresh = dict(AutoModelForCausalLM.from_config(config.__class__(**{**config.to_dict(), **small})).named_buffers())
    for name, buffer in hf.named_buffers():
        buffer.copy_(fresh[name])


def greedy(hf, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations of exactly `num_tokens`, one prompt at a time (no padding: the oracle)."""
    return [generate(hf, [Item(list(prompt), num_tokens)])[0] for prompt in prompts]


def generate(hf, items: Sequence[Item]) -> list[list[int]]:
    """One static batch, padded on the left, as long as its longest output."""
    import torch

    longest, steps = max(len(i.prompt) for i in items), max(i.output for i in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, longest - len(item.prompt) :] = torch.tensor(item.prompt)
        mask[row, longest - len(item.prompt) :] = 1
    with torch.inference_mode():
        out = hf.generate(ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                          eos_token_id=None, pad_token_id=0)  # fmt: skip
    return [row[longest : longest + item.output].tolist() for row, item in zip(out, items)]


def timed(hf, items: Sequence[Item], batch: int) -> float:
    """Seconds for all items in static batches of `batch`, in the order given."""
    start = time.perf_counter()
    for at in range(0, len(items), batch):
        generate(hf, items[at : at + batch])
    return time.perf_counter() - start
