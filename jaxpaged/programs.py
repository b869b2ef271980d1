"""The traced functions of a step. Two programs and not one: the decoder is compiled once a bucket of tokens, the sampler
once a bucket of rows and variant; together they would need the product. Between them nothing leaves the device.

    forward : (leaves, caches*, last_token, packed)         -> (caches*, hidden [E, T], rows [E, R])
    sample  : (head, rows [E, R], last_token*, packed)      -> (tokens and flags [2, R], last_token*, logits [R, V])
    score   : (logits [R, V], tokens [2, R])                -> logprobs of the sampled tokens
    score_prompt : (head, hidden [E, T], targets [T])       -> logprobs of the prompt's tokens
    pool    : (hidden [E, T], rows [E, R], row_of_token [T]) -> sums and last hidden states, float32 [2, R, E]
    copy    : (caches*, pairs [N, 2])                       -> caches*          (copy-on-write)
    load_adapter : (tables*, new, place)                    -> tables*          (LoRA)

`*`: donated. `last_token [S]` is the carry: what each slot sampled last, on the device, so that step n + 1 can be
dispatched before the host has read step n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpaged import packing, sampler
from jaxpaged.batch import Bucket, Edits, Sampling, Variant
from jaxpaged.kv_cache import Layout, PagedStep, Pages, Ragged
from jaxpaged.models.adapters import NO_ADAPTERS, Slots, Sorted, sort
from jaxpaged.models.decoder import Decoder, head_logits
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.request import MAX_LOGIT_BIAS
from jaxpaged.residents import NONE
from pallas_kernels.ops import Ops


@dataclass(frozen=True)
class Dims:
    """The fixed sizes of an engine's programs."""

    num_slots: int  # S
    columns: tuple[int, ...]  # of each group's page table
    num_pages: int  # P
    page_size: int  # K
    max_model_len: int  # N
    vocab_size: int  # V
    max_logprobs: int
    adapters: Slots = NO_ADAPTERS


def forward_layout(bucket: Bucket, dims: Dims, adapted: bool = False) -> packing.Layout:
    """adapted: some row has a LoRA adapter."""
    T, R = bucket
    i32 = np.dtype(np.int32)
    layout = {
        "tokens": ((T,), i32),
        "carried": ((T,), np.dtype(np.bool_)),
        "positions": ((T,), i32),
        "row_of_token": ((T,), i32),
        "page_table": ((R, sum(dims.columns)), i32),
        "first_page": ((R, len(dims.columns)), i32),
        "kv_lens": ((R,), i32),
        "query_start": ((R + 1,), i32),
        "slots": ((R,), i32),
        "counts": ((2,), i32),
    }
    return layout | ({"adapters": ((R,), i32)} if adapted else {})


