"""Token ids in, text out, as they come: UTF-8 assembly, and stop strings.

Imports nothing of jaxpaged: the tokenizer and the parameters are only read.

Most tokenizers spell every token as bytes (`Pieces`), whatever stands around it; then text is an incremental UTF-8
decode: O(bytes of the token), and exact. For the others `_Windowed` decodes a short window twice and takes the
difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

REPLACEMENT = "\ufffd"
BYTEWISE = "jaxpaged.bytewise"  # one U+FFFD for each byte that is not UTF-8, as SentencePiece has it
codecs.register_error(BYTEWISE, lambda e: (REPLACEMENT * (e.end - e.start), e.end))  # type: ignore[attr-defined]


class Delta(NamedTuple):
    """text: what is new. stop: the stop string that ended the text, None while it goes on."""

    text: str
    stop: str | None = None


class Pieces:
    """The bytes of each token. `piece_of(id)` computes them once; ids without a token have none.

    errors: how bytes that are not UTF-8 become text. strip: one leading space of the whole text is dropped.
    """

    def __init__(self, piece_of: Callable[[int], bytes], errors: str = "replace", strip: bool = False):
        self.piece_of, self.errors, self.strip = piece_of, errors, strip
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self.piece_of(token)
        return piece

    def join(self, ids: Sequence[int], skip: frozenset[int]) -> str:
        """The text of a whole sequence, without the tokens in `skip`."""
        data = b"".join([self[i] for i in ids if i not in skip])
        if self.strip and data[:1] == b" ":
            data = data[1:]
        return data.decode("utf-8", self.errors)


class _Assembler:
    """Incremental `Pieces.join`: what it returns, joined, is the text of prompt and output less the prompt's text. A
    character that the prompt's last tokens began belongs to the output."""

    def __init__(self, pieces: Pieces, skip: frozenset[int], prompt: Sequence[int]):
        self.pieces, self.skip = pieces, skip
        self.decoder = codecs.getincrementaldecoder("utf-8")(pieces.errors)
        self.decoder.decode(self._last_bytes(prompt))  # its text is the prompt's; an open character stays inside
        self.first = pieces.strip and not any(i not in skip and pieces[i] for i in prompt)

    def _last_bytes(self, prompt: Sequence[int]) -> bytes:
        data = b""
        for token in reversed(prompt):
            if len(data) >= 3:  # an open character has at most 3 bytes
                break
            if token not in self.skip:
                data = self.pieces[token] + data
        return data[-3:]

    def push(self, token: int) -> str:
        if token in self.skip:
            return ""
        piece = self.pieces[token]
        if self.first and piece:
            self.first = False
            piece = piece[1:] if piece[:1] == b" " else piece
        if piece.isascii() and not self.decoder.buffer:  # nearly always, and four times as fast
            return piece.decode()
        return self.decoder.decode(piece)

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class _Windowed:
    """For decoders that are not a mapping of tokens to bytes: the text of a window of tokens, less the text of its
    older part. The window moves on when the newer part is whole characters, or is too long to be one."""

    PROMPT, LONGEST = 6, 16  # tokens of the prompt that give context; tokens of an unfinished character, at most

    def __init__(self, decode: Callable[[list[int]], str], skip: frozenset[int], prompt: Sequence[int]):
        self.decode, self.skip = decode, skip
        self.window = [i for i in prompt[-4 * self.PROMPT :] if i not in skip][-self.PROMPT :]
        self.old = len(self.window)

    def push(self, token: int) -> str:
        if token in self.skip:
            return ""
        self.window.append(token)
        text = self._new()
        if text.endswith(REPLACEMENT) and len(self.window) - self.old < self.LONGEST:
            return ""
        self.window, self.old = self.window[self.old :], len(self.window) - self.old
        return text

    def _new(self) -> str:
        return self.decode(self.window)[len(self.decode(self.window[: self.old])) :]

    def flush(self) -> str:
        text = self._new()
        self.old = len(self.window)
        return text


