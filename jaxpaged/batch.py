"""The batch: what one step sends to the device, as fixed-shape numpy arrays, and how a plan becomes one.

Dims: T tokens and R rows of the bucket, M pages a sequence, S slots, N longest sequence, V vocabulary. Rows are in batch order:
decodes (one token) first, then chunks. Padding: tokens have row R, rows have slot S, page 0 and no tokens.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.adapter import Adapter
from jaxpaged.request import MAX_LOGIT_BIAS, Request
from jaxpaged.residents import NONE
from jaxpaged.scheduler import Plan, State


class Variant(enum.IntEnum):
    """What the sampler must do for a batch: the most that any of its rows needs."""

    GREEDY = 0
    SAMPLE = 1
    FULL = 2


class Bucket(NamedTuple):
    """A shape that programs are compiled for."""

    num_tokens: int  # T
    num_rows: int  # R


Numbers = Any
"""A numpy array on the host; inside a program, and in what it returns, the jax.Array of the same shape."""


class Sampling(NamedTuple):
    """Per row [R]; `seed`: uint32 [R, 2], high and low word."""

    temperature: Numbers
    top_k: Numbers
    top_p: Numbers
    min_p: Numbers
    seed: Numbers


class Edits(NamedTuple):
    """Changes to the logits, per row. `history` int32 [R, N]: prompt and output known to the host, padded with V.
    `allowed` uint32 [R, V / 32]: bit t % 32 of word t // 32. `bias_ids` int32 [R, B], padded with V."""

    presence: Numbers
    frequency: Numbers
    repetition: Numbers
    history: Numbers
    num_prompt: Numbers
    num_history: Numbers
    allowed: Numbers
    bias_ids: Numbers
    bias: Numbers


class Batch(NamedTuple):
    """One step. See the module's text for dims and padding."""

    tokens: np.ndarray  # int32 [T]
    carried: np.ndarray  # bool [T]: the host does not know the token yet: it is what the slot sampled last
    positions: np.ndarray  # int32 [T]
    row_of_token: np.ndarray  # int32 [T]
    page_table: np.ndarray  # int32 [R, C]: of each group of layers the pages it may see, C = sum of `Limits.columns`
    first_page: np.ndarray  # int32 [R, groups]: which page of the sequence the group's first column is
    kv_lens: np.ndarray  # int32 [R]: tokens in the cache once this step has written; the position that is sampled
    query_start: np.ndarray  # int32 [R + 1]
    slots: np.ndarray  # int32 [R]
    samples: np.ndarray  # bool [R]: the row's last token is the sequence's last
    counts: np.ndarray  # int32 [2]: decode rows, rows
    copies: np.ndarray  # int32 [n, 2]: (source, destination) pages, copied before the step
    sampling: Sampling
    edits: Edits | None
    variant: Variant
    num_logprobs: int  # most alternatives that a row wants; -1: no row wants logprobs
    prompt_logprobs: bool
    targets: np.ndarray  # int32 [T]: the prompt's next token, 0 where there is none
    pools: bool  # some row's hidden states are asked for
    adapters: np.ndarray  # int32 [R]: the place of the row's LoRA adapter, -1: it has none
    loads: tuple[tuple[int, Adapter], ...]  # adapters that go to a place before the step


class TokenLogprobs(NamedTuple):
    """Of n tokens: their logprob float32 [n] and rank int32 [n], and the k most probable ones' ids and logprobs [n, k]."""

    logprob: Numbers
    rank: Numbers
    top_ids: Numbers
    top: Numbers


class Sampled(NamedTuple):
    """What a step gives back: tokens int32 [R], finite bool [R] (False: the row's logits had NaN), and where asked for:
    logprobs of the sampled tokens [R] and of the prompt's [T], and float32 [2, R, E]: the sum of each row's hidden states
    and the last of them."""

    tokens: np.ndarray
    finite: np.ndarray
    logprobs: TokenLogprobs | None
    prompt_logprobs: TokenLogprobs | None
    pooled: np.ndarray | None = None


