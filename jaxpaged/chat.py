"""A conversation in the terminal: reads a line, streams the answer, keeps both. The prompt's pages of earlier turns are
still in the prefix cache, so a turn computes little more than what is new."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.request import RequestError, RequestOutput, RequestOutputKind, SamplingParams

HELP = "/reset begins anew, /undo takes the last turn back, /quit (or Ctrl-D) ends, Ctrl-C stops an answer."


class Conversation:
    """Messages so far and the engine that answers. `llm`: a jaxpaged.LLM. `write`: where text goes."""

    def __init__(self, llm: Any, params: SamplingParams, system: str | None = None, stats: bool = True,
                 write: Callable[[str], Any] = sys.stdout.write):  # fmt: skip
        self.llm, self.stats, self.write = llm, stats, write
        self.params = params.clone(n=1, output_kind=RequestOutputKind.DELTA)
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self.system)
        self._ids = itertools.count()

    def run(self) -> None:
        """Until /quit or the end of the input."""
        try:
            import readline  # noqa: F401  (line editing and history for input())
        except ImportError:
            pass
        self.write(f"{HELP}\n")
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                self.write(f"\n{HELP}\n")
                continue
            if line in ("/quit", "/exit"):
                break
            self._take(line)

    def _take(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self.system)
        elif line == "/undo":
            del self.messages[max(len(self.system), len(self.messages) - 2) :]
        elif line.startswith("/"):
            self.write(f"{HELP}\n")
        elif line:
            try:
                self.answer(line)
            except RequestError as error:
                self.write(f"{error}\n")

    def answer(self, text: str) -> str:
        """Streams the answer to `text` and returns it. RequestError, and nothing is kept, if it cannot be answered.
        Ctrl-C ends the answer; what has come is kept."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.get_tokenizer().apply_chat_template(asked, chat_template=self.llm.config.chat_template)
        start, parts, last = time.perf_counter(), [], None
        for output in self._stream(prompt):
            last = output
            parts += [completion.text for completion in output.outputs]
            self.write(parts[-1] if parts else "")
            sys.stdout.flush()
        self.write("\n")
        if last is not None and last.error is not None:
            raise RequestError(f"the answer failed: {last.error}")
        self.messages = [*asked, {"role": "assistant", "content": "".join(parts)}]
        if self.stats and last is not None:
            self.write(_summary(last, time.perf_counter() - start) + "\n")
        return "".join(parts)

    def _stream(self, prompt: list[int]) -> Iterator[RequestOutput]:
        engine, request_id = self.llm.engine, f"chat-{next(self._ids)}"
        engine.submit(request_id, prompt, self.params)
        try:
            while engine.has_work:
                yield from engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            engine.abort(request_id)
            while engine.has_work:
                engine.step()


def _summary(last: RequestOutput, seconds: float) -> str:
    tokens = last.metrics.num_generation_tokens
    return (f"[{len(last.prompt_token_ids)} tokens of prompt, {last.num_cached_tokens} of them cached; {tokens} new in "
            f"{seconds:.1f} s: {tokens / seconds:.1f} tokens/s]")  # fmt: skip