class StopStrings:
    """Finds the stop string that ends first, and holds back text that may turn out to begin one.

    Among stop strings that end at the same character, the first of the list wins. With `include`, the stop string is
    part of the text, so nothing is held back.
    """

    def __init__(self, stops: Sequence[str], include: bool):
        self.stops, self.include = stops, include
        self.firsts = {stop[0] for stop in stops}
        self.reach = max(map(len, stops), default=1) - 1  # characters of earlier text a match can begin in
        self.tail = ""  # the last `reach` characters, of which
        self.held = 0  # the last `held` are not out yet

    def push(self, text: str, counts: bool) -> Delta:
        """What may be shown now that `text` has come. counts: a stop string that ends within it ends the text."""
        if not self.stops:
            return Delta(text)
        seen, window = len(self.tail), self.tail + text
        start = seen - self.held
        found = self._find(window, seen) if counts and text else None
        if found is not None:
            end, stop = found
            self.tail, self.held = "", 0
            return Delta(window[start : end if self.include else end - len(stop)], stop)
        self.held = 0 if self.include else self._open(window, start)
        self.tail = window[-self.reach :] if self.reach else ""
        return Delta(window[start : len(window) - self.held])

    def _find(self, window: str, seen: int) -> tuple[int, str] | None:
        best = None
        for stop in self.stops:
            at = window.find(stop, max(0, seen - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = at + len(stop), stop
        return best

    def _open(self, window: str, start: int) -> int:
        """Length of the longest end of the window that begins a stop string."""
        for at in range(max(start, len(window) - self.reach), len(window)):
            if window[at] in self.firsts:
                end = window[at:]
                if any(stop.startswith(end) and len(stop) > len(end) for stop in self.stops):
                    return len(end)
        return 0

    def flush(self) -> str:
        text = self.tail[len(self.tail) - self.held :]
        self.held = 0
        return text


class Detokenizer:
    """The text of one sequence while its tokens come in.

    tokenizer: its `pieces` (or, without them, its `backend`) and `special_ids` are read. prompt_ids: the context: the
    text is that of prompt and output together, less the prompt's. params: SamplingParams, of which `detokenize`,
    `skip_special_tokens`, `stop`, `include_stop_str_in_output` and `min_tokens` are read.
    `spaces_between_special_tokens` has no effect: it belongs to tokenizers that join tokens by spaces.

    push: O(length of the new text and of the stop strings) a token. A character that is not complete, or the possible
    beginning of a stop string, is held back until a later push or `finish`. A stop string counts when it is completed
    after the first `min_tokens` tokens (as in vLLM, one completed by token `min_tokens` itself does not count).

    The token that ended a sequence (EOS, a stop token id) is to be pushed only if it is to be seen: with
    skip_special_tokens=False and include_stop_str_in_output=True.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], params: Any):
        self.stop: str | None = None
        self._on = params.detokenize
        self._min, self._count = params.min_tokens, 0
        self._parts: list[str] = []
        if not self._on:
            return
        skip = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._stops = StopStrings(tuple(params.stop or ()), params.include_stop_str_in_output)
        if tokenizer.pieces is not None:
            self._text: _Assembler | _Windowed = _Assembler(tokenizer.pieces, skip, prompt_ids)
        else:
            decode = tokenizer.backend.decode  # has no text, and no error, for ids without a token
            self._text = _Windowed(lambda ids: decode(ids, skip_special_tokens=False), skip, prompt_ids)

    @property
    def text(self) -> str:
        """All text so far, cut at a stop string."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, ids: Sequence[int]) -> Delta:
        """The text that `ids` add. Tokens after a stop string are ignored."""
        if not self._on or self.stop is not None:
            return Delta("", self.stop)
        out = []
        for token in ids:
            self._count += 1
            out.append(self._show(self._text.push(token)))
            if self.stop is not None:
                break
        return Delta("".join(out), self.stop)

    def _show(self, text: str) -> str:
        shown = text
        if self._stops.stops:
            shown, self.stop = self._stops.push(text, self._count > self._min)
        if shown:
            self._parts.append(shown)
        return shown

    def finish(self) -> str:
        """What was held back: the sequence has ended. Incomplete characters become U+FFFD."""
        if not self._on or self.stop is not None:
            return ""
        shown = self._show(self._text.flush())
        if self.stop is None:
            rest = self._stops.flush()
            self._parts.append(rest)
            shown += rest
        return shown
