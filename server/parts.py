"""An answer as a sequence of parts: for the APIs whose answers are lists, of items (Responses) or of blocks (Messages).

The same parts come out however the text was cut on its way: what an answer's events add up to is what it is as a whole.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxpaged.request import CompletionOutput
from jaxpaged.tokenizer import Tokenizer
from jaxpaged_server.parsers import ChatParser, Delta

REASONING, TEXT, CALL = "reasoning", "text", "call"
# A delta does not say whether its content stands before or behind its calls. Calls begin and end beside punctuation, in every
# format, so between pieces as small as these there is no doubt.
PIECE = re.compile(r"[A-Za-z0-9]+|.", re.DOTALL)


class Part(NamedTuple):
    """kind: REASONING, TEXT or CALL. text: what is new; of a call, a fragment of the JSON text of its arguments. id, name:
    where a call begins. tokens, entries: those the text is made of, and their logprobs (if asked for)."""

    kind: str
    text: str
    id: str | None = None
    name: str | None = None
    tokens: tuple[int, ...] = ()
    entries: tuple[Any, ...] = ()


class Placed(NamedTuple):
    """A token, with the bytes [start, end) of the answer's text that it makes."""

    start: int
    end: int
    token: int
    entry: Any


class Parts:
    """Finds the parts of an answer.

    parser: None: all text is TEXT. forced: with what the answer has been made to begin. width: bytes of a token's text.
    """

    def __init__(self, parser: ChatParser | None, forced: str, width: Callable[[int], int]):
        self._parser, self._width = parser, width
        self._waiting: deque[Placed] = deque()  # tokens whose text has not come out of the parser
        self._placed = self._read = 0  # bytes: of the tokens that came, of the text that went into the parser
        self._pending = parser.push(forced) if parser is not None and forced else Delta()

    def push(self, completion: CompletionOutput) -> list[Part]:
        """What a DELTA output adds, or all of a FINAL_ONLY one; in order, two neighbours never the same."""
        self._place(completion)
        return _joined(part for delta in self._parse(completion) for part in self._split(delta))

    def _place(self, completion: CompletionOutput) -> None:
        entries = completion.logprobs or [None] * len(completion.token_ids)
        for token, entry in zip(completion.token_ids, entries):
            start, self._placed = self._placed, self._placed + self._width(token)
            self._waiting.append(Placed(start, self._placed, token, entry))

    def _parse(self, completion: CompletionOutput) -> Iterator[Delta]:
        if self._parser is None:
            self._read += len(completion.text.encode())
            yield Delta(completion.text)
            return
        yield self._pending
        self._pending = Delta()
        for piece in PIECE.findall(completion.text):
            self._read += len(piece.encode())
            yield self._parser.push(piece)
        if completion.finish_reason is not None:
            yield self._parser.finish()

    def _split(self, delta: Delta) -> Iterator[Part]:
        for kind, text in ((REASONING, delta.reasoning), (TEXT, delta.content)):
            if text:
                tokens = self._take(len(text.encode()))
                yield Part(kind, text, tokens=tuple(t.token for t in tokens), entries=tuple(t.entry for t in tokens))
        for call in delta.tool_calls:
            yield Part(CALL, call.arguments, call.id, call.name)

    def _take(self, size: int) -> list[Placed]:
        """The tokens of the last `size` bytes that were read. Those before them, which made markers or calls, are dropped."""
        taken = []
        while self._waiting and self._waiting[0].start < self._read:
            placed = self._waiting.popleft()
            if placed.end > self._read - size:
                taken.append(placed)
        return taken


def _joined(parts: Iterator[Part]) -> list[Part]:
    out: list[Part] = []
    for part in parts:
        if out and out[-1].kind == part.kind and part.id is None:
            before = out[-1]
            texts, tokens, entries = before.text + part.text, before.tokens + part.tokens, before.entries + part.entries
            out[-1] = before._replace(text=texts, tokens=tokens, entries=entries)
        else:
            out.append(part)
    return out


def widths(tokenizer: Tokenizer | None, skip_special_tokens: bool) -> Callable[[int], int]:
    """How many bytes a token's text has."""
    hidden = tokenizer.special_ids if tokenizer is not None and skip_special_tokens else frozenset()
    return lambda token: 0 if tokenizer is None or token in hidden else len(tokenizer.token_bytes(token))
