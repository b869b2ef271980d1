"""The traced functions of a step. Two programs and not one: the decoder is compiled once a bucket of tokens, the sampler
once a bucket of rows and variant; together they would need the product. Between them nothing leaves the device.

    forward : (leaves, caches*, last_token, packed)         -> (caches*, hidden [E, T], rows [E, R])
              of several stages each takes what the one before returns, x [E, T], for last_token, and the last one only returns
              hidden and rows
    sample  : (head, rows [E, R], last_token*, packed)      -> (tokens and flags [2, R], last_token*, logits [R, V])
    score   : (logits [R, V], tokens [2, R])                -> logprobs of the sampled tokens
    score_prompt : (head, hidden [E, T], targets [T])       -> logprobs of the prompt's tokens
    pool    : (hidden [E, T], rows [E, R], row_of_token [T]) -> sums and last hidden states, float32 [2, R, E]
    copy    : (caches*, pairs [N, 2])                       -> caches*          (copy-on-write)
    load_adapter : (tables*, new, place)                    -> tables*          (LoRA)

`*`: donated. `last_token [S]` is the carry: what each slot sampled last, on the device, so that step n + 1 can be
dispatched before the host has read step n.

Each is what one device runs. Where several share each layer (`Axis`), all of them run it at once and have the same numbers in
packed, x, hidden, rows, last_token and results; leaves, caches and head are each one's own, and so are the rows of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxpaged import packing, sampler
from jaxpaged.axis import ONE, Axis
from jaxpaged.batch import Bucket, Edits, Sampling, TokenLogprobs, Variant
from jaxpaged.kv_cache import Layout, PagedStep, Pages, Ragged
from jaxpaged.models.adapters import NO_ADAPTERS, Slots, Sorted, sort
from jaxpaged.models.decoder import Decoder, head_logits
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.request import MAX_LOGIT_BIAS
from jaxpaged.residents import NONE
from pallas_kernels.ops import Ops

SEQUENCE_TOKENS = 512  # with so many tokens each device normalises some of them only


class Model(NamedTuple):
    """What a device runs: a graph and tree of leaves (`stage.abstract_decoder`), of which it has those that are not None.
    config: the local one. layers: those it runs; all, unless there are several stages."""

    graph: nnx.GraphDef
    treedef: Any
    config: DecoderConfig
    kv: Layout
    ops: Ops
    layers: range
    held: tuple[bool, ...]  # of each leaf: it is there
    axis: Axis = ONE

    @property
    def first(self) -> bool:
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        return self.layers.stop == len(self.config.layers)

    def decoder(self, leaves: Sequence[Array]) -> Decoder:
        """leaves: those that are there."""
        there = iter(leaves)
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, [next(there) if held else None for held in self.held]))

    def axis_for(self, num_tokens: int) -> Axis:
        """The axis of a step over so many tokens."""
        divides = self.axis.size > 1 and num_tokens % self.axis.size == 0
        return self.axis._replace(sequence=divides and num_tokens >= SEQUENCE_TOKENS)


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


def make_forward(model: Model, bucket: Bucket, dims: Dims, adapted: bool = False) -> Callable:
    """The decoder, or a stage of it, over one batch. Padding tokens have row R: their keys go to page P, which does not exist
    (dropped)."""
    layout, axis = forward_layout(bucket, dims, adapted), model.axis_for(bucket.num_tokens)

    def forward(leaves: Sequence[Array], caches: Sequence[Array], x: Array, packed: Array):
        b = packing.unpack(layout, packed)
        adapters = _adapters(b, dims) if adapted else None
        ragged = Ragged(*(b[name] for name in Ragged._fields))
        step = PagedStep(model.config, model.kv, model.ops, caches, _groups(b, dims), ragged, adapters, axis)
        decoder = model.decoder(leaves)
        if model.first:
            x = decoder.embedded(_tokens(b, x, dims), b["positions"], step)
        x = decoder.through(x, model.layers, b["positions"], step)
        if not model.last:
            return tuple(step.caches), x
        hidden = decoder.finished(x, step)
        return tuple(step.caches), hidden, hidden[:, jnp.maximum(b["query_start"][1:] - 1, 0)]

    return forward


def _tokens(b: dict[str, Array], last_token: Array, dims: Dims) -> Array:
    """[T]: those that the host does not know are what their slot sampled last."""
    slot = b["slots"].at[b["row_of_token"]].get(mode="fill", fill_value=dims.num_slots)
    return jnp.where(b["carried"], last_token.at[slot].get(mode="fill", fill_value=0), b["tokens"])


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


def make_sample(model: Model, num_rows: int, variant: Variant, dims: Dims) -> Callable:
    """Each device samples some of the rows: it gets all their words, and nobody gets all rows' words."""
    layout, axis = sample_layout(num_rows, variant, dims), model.axis

    def sample(head: Sequence[Array], rows: Array, last_token: Array, packed: Array):
        b = packing.unpack(layout, packed)
        last = last_token.at[b["slots"]].get(mode="fill", fill_value=0)
        raw = _rows_of_logits(head, rows, model, dims)
        tokens, finite = _sampled(raw, {k: axis.mine(x) for k, x in b.items()}, axis.mine(last), variant, model.ops)
        found = axis.join(jnp.stack([tokens, finite.astype(jnp.int32)], axis=1), num_rows).T
        place = jnp.where(b["samples"], b["slots"], dims.num_slots)
        return found, last_token.at[place].set(found[0], mode="drop"), raw

    return sample


def _rows_of_logits(head: Sequence[Array], hidden: Array, model: Model, dims: Dims) -> Array:
    """hidden [E, R] -> all words of this device's rows, float32 [R / N, V]."""
    return model.axis.exchange(head_logits(head, hidden, model.config))[:, : dims.vocab_size]


def _sampled(raw: Array, b: dict[str, Array], last: Array, variant: Variant, ops: Ops) -> tuple[Array, Array]:
    """Tokens of rows of logits, and whether these are numbers. last: what each row's slot sampled last."""
    logits = raw
    if variant == Variant.FULL:
        logits = sampler.edit(logits, Edits(*(b[name] for name in Edits._fields)), last, b["carried"])
    if variant == Variant.GREEDY:
        tokens = sampler.greedy(logits)
    else:
        sampling = Sampling(*(b[name] for name in Sampling._fields))
        tokens = sampler.sample(logits, sampling, b["kv_lens"], ops.sample)
    return tokens, sampler.finite(raw) & sampler.finite(logits)


def make_score(model: Model, dims: Dims) -> Callable:
    """logits: this device's rows."""

    def score(logits: Array, tokens: Array) -> TokenLogprobs:
        return _scored(logits, tokens[0], model.axis, dims)

    return score


def _scored(logits: Array, tokens: Array, axis: Axis, dims: Dims) -> TokenLogprobs:
    """Of tokens [R], from this device's rows of logits [R / N, V]."""
    found = sampler.logprobs(logits, axis.mine(tokens), dims.max_logprobs)
    return TokenLogprobs(*(axis.join(x, len(tokens)) for x in found))


def make_score_prompt(model: Model, dims: Dims) -> Callable:
    def score_prompt(head: Sequence[Array], hidden: Array, targets: Array):
        score = lambda x, tokens: _scored(_rows_of_logits(head, x.T, model, dims), tokens, model.axis, dims)
        return sampler.prompt_logprobs(hidden.T, targets, score)

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