def sample_layout(num_rows: int, variant: Variant, dims: Dims) -> packing.Layout:
    R = num_rows
    f32, i32, u32 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint32)
    layout = {"slots": ((R,), i32), "samples": ((R,), np.dtype(np.bool_))}
    if variant == Variant.GREEDY:
        return layout
    layout |= {
        "kv_lens": ((R,), i32),
        "temperature": ((R,), f32),
        "top_k": ((R,), i32),
        "top_p": ((R,), f32),
        "min_p": ((R,), f32),
        "seed": ((R, 2), u32),
    }
    if variant == Variant.SAMPLE:
        return layout
    return layout | {
        "carried": ((R,), np.dtype(np.bool_)),
        "presence": ((R,), f32),
        "frequency": ((R,), f32),
        "repetition": ((R,), f32),
        "history": ((R, dims.max_model_len), i32),
        "num_prompt": ((R,), i32),
        "num_history": ((R,), i32),
        "allowed": ((R, -(-dims.vocab_size // 32)), u32),
        "bias_ids": ((R, MAX_LOGIT_BIAS), i32),
        "bias": ((R, MAX_LOGIT_BIAS), f32),
    }


def make_forward(graph: nnx.GraphDef, treedef: Any, config: DecoderConfig, kv: Layout, ops: Ops, bucket: Bucket, dims: Dims,
                 adapted: bool = False):  # fmt: skip
    """The decoder over one batch. Padding tokens have row R: their keys go to page P, which does not exist (dropped)."""
    layout = forward_layout(bucket, dims, adapted)

    def forward(leaves: Sequence[Array], caches: Sequence[Array], last_token: Array, packed: Array):
        b = packing.unpack(layout, packed)
        slot = b["slots"].at[b["row_of_token"]].get(mode="fill", fill_value=dims.num_slots)
        carried = last_token.at[slot].get(mode="fill", fill_value=0)
        tokens = jnp.where(b["carried"], carried, b["tokens"])
        adapters = _adapters(b, dims) if adapted else None
        step = PagedStep(config, kv, ops, caches, _groups(b, dims), Ragged(*(b[name] for name in Ragged._fields)), adapters)
        decoder: Decoder = nnx.merge(graph, jax.tree.unflatten(treedef, leaves))
        hidden = decoder.hidden(tokens, b["positions"], step)
        last = jnp.maximum(b["query_start"][1:] - 1, 0)
        return tuple(step.caches), hidden, hidden[:, last]

    return forward


def _adapters(b: dict[str, Array], dims: Dims) -> Sorted:
    return sort(b["adapters"].at[b["row_of_token"]].get(mode="fill", fill_value=NONE), dims.adapters.num)


def _groups(b: dict[str, Array], dims: Dims) -> list[Pages]:
    """Each group of layers' part of the page table, and the places that it gives the step's tokens."""
    K, row, positions, found, at = dims.page_size, b["row_of_token"], b["positions"], [], 0
    for g, width in enumerate(dims.columns):
        table, first = b["page_table"][:, at : at + width], b["first_page"][:, g]
        column = positions // K - first.at[row].get(mode="fill", fill_value=0)
        pages = table.at[row, column].get(mode="fill", fill_value=dims.num_pages)
        found.append(Pages(table, jnp.maximum(b["kv_lens"] - first * K, 0), pages, positions % K))
        at += width
    return found


def make_sample(config: DecoderConfig, ops: Ops, num_rows: int, variant: Variant, dims: Dims) -> Callable:
    layout = sample_layout(num_rows, variant, dims)

    def sample(head: Sequence[Array], rows: Array, last_token: Array, packed: Array):
        b = packing.unpack(layout, packed)
        raw = logits = head_logits(head, rows, config)
        if variant == Variant.FULL:
            last = last_token.at[b["slots"]].get(mode="fill", fill_value=0)
            logits = sampler.edit(logits, Edits(*(b[name] for name in Edits._fields)), last, b["carried"])
        if variant == Variant.GREEDY:
            tokens = sampler.greedy(logits)
        else:
            sampling = Sampling(*(b[name] for name in Sampling._fields))
            tokens = sampler.sample(logits, sampling, b["kv_lens"], ops.sample)
        place = jnp.where(b["samples"], b["slots"], dims.num_slots)
        last_token = last_token.at[place].set(tokens, mode="drop")
        finite = sampler.finite(raw) & sampler.finite(logits)
        return jnp.stack([tokens, finite.astype(jnp.int32)]), last_token, raw

    return sample


def make_score(dims: Dims) -> Callable:
    return lambda logits, tokens: sampler.logprobs(logits, tokens[0], dims.max_logprobs)


def make_score_prompt(config: DecoderConfig, dims: Dims) -> Callable:
    def score_prompt(head: Sequence[Array], hidden: Array, targets: Array):
        return sampler.prompt_logprobs(hidden.T, lambda x: head_logits(head, x.T, config), targets, dims.max_logprobs)

    return score_prompt


def pool(hidden: Array, rows: Array, row_of_token: Array) -> Array:
    """For embeddings: float32 [2, R, E], the sum over each row's columns of hidden [E, T], and its last one (rows [E, R]).
    Rows are added up one by one and not as a product with ones and zeros: a NaN stays in its row."""
    columns = hidden.T.astype(jnp.float32)
    zeros = jnp.zeros(rows.T.shape, jnp.float32)
    sums = zeros.at[row_of_token].add(columns, mode="drop", indices_are_sorted=True)
    return jnp.stack([sums, rows.T.astype(jnp.float32)])


def load_adapter(tables: Sequence[Array], new: Sequence[Array], place: Array) -> tuple[Array, ...]:
    """Each table's entry `place` is the new one."""
    return tuple(table.at[place].set(entry) for table, entry in zip(tables, new))


def copy_pages(caches: Sequence[Array], pairs: Array) -> tuple[Array, ...]:
    """Copies page pairs[i, 0] to pairs[i, 1] in every layer; a destination >= P is dropped (padding)."""
    return tuple(c.at[pairs[:, 1]].set(c[pairs[:, 0]], mode="drop") for c in caches)
