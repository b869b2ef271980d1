"""Reasoning formats: the text that a model thinks aloud, between two markers, before its answer."""

from __future__ import annotations

from typing import NamedTuple

from jaxpaged_server.parsers.output import Output
from jaxpaged_server.parsers.source import SPACE, Reading, Source, marks


class ReasoningFormat(NamedTuple):
    """assumed: without a word from the prompt, the text begins inside the reasoning."""

    start: str
    end: str
    assumed: bool

    @property
    def markers(self) -> tuple[str, ...]:
        return self.start, self.end

    def begins_inside(self, prompt_end: str) -> bool:
        """Only what the prompt ends in counts: what stands before may be the user's."""
        prompt = prompt_end.rstrip()
        return prompt.endswith(self.start) or (self.assumed and not prompt.endswith(self.end))


def read_reasoning(source: Source, out: Output, form: ReasoningFormat, inside: bool) -> Reading[str]:
    """Reads the reasoning, if there is some. Returns whitespace that was read and belongs to the answer."""
    lead = yield from source.read(SPACE)
    opened = yield from source.accept(form.start)
    if not opened and not inside:
        return lead
    out.marked = True
    lead = ("" if opened else lead) + (yield from source.read(SPACE))
    if not source.exhausted and not (yield from source.accept(form.end)):
        out.reasoning.append(lead)
        yield from source.copy_until(marks(frozenset([form.end])), out.reasoning.append)
    return ""


REASONING_PARSERS = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", assumed=True),
    "qwen3": ReasoningFormat("<think>", "</think>", assumed=False),
}