def ladder(max_num_batched_tokens: int, max_num_seqs: int) -> tuple[Bucket, ...]:
    """The buckets: 1, 4, 8, 16, 32, 64 tokens, then two for each doubling (96, 128, 192, ...) up to the budget; as many
    rows as tokens, at most max_num_seqs. A step computes its padding too: below 8 tokens that is nothing (the weights
    are read once anyway), above 64 it is all that counts."""
    sizes, step = [1, 4, 8, 16, 32, 64], 64
    while sizes[-1] < max_num_batched_tokens:
        sizes += [step * 3 // 2, step * 2]
        step *= 2
    sizes = [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]
    return tuple(Bucket(size, min(size, max_num_seqs)) for size in sizes)


def choose(buckets: tuple[Bucket, ...], plan: Plan) -> Bucket:
    """The smallest bucket that a plan fits."""
    total, rows = int(plan.num_tokens.sum()), len(plan.slots)
    return next(b for b in buckets if b.num_tokens >= total and b.num_rows >= rows)


def build(state: State, plan: Plan, bucket: Bucket) -> Batch:
    """The batch of a plan. `state` is the one that `schedule` returned with the plan."""
    (T, R), n = bucket, len(plan.slots)
    row, slot, positions, starts = _columns(plan)
    ends = plan.start + plan.num_tokens
    slots = _padded(plan.slots, R, state.limits.max_num_seqs)
    wishes = state.wishes.read().take(slots)  # the field of a record is a view: nothing is copied row by row
    variant = _variant(wishes, ends - state.seats.num_prompt[plan.slots])
    wants_prompt = bool(wishes["prompt_logprobs"].any())
    page_table, first_page = _page_tables(state, plan, R)
    return Batch(
        tokens=_padded(state.tokens.read()[slot, positions], T, 0),
        carried=_padded(positions >= state.seats.num_known[slot], T, False),
        positions=_padded(positions, T, 0),
        row_of_token=_padded(row, T, R),
        page_table=page_table,
        first_page=first_page,
        kv_lens=_padded(ends, R, 0),
        query_start=_padded(starts, R + 1, starts[-1]),
        slots=slots,
        samples=_padded(plan.samples, R, False),
        counts=np.array([plan.num_decode, n], np.int32),
        copies=plan.copies,
        sampling=Sampling(*(wishes[name] for name in Sampling._fields)) if variant > Variant.GREEDY else NO_SAMPLING,
        edits=_edits(state, plan, wishes) if variant == Variant.FULL else None,
        variant=variant,
        num_logprobs=int(wishes["num_logprobs"].max()),
        prompt_logprobs=wants_prompt,
        targets=_targets(state, slot, positions, T) if wants_prompt else np.zeros(T, np.int32),
        pools=bool(state.seats.pooling[plan.slots].any()),
        adapters=_padded(state.seats.adapter[plan.slots], R, NONE),
        loads=plan.loads,
    )


_NONE = np.zeros(0, np.float32)
NO_SAMPLING = Sampling(_NONE, _NONE, _NONE, _NONE, np.zeros((0, 2), np.uint32))


def _columns(plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, slot and position of each token, and where each row's tokens start, with the end of the last."""
    n = len(plan.slots)
    if plan.num_decode == n:
        starts = np.arange(n + 1, dtype=np.int32)
        return starts[:n], plan.slots, plan.start, starts
    starts = np.zeros(n + 1, np.int32)
    np.cumsum(plan.num_tokens, out=starts[1:])
    row = np.repeat(np.arange(n, dtype=np.int32), plan.num_tokens)
    return row, plan.slots[row], (plan.start - starts[:n])[row] + np.arange(len(row), dtype=np.int32), starts


def _variant(wishes: np.ndarray, num_output: np.ndarray) -> Variant:
    if (num_output < wishes["edits_until"][: len(num_output)]).any():
        return Variant.FULL
    return Variant.SAMPLE if wishes["temperature"].any() else Variant.GREEDY


def _padded(values: np.ndarray, size: int, fill: int | bool) -> np.ndarray:
    dtype = np.bool_ if values.dtype == np.bool_ else np.int32
    out = np.empty(size, dtype)
    out[: len(values)], out[len(values) :] = values, fill
    return out


def _page_tables(state: State, plan: Plan, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries past a row's pages are left over from the slot's past and are never read; padding rows are null. A group that
    sees a window has fewer columns than a sequence may have pages: they begin with the first page that it still holds."""
    limits, (n, slots) = state.limits, (len(plan.slots), plan.slots)
    columns, M, whole = limits.columns, limits.max_pages_per_seq, state.page_table.read()
    tables, first = np.zeros((num_rows, sum(columns)), np.int32), np.zeros((num_rows, len(columns)), np.int32)
    used, at = int(state.seats.num_pages[slots].max()), 0
    for g, width in enumerate(columns):
        if width == M:
            tables[:n, at : at + used] = whole[slots, g * M : g * M + used]
        else:
            first[:n, g] = state.seats.dropped[slots, g]
            places = np.minimum(first[:n, g, None] + np.arange(width), M - 1)
            tables[:n, at : at + width] = whole[slots[:, None], g * M + places]
        at += width
    return tables, first


def _targets(state: State, slot: np.ndarray, positions: np.ndarray, size: int) -> np.ndarray:
    known = positions + 1 < state.seats.num_prompt[slot]
    following = np.minimum(positions + 1, state.limits.max_model_len - 1)
    return _padded(np.where(known, state.tokens.read()[slot, following], 0), size, 0)


# -- edits: rows that need more than temperature and truncation -----------------------------------------------------------


def _edits(state: State, plan: Plan, wishes: np.ndarray) -> Edits:
    V, num_rows = state.limits.vocab_size, len(wishes)
    history, num_history = _history(state, plan, num_rows)
    allowed = np.full((num_rows, -(-V // 32)), 0xFFFFFFFF, np.uint32)
    bias_ids = np.full((num_rows, MAX_LOGIT_BIAS), V, np.int32)
    bias = np.zeros((num_rows, MAX_LOGIT_BIAS), np.float32)
    num_prompt = _padded(state.seats.num_prompt[plan.slots], num_rows, 0)
    num_output = (plan.start + plan.num_tokens - num_prompt[: len(plan.slots)]).tolist()
    for i, request in enumerate(plan.requests):
        p = request.params
        if p.logit_bias:
            bias_ids[i, : len(p.logit_bias)] = list(p.logit_bias)
            bias[i, : len(p.logit_bias)] = list(p.logit_bias.values())
        if p.allowed_token_ids is not None or request.bad_words_ids or num_output[i] < p.min_tokens:
            _allow(allowed[i], request, history[i, : num_history[i]], num_output[i], V)
    return Edits(wishes["presence"], wishes["frequency"], wishes["repetition"], history, num_prompt, num_history,
                 allowed, bias_ids, bias)  # fmt: skip


def _history(state: State, plan: Plan, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    history = np.full((num_rows, state.limits.max_model_len), state.limits.vocab_size, np.int32)
    known = np.minimum(state.seats.num_known[plan.slots], plan.start + plan.num_tokens)
    for i, (slot, count) in enumerate(zip(plan.slots.tolist(), known.tolist())):
        history[i, :count] = state.tokens.read()[slot, :count]
    return history, _padded(known, num_rows, 0)


def _allow(words: np.ndarray, request: Request, known: np.ndarray, num_output: int, vocab_size: int) -> None:
    """Clears the bits of tokens that may not be sampled now."""
    p, mask = request.params, None
    banned: set[int] = set()
    if p.allowed_token_ids is not None:
        mask = np.zeros(len(words) * 32, bool)
        mask[list(p.allowed_token_ids)] = True
    if num_output < p.min_tokens:
        banned |= request.stop_ids
    for word in request.bad_words_ids:
        prefix = word[:-1]
        if len(prefix) <= max(num_output, 0) and (not prefix or tuple(known[-len(prefix) :].tolist()) == prefix):
            banned.add(word[-1])
    if mask is not None:
        words[:] = np.packbits(mask, bitorder="little").view(np.uint32)
    for token in banned:
        if token < vocab_size:
            words[token // 32] &= ~np.uint32(1 << (token % 32))
