"""Text that comes in pieces, and how grammars read it.

A grammar is a generator that reads from a `Source` and yields where it cannot go on without more text:

    def greeting(source: Source) -> Reading[str]:
        yield from source.accept("Hello")
        return (yield from source.read(SPACE))

What a read returns depends on the characters alone, never on how they were cut into pieces: that is why a streamed
answer equals the one that is parsed at once. A read consumes all it can, so what waits is never longer than a marker,
and feeding n characters one by one takes O(n).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # yields while it waits for text, returns what it read

SPACE = re.compile(r"\s*")


class Marks:
    """Finds the first of some texts, or what may become one at the end of the text.

    A text of which another one is the beginning is never found: the shorter one is, at once.
    """

    def __init__(self, texts: Iterable[str]):
        self.texts = frozenset(texts)
        self.search = re.compile(_beginning_of(self.texts) if self.texts else "(?!)").search


@lru_cache(maxsize=256)
def marks(texts: frozenset[str]) -> Marks:
    """`Marks(texts)`, compiled once."""
    return Marks(texts)


def _beginning_of(texts: Iterable[str]) -> str:
    """A pattern of each of the texts, whole, or cut by the end of the string: "ab" -> `a(?:b|\\Z)`."""
    tails: dict[str, set[str]] = {}
    for text in texts:
        tails.setdefault(text[0], set()).add(text[1:])
    return "|".join(re.escape(head) + _rest(rests) for head, rests in sorted(tails.items()))


def _rest(tails: set[str]) -> str:
    return "" if "" in tails else rf"(?:{_beginning_of(tails)}|\Z)"


class Source:
    """The text that is not read yet. A grammar may have it kept, from some point on, to give it back later."""

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False  # text[at:] is not read yet; ended: no more will come
        self._kept: list[str] | None = None

    def feed(self, text: str) -> None:
        self.text, self.at = self.text[self.at :] + text, 0

    @property
    def exhausted(self) -> bool:
        return self.ended and self.at == len(self.text)

    # -- what is kept ------------------------------------------------------------------------------------------------------

    def keep(self, text: str = "") -> None:
        """From now on what is read is kept, beginning with `text`; what was kept is forgotten."""
        self._kept = [text]

    def release(self) -> str:
        """What was read since `keep`; nothing is kept any more."""
        kept, self._kept = "".join(self._kept or ()), None
        return kept

    @property
    def clean(self) -> bool:
        """Nothing but whitespace is kept."""
        return not any(text.strip() for text in self._kept or ())

    # -- reading -----------------------------------------------------------------------------------------------------------

    def take(self, end: int) -> str:
        """Reads up to the index `end` of `text`."""
        text, self.at = self.text[self.at : end], end
        if self._kept is not None:
            self._kept.append(text)
        return text

    def peek(self) -> Reading[str]:
        """The next character, which stays unread; "" at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def next(self) -> Reading[str]:
        """Reads one character; "" at the end."""
        yield from self.peek()
        return self.take(min(self.at + 1, len(self.text)))

    def accept(self, *options: str) -> Reading[str | None]:
        """Reads one of the options if the text goes on with it, else nothing. No option may begin with another."""
        longest = max(map(len, options), default=0)
        while True:
            ahead = self.text[self.at : self.at + longest]
            for option in options:
                if ahead.startswith(option):
                    self.take(self.at + len(option))
                    return option
            if self.ended or not any(option.startswith(ahead) for option in options):
                return None
            yield

    def copy(self, characters: re.Pattern[str], sink: Callable[[str], object]) -> Reading[None]:
        """Reads while the text has these characters (a pattern `[...]*`); they go to `sink` as they come."""
        while True:
            end = characters.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches the empty text too
            if end > self.at:
                sink(self.take(end))
            if end < len(self.text) or self.ended:
                return
            yield

    def read(self, characters: re.Pattern[str]) -> Reading[str]:
        """Reads while the text has these characters (a pattern `[...]*`); returns them."""
        parts: list[str] = []
        yield from self.copy(characters, parts.append)
        return "".join(parts)

    def close(self, marker: str) -> Reading[None]:
        """Reads the end marker of what was read as a whole, if it follows; then it is kept no more than that was."""
        if self.clean:
            yield from self.read(SPACE)
            if (yield from self.accept(marker)):
                self.keep()

    def copy_until(self, found: Marks, sink: Callable[[str], object]) -> Reading[str | None]:
        """Reads up to the first mark and past it; what stands before goes to `sink` as it comes. None: the text ended."""
        while True:
            match = found.search(self.text, self.at)
            start = match.start() if match else len(self.text)
            if start > self.at:
                sink(self.take(start))
            if match and match[0] in found.texts:
                return self.take(match.end())
            if not self.ended:
                yield
            elif match:  # it was not the beginning of a mark after all
                sink(self.take(start + 1))
            else:
                return None


class Hidden:
    """Takes some texts out of text that comes in pieces."""

    def __init__(self, texts: Iterable[str]):
        self._source = Source()
        self._shown: list[str] = []
        self._reading = self._read(marks(frozenset(texts)))

    def _read(self, found: Marks) -> Reading[None]:
        while (yield from self._source.copy_until(found, self._shown.append)) is not None:
            pass

    def push(self, text: str, ended: bool = False) -> str:
        self._source.feed(text)
        self._source.ended = ended
        next(self._reading, None)
        shown = "".join(self._shown)
        self._shown.clear()
        return shown
