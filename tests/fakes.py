"""The paper cache: a runner without a model. It stores token ids in pages exactly where a kernel would store keys, and a
token's successor is a hash of the context *read back through the page table*. `paper_tokens` never heard of pages; if
both agree, chunking, sharing, copying, preemption, padding, slots and overlap are right, end to end, without JAX."""

from __future__ import annotations

import hashlib
import time

import numpy as np

from jaxpaged.batch import Batch, Sampled, TokenLogprobs
from jaxpaged.reach import EVERYTHING, Reach
from jaxpaged.scheduler import Limits

POISON = -7
ADAPTED = 1000  # what an adapter of rank 1 adds to the tokens that are written with it


def successor(context: list[int], vocab_size: int) -> int:
    """The token that follows a context: any change anywhere in the context changes it (nearly always)."""
    digest = hashlib.blake2b(np.asarray(context, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


def paper_tokens(prompt: list[int], count: int, vocab_size: int, stop: frozenset[int] = frozenset(),
                 reach: Reach = EVERYTHING[0], adapter: int = 0) -> list[int]:  # fmt: skip
    """The oracle: `count` tokens, or fewer if one of `stop` comes (it is included). reach: how far back a token sees.
    adapter: the rank of the LoRA adapter, 0: none."""
    context = list(prompt)
    while len(context) < len(prompt) + count and not (len(context) > len(prompt) and context[-1] in stop):
        seen = [token + ADAPTED * adapter for token in context[reach.first_seen(len(context) - 1) :]]
        context.append(successor(seen, vocab_size))
    return context[len(prompt) :]


EMBED_DIM = 3


def hidden_state(context: list[int]) -> np.ndarray:
    """A hidden state on paper: small integers, of which float32 adds up any number without an error."""
    digest = hashlib.blake2b(np.asarray(context, np.int64).tobytes(), digest_size=EMBED_DIM).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32) + 1


def paper_vector(prompt: list[int], pooling: str) -> np.ndarray:
    """The oracle of pooling, not scaled: float32 [EMBED_DIM]."""
    states = [hidden_state(prompt[: i + 1]) for i in range(len(prompt))]
    return states[-1] if pooling == "last" else np.sum(states, axis=0) / np.float32(len(prompt))


class FakeRunner:
    """A `Runner` on paper. `fail_at`: numbers of the dispatches that raise. Results are worked out at once and handed
    out by `collect`, as late as the engine asks for them. step_seconds: how long that makes it wait."""

    embed_dim = EMBED_DIM

    def __init__(self, limits: Limits, fail_at: frozenset[int] = frozenset(), step_seconds: float = 0.0):
        self.limits, self.fail_at, self.step_seconds = limits, fail_at, step_seconds
        self.cache = np.full((limits.num_pages, limits.page_size), POISON, np.int64)
        self.last_token = np.full(limits.max_num_seqs, POISON, np.int64)
        self.places: dict[int, int] = {}  # of LoRA adapters: the rank of the one that is there
        self.num_dispatched = 0
        self.closed = False

    def dispatch(self, batch: Batch) -> Sampled:
        self.num_dispatched += 1
        if self.num_dispatched in self.fail_at:
            raise RuntimeError("out of paper")
        self._check(batch)
        self.places |= {place: adapter.rank for place, adapter in batch.loads}
        if len(batch.copies):
            self.cache[batch.copies[:, 1]] = self.cache[batch.copies[:, 0]]
        num_rows = int(batch.counts[1])
        for row in range(num_rows):  # all rows write before any reads, as in every layer of a model
            self._write(batch, row)
        return self._read_all(batch, num_rows)

    def collect(self, handle: Sampled) -> Sampled:
        time.sleep(self.step_seconds)
        return handle

    def recover(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    def _check(self, batch: Batch) -> None:
        T, R = len(batch.tokens), len(batch.slots)
        num_decode, n = batch.counts.tolist()
        used = int(batch.query_start[n])
        assert 0 < n <= R and 0 < used <= T
        assert (batch.page_table >= 0).all() and (batch.page_table < self.limits.num_pages).all()
        lengths = np.diff(batch.query_start[: n + 1])
        assert (lengths[:num_decode] == 1).all() and (lengths[num_decode:] > 1).all(), "decodes come first"
        assert (batch.row_of_token[used:] == R).all() and (batch.slots[n:] == self.limits.max_num_seqs).all()
        assert (batch.kv_lens[n:] == 0).all() and not batch.samples[n:].any()
        assert len(set(batch.slots[:n].tolist())) == n
        assert 0 not in batch.copies, "the null page is copied"

    def _tables(self, batch: Batch, row: int) -> list[tuple[np.ndarray, int]]:
        """Of each group of layers: a row's page table, and which page of the sequence it begins with."""
        ends = np.cumsum(self.limits.columns)
        return [(batch.page_table[row, end - width : end], int(batch.first_page[row, g]))
                for g, (end, width) in enumerate(zip(ends, self.limits.columns))]  # fmt: skip

    def _write(self, batch: Batch, row: int) -> None:
        K, slot, place = self.limits.page_size, int(batch.slots[row]), int(batch.adapters[row])
        shift = ADAPTED * self.places[place] if place >= 0 else 0
        for i in range(int(batch.query_start[row]), int(batch.query_start[row + 1])):
            assert batch.row_of_token[i] == row
            position = int(batch.positions[i])
            token = int(self.last_token[slot]) if batch.carried[i] else int(batch.tokens[i])
            assert token >= 0, "a token that was never there"
            for table, first in self._tables(batch, row):
                page = int(table[position // K - first])
                assert page > 0, "the null page is written"
                self.cache[page, position % K] = token + shift

    def context(self, batch: Batch, row: int) -> list[int]:
        """What the last token of a row sees: of the groups that see everything, all; of others their last tokens. Where both
        are there they must agree; of groups with a window alone the longest counts."""
        K, length = self.limits.page_size, int(batch.kv_lens[row])
        seen = []
        for reach, (table, first) in zip(self.limits.reaches, self._tables(batch, row)):
            begin = reach.first_seen(length - 1)
            tokens = self.cache[table[begin // K - first : -(-length // K) - first]].reshape(-1)
            seen.append(tokens[begin % K : begin % K + length - begin].tolist())
        longest = max(seen, key=len)
        assert all(not tokens or longest[-len(tokens) :] == tokens for tokens in seen), "groups of layers see different tokens"
        return longest

    def _read_all(self, batch: Batch, num_rows: int) -> Sampled:
        tokens = np.zeros(len(batch.slots), np.int32)
        for row in range(num_rows):
            context = self.context(batch, row)
            assert POISON not in context, "a page was read that nobody has written"
            tokens[row] = successor(context, self.limits.vocab_size)
            if batch.samples[row]:
                self.last_token[batch.slots[row]] = tokens[row]
        logprobs = _paper_logprobs(tokens) if batch.num_logprobs >= 0 else None
        prompt = _paper_logprobs(batch.targets) if batch.prompt_logprobs else None
        pooled = self._pool(batch, num_rows) if batch.pools else None
        return Sampled(tokens, np.ones(len(tokens), bool), logprobs, prompt, pooled)

    def _pool(self, batch: Batch, num_rows: int) -> np.ndarray:
        """Padding rows hold NaN: nobody may look at them."""
        pooled = np.full((2, len(batch.slots), EMBED_DIM), np.nan, np.float32)
        for row in range(num_rows):
            context = self.context(batch, row)
            count = int(batch.query_start[row + 1] - batch.query_start[row])
            states = [hidden_state(context[:end]) for end in range(len(context) - count + 1, len(context) + 1)]
            pooled[:, row] = np.sum(states, axis=0), states[-1]
        return pooled


def _paper_logprobs(tokens: np.ndarray) -> TokenLogprobs:
    """A token's logprob is minus itself, so that a test sees which token it belongs to."""
    one = tokens[:, None].astype(np.int32)
    return TokenLogprobs(-tokens.astype(np.float32), np.ones(len(tokens), np.int32), one, -one.astype(np.float32))
