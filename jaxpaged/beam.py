"""Beam search above the engine, as in vLLM: every step asks for the best continuations of each beam. A beam's tokens so
far are its prompt, whose pages are cached: beams share them, and a step computes little more than one token a beam."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxpaged.request import BeamSearchParams, RequestOutput, SamplingParams


@dataclass(frozen=True)
class BeamSearchSequence:
    """tokens: prompt and output; cum_logprob: of the output, in nats."""

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """The best sequences, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


Generate = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


def beam_search(
    generate: Generate, prompt: Sequence[int], params: BeamSearchParams, eos_ids: frozenset[int]
) -> BeamSearchOutput:
    """`generate`: runs one step for several prompts. Returns `beam_width` sequences by length-penalised score."""
    stop = frozenset() if params.ignore_eos else eos_ids
    step = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True,
                          detokenize=False)  # fmt: skip
    beams, ended = [BeamSearchSequence(list(prompt))], []
    for _ in range(params.max_tokens):
        outputs = generate([beam.tokens for beam in beams], step)
        grown = [new for beam, output in zip(beams, outputs) for new in _grow(beam, output, stop)]
        ended += [beam for beam in grown if beam.finish_reason]
        going = [beam for beam in grown if not beam.finish_reason]
        beams = sorted(going, key=lambda beam: -beam.cum_logprob)[: params.beam_width]
        if not beams:
            break
    ended += [BeamSearchSequence(b.tokens, b.cum_logprob, finish_reason="length") for b in beams]
    ended.sort(key=lambda beam: _score(beam, len(prompt), params.length_penalty, stop), reverse=True)
    return BeamSearchOutput(ended[: params.beam_width])


def _grow(beam: BeamSearchSequence, output: RequestOutput, stop: frozenset[int]) -> list[BeamSearchSequence]:
    if output.error is not None:
        raise RuntimeError(f"beam search: {output.error}")
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return [
        BeamSearchSequence([*beam.tokens, token], beam.cum_logprob + entry.logprob, None, "stop" if token in stop else None)
        for token, entry in logprobs[0].items()
    ]


def _score(beam: BeamSearchSequence, num_prompt: int, penalty: float, stop: frozenset[int]) -> float:
    """Wu et al. 2016 without the constant: logprob / length ** penalty; an EOS does not count."""
    length = len(beam.tokens) - (beam.tokens[-1] in stop)
    return beam.cum_logprob / max(length, 1) ** penalty
