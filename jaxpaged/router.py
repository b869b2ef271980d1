"""Which of several engines gets a request: pure bookkeeping, without a clock, a thread or a model.

    router = Router(num_engines=2, page_size=16, num_pages=1000, max_num_seqs=64)
    route = router.route(prompt, params)          # changes nothing
    engines[route.engine].submit("a", prompt, params)
    router.began("a", route)
    router.ended("a")

The rule. A request goes to the engine with the least cost: the tokens that the engine has still to compute (its load), and
those of the prompt that it does not remember. So a prefix is followed exactly as long as the engine that remembers it is not
further behind the least busy one than what it saves: nobody waits longer for a cache than the cache is worth, and a prefix
that everybody has is soon remembered everywhere. Among equals the one that has been given the least so far: caches fill evenly.

What an engine remembers is a guess: prefixes of the prompts that it was sent, the least recently used forgotten first, as many
tokens as its cache has room for. Its load is one too: prompt tokens that it has been sent and not computed, and tokens that it
is likely to generate; these count less for sequences that run, as a token beside others costs little, than for those that have
to wait for a seat.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxpaged.adapter import Adapter
from jaxpaged.request import PoolingParams, SamplingParams

TYPICAL_OUTPUT = 256  # tokens that a sample is expected to have at most: how many there will be nobody knows
RUNNING = 0.25  # how much a token counts that will be generated beside others
EXACT = 16  # blocks: prefixes up to here are known to the block, longer ones to an eighth of their length
TOKEN_BYTES = 4  # of an id, and of a token of text, more or less


class Mark(NamedTuple):
    """A prefix of a prompt: a hash that says everything up to its end, and its length in blocks."""

    key: bytes
    num_blocks: int


class Route(NamedTuple):
    """Where a request should go. tokens: of its prompt, more or less. matched: those that the engine remembers. output: tokens
    that it is expected to generate, in `sequences` sequences."""

    engine: int
    tokens: int = 0
    matched: int = 0
    output: int = 0
    sequences: int = 1
    marks: tuple[Mark, ...] = ()

    @property
    def missing(self) -> int:
        """Tokens of the prompt to compute."""
        return self.tokens - self.matched


class Router:
    """Routes for `num_engines` engines that are alike: `num_pages` pages of `page_size` tokens each (0: they have no prefix
    cache), seats for `max_num_seqs` sequences. Its memory is bounded by that; belongs to one thread."""

    def __init__(self, num_engines: int, page_size: int, num_pages: int, max_num_seqs: int):
        self._page_size = page_size
        self._engines = [_Engine(_Memory(num_pages), max_num_seqs) for _ in range(num_engines)]
        self._routes: dict[str, Route] = {}  # of the requests that have not ended

    def route(self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams, cache_salt: str = "",
              adapter: Adapter | None = None) -> Route:  # fmt: skip
        """Where a request should go, whose prompt is text or ids. Prefixes are shared within a salt and an adapter only."""
        if len(self._engines) == 1:
            return Route(0)
        words = _words(prompt)
        salt = cache_salt if adapter is None else f"{cache_salt}\0{adapter.key}"
        marks = tuple(_marks(words, self._page_size * TOKEN_BYTES, salt))
        num_tokens = len(words) // TOKEN_BYTES
        matched = [engine.memory.longest(marks) * self._page_size for engine in self._engines]
        cost = lambda i: (self._engines[i].load + num_tokens - matched[i], self._engines[i].given, i)
        best = min(range(len(matched)), key=cost)
        return Route(best, num_tokens, matched[best], *_expected_output(params), marks)

    def began(self, request_id: str, route: Route) -> None:
        """The request has been sent where the route leads."""
        engine = self._engines[route.engine]
        engine.backlog += route.missing
        engine.output += route.output
        engine.given += route.missing
        engine.num_live += route.sequences
        engine.memory.note(route.marks)
        self._routes[request_id] = route

    def computed(self, engine: int, num_tokens: int) -> None:
        """An engine has computed so many tokens."""
        one = self._engines[engine]
        one.backlog = max(0, one.backlog - num_tokens)

    def ended(self, request_id: str, computed: bool = True) -> None:
        """The request has ended, however that was. computed: its prompt has been. Unknown ids are ignored."""
        route = self._routes.pop(request_id, None)
        if route is None:
            return
        engine = self._engines[route.engine]
        engine.output -= route.output
        engine.num_live -= route.sequences
        if not computed:
            engine.backlog = max(0, engine.backlog - route.missing)
        if not engine.num_live:
            engine.backlog = 0

    def forget(self) -> None:
        """The engines' caches have been emptied."""
        for engine in self._engines:
            engine.memory.clear()

    def engine_of(self, request_id: str) -> int | None:
        """Where a request was sent; None if it has ended."""
        route = self._routes.get(request_id)
        return None if route is None else route.engine

    @property
    def loads(self) -> list[float]:
        """Of each engine, in tokens."""
        return [engine.load for engine in self._engines]

    @property
    def num_remembered(self) -> list[int]:
        """Blocks of each engine."""
        return [engine.memory.size for engine in self._engines]


