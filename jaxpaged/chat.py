"""A conversation in the terminal: reads a line, streams the answer, keeps both. The model is in this process (its prefix
cache still has the pages of earlier turns, so a turn computes little more than what is new) or behind a URL (remote.py)."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from jaxpaged.request import RequestError, RequestOutput, RequestOutputKind, SamplingParams

HELP = "/reset begins anew, /undo takes the last turn back, /quit (or Ctrl-D) ends, Ctrl-C stops an answer."
DIM, PLAIN = "\033[2m", "\033[0m"


class Usage(NamedTuple):
    """Tokens of an answer. cached: of the prompt; None where a server does not say."""

    prompt: int
    cached: int | None
    generated: int


class Piece(NamedTuple):
    """What is new in a streamed answer. reasoning: thoughts of the model, shown but not kept. usage: up to now."""

    text: str = ""
    reasoning: str = ""
    usage: Usage | None = None


Pieces = Generator[Piece, None, None]  # to close it ends the work on the answer


def say(text: str) -> None:
    """Shows text at once."""
    print(text, end="", flush=True)


class Dialogue:
    """Messages so far, and commands. A subclass says who answers: `_stream`. write: where text goes."""

    def __init__(self, system: str | None = None, stats: bool = True, write: Callable[[str], Any] = say):
        self.stats, self.write = stats, write
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self.system)

    def _stream(self, messages: list[dict[str, str]]) -> Pieces:
        """The answer to `messages`, as it comes. RequestError if they cannot be answered."""
        raise NotImplementedError

    def run(self) -> None:
        """Until /quit or the end of the input."""
        read_lines(self._take, HELP, self.write)

    def _take(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self.system)
        elif line == "/undo":
            del self.messages[max(len(self.system), len(self.messages) - 2) :]
        elif line.startswith("/"):
            self.write(f"{HELP}\n")
        elif line:
            self.answer(line)

    def answer(self, text: str) -> str:
        """Streams the answer to `text` and returns it. RequestError, and nothing is kept, if it cannot be answered.
        Ctrl-C ends the answer; what has come is kept."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = show(self._stream(asked), self.write, self.stats)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer


class Conversation(Dialogue):
    """With a model in this process. llm: a jaxpaged.LLM."""

    def __init__(self, llm: Any, params: SamplingParams, system: str | None = None, stats: bool = True,
                 write: Callable[[str], Any] = say):  # fmt: skip
        super().__init__(system, stats, write)
        self.llm = llm
        self.params = params.clone(n=1, output_kind=RequestOutputKind.DELTA)
        self._ids = itertools.count()

    def _stream(self, messages: list[dict[str, str]]) -> Pieces:
        prompt = self.llm.get_tokenizer().apply_chat_template(messages, chat_template=self.llm.config.chat_template)
        engine, request_id = self.llm.engine, f"chat-{next(self._ids)}"
        engine.submit(request_id, prompt, self.params)
        try:
            while engine.has_work:
                yield from map(_piece, engine.step())
        finally:
            engine.abort(request_id)
            while engine.has_work:
                engine.step()


def _piece(output: RequestOutput) -> Piece:
    if output.error is not None:
        raise RequestError(f"the answer failed: {output.error}")
    usage = Usage(len(output.prompt_token_ids), output.num_cached_tokens, output.metrics.num_generation_tokens)
    return Piece("".join(completion.text for completion in output.outputs), usage=usage)


def talk(dialogue: Dialogue, message: str | None) -> None:
    """Answers the one message, or goes on until the user ends it."""
    if message is not None:
        dialogue.answer(message)
    else:
        dialogue.run()


def read_lines(take: Callable[[str], Any], help: str, write: Callable[[str], Any]) -> None:
    """Gives the user's lines to `take` until /quit or the end of the input. A line that cannot be served is said."""
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass
    write(f"{help}\n")
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            write(f"\n{help}\n")
            continue
        if line in ("/quit", "/exit"):
            break
        try:
            take(line)
        except (RequestError, ConnectionError) as error:
            write(f"{error}\n")


def show(pieces: Pieces, write: Callable[[str], Any], stats: bool) -> str:
    """Writes an answer as it comes, thoughts dimmed, then a line of figures; returns its text. Ctrl-C ends it early."""
    start, usage, parts, thinking = time.perf_counter(), None, [], False
    try:
        for piece in pieces:
            usage = piece.usage or usage
            if piece.reasoning:
                write(_dim(piece.reasoning))
                thinking = True
            if piece.text:
                write("\n\n" * thinking + piece.text)
                parts.append(piece.text)
                thinking = False
    except KeyboardInterrupt:
        pass
    finally:
        pieces.close()
        if parts or thinking:
            write("\n")
    if stats and usage is not None:
        write(_summary(usage, time.perf_counter() - start) + "\n")
    return "".join(parts)


def _dim(text: str) -> str:
    return f"{DIM}{text}{PLAIN}" if sys.stdout.isatty() else text


def _summary(usage: Usage, seconds: float) -> str:
    cached = "" if usage.cached is None else f", {usage.cached} of them cached"
    return (f"[{usage.prompt} tokens of prompt{cached}; {usage.generated} new in {seconds:.1f} s: "
            f"{usage.generated / seconds:.1f} tokens/s]")  # fmt: skip