class _Engine:
    """What is known of an engine. backlog: prompt tokens to compute; output: tokens that its `num_live` sequences are expected
    to generate; given: tokens since the start."""

    def __init__(self, memory: _Memory, seats: int):
        self.memory, self.seats = memory, seats
        self.backlog = self.output = self.given = self.num_live = 0

    @property
    def load(self) -> float:
        running = min(1.0, self.seats / max(1, self.num_live))  # the part of the sequences that have a seat
        return self.backlog + self.output * (RUNNING * running + 1 - running)


class _Memory:
    """The prefixes that were used last, of `most` blocks together. A mark stands for the blocks from the one before it on."""

    def __init__(self, most: int):
        self.most, self.size = most, 0
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first

    def longest(self, marks: Sequence[Mark]) -> int:
        """Blocks of the longest one that is remembered."""
        return next((mark.num_blocks for mark in reversed(marks) if mark.key in self._blocks), 0)

    def note(self, marks: Sequence[Mark]) -> None:
        """They are used now; a beginning outlives what follows it."""
        before = [0, *(mark.num_blocks for mark in marks)]
        for mark, start in zip(reversed(marks), reversed(before[:-1])):
            self.size += mark.num_blocks - start - self._blocks.pop(mark.key, 0)
            self._blocks[mark.key] = mark.num_blocks - start
        while self.size > self.most:
            self.size -= self._blocks.popitem(last=False)[1]

    def clear(self) -> None:
        self._blocks.clear()
        self.size = 0


def _words(prompt: str | Sequence[int]) -> bytes:
    """What is compared; nothing of a prompt that is none, which the engine will refuse."""
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    try:
        return array("i", prompt).tobytes()
    except (TypeError, ValueError, OverflowError):
        return b""


def _marks(words: bytes, block: int, salt: str) -> Iterator[Mark]:
    """Of a prompt's full blocks. Few, however long it is: a hash for each of 8,000 blocks would hold up the event loop."""
    so_far, done = hashlib.blake2b(salt.encode("utf-8", "surrogatepass") + b"\0", digest_size=16), 0
    for num_blocks in _lengths(len(words) // block):
        so_far.update(words[done * block : num_blocks * block])
        done = num_blocks
        yield Mark(so_far.copy().digest(), num_blocks)


def _lengths(most: int) -> Iterator[int]:
    """1, 2, 3, ... EXACT, then each an eighth longer than the one before: the same for all prompts."""
    length = 1
    while length <= most:
        yield length
        length += 1 if length < EXACT else length // 8


def _expected_output(params: Any) -> tuple[int, int]:
    """(tokens, sequences)."""
    if not isinstance(params, SamplingParams):
        return 0, 1
    return params.n * min(TYPICAL_OUTPUT, params.max_tokens or TYPICAL_OUTPUT), params.n
