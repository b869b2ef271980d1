"""Requests for a simulation: a trace's, or made up.

A trace is a JSONL file, an object a line, or a CSV file with a header. Names that are understood, those of public traces:
  timestamp (Mooncake: milliseconds), TIMESTAMP (Azure: a date with a time), arrival_time (seconds)
  input_length, ContextTokens, prompt_tokens, prompt_len;  output_length, GeneratedTokens, output_tokens, output_len
  hash_ids (Mooncake): a number for each 512 tokens of the prompt; where two requests begin with the same, so do their prompts
"synthetic:prompt=512,output=128,n=500" makes requests of one length.
"""

from __future__ import annotations

import csv
import json
import reprlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpaged.request import RequestError, refuse_unknown

HASHED = 512  # tokens that a hash_id stands for, in Mooncake's traces
INPUTS = ("input_length", "ContextTokens", "prompt_tokens", "prompt_len")
OUTPUTS = ("output_length", "GeneratedTokens", "output_tokens", "output_len")
SYNTHETIC = {"prompt": 512, "output": 128, "n": 500}
MOST = 10_000_000  # tokens of a request, or requests: what is more is a mistake, and would not fit in memory
LATEST = 1e18  # seconds, either way: what is more is a mistake, and nanoseconds of our time are less


class Traced(NamedTuple):
    """at: seconds from the trace's beginning; None: it does not say. hashes: see the module's text."""

    at: float | None
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()


def read(trace: str, most: int | None = None) -> list[Traced]:
    """The requests in the order of their times; `most`: no more than so many. RequestError names the line that is wrong."""
    if most is not None and most < 1:
        raise RequestError(f"num_requests must be a positive integer, got {most}; leave it out to take all.", "num_requests")
    if trace.startswith("synthetic:"):
        return _synthetic(trace.partition(":")[2])[:most]
    path = Path(trace)
    try:
        lines = list(_lines(path))
        found = [_traced(path, number, line) for number, line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{trace} cannot be read as a trace: {error}; or give synthetic:prompt=512,output=128,n=500.",
                           "simulate") from None  # fmt: skip
    if not found:
        raise RequestError(f"{trace} has no requests.", "simulate")
    if any(request.at is None for request in found):
        return [request._replace(at=None) for request in found[:most]]
    found.sort(key=lambda request: request.at or 0.0)
    first = found[0].at or 0.0
    return [request._replace(at=(request.at or 0.0) - first) for request in found[:most]]


def _synthetic(text: str) -> list[Traced]:
    values = dict(SYNTHETIC)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        refuse_unknown("a synthetic trace", [name], list(SYNTHETIC))
        values[name] = _positive("synthetic", name, value)
    return [Traced(None, values["prompt"], values["output"])] * values["n"]


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and fields of each line. (utf-8-sig: a mark that some programs put first would be part of the first name.)"""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(file), 2)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(path, number, line)


def _object(path: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{path}, line {number}: not JSON ({error}).", "simulate") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path}, line {number}: an object is needed, such as "
                           '{"timestamp": 0, "input_length": 512, "output_length": 128}.', "simulate")  # fmt: skip
    return found


def _traced(path: Path, number: int, line: Mapping[str, Any]) -> Traced:
    where = f"{path}, line {number}"
    hashes = line.get("hash_ids") or ()
    if not isinstance(hashes, (list, tuple)) or not all(isinstance(h, int) for h in hashes):
        raise RequestError(f"{where}: hash_ids must be a list of integers.", "simulate")
    return Traced(_time(where, line), _count(where, line, INPUTS), _count(where, line, OUTPUTS), tuple(hashes))


def _count(where: str, line: Mapping[str, Any], names: tuple[str, ...]) -> int:
    name = next((name for name in names if name in line), None)
    if name is None:
        raise RequestError(f"{where}: one of {', '.join(names)} is needed; it has {', '.join(map(str, line)) or 'nothing'}.",
                           "simulate")  # fmt: skip
    return _positive(where, name, line[name])


def _positive(where: str, name: str, value: Any) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        found = 0
    if not 0 < found <= MOST:
        raise RequestError(f"{where}: {name} must be a positive integer of at most {MOST:,}, got {reprlib.repr(value)}.",
                           "simulate")  # fmt: skip
    return found


TIMES = {  # seconds of what stands there
    "timestamp": lambda value: float(value) / 1000,
    "arrival_time": float,
    "TIMESTAMP": lambda value: datetime.fromisoformat(value).timestamp(),
}


def _time(where: str, line: Mapping[str, Any]) -> float | None:
    name = next((name for name in TIMES if name in line), None)
    if name is None:
        return None
    try:
        seconds = TIMES[name](line[name])
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{where}: its time cannot be read ({name}: {error}).", "simulate") from None
    if not abs(seconds) < LATEST:  # nor NaN
        raise RequestError(f"{where}: its time cannot be read ({name}: {line[name]!r} is not finite).", "simulate")
    return seconds


# -- what the scheduler is given -------------------------------------------------------------------------------------------


def arrivals(requests: list[Traced], rate: float, own: bool, seed: int) -> np.ndarray:
    """Seconds, [n], `rate` requests a second on average: the trace's own times stretched, or Poisson's, which are the same
    draws for every rate."""
    count = len(requests)
    if own:
        times = np.array([request.at for request in requests], float)
        return times / times[-1] * ((count - 1) / rate) if count > 1 and times[-1] > 0 else times
    return np.cumsum(np.random.default_rng(seed).exponential(1.0, count)) / rate


def own_rate(requests: list[Traced]) -> float | None:
    """Requests a second, as recorded; None where the trace has no times."""
    last = requests[-1].at
    return (len(requests) - 1) / last if last and len(requests) > 1 else None


def tokens(number: int, request: Traced, vocab_size: int) -> np.ndarray:
    """A prompt of request `number`: random words that no other has, but where hash_ids say that they are the same."""
    if not request.hashes:
        return np.random.default_rng((1, number)).integers(0, vocab_size, request.prompt)
    blocks = [np.random.default_rng((0, abs(h))).integers(0, vocab_size, HASHED) for h in request.hashes]
    known = np.concatenate(blocks)[: request.prompt]
    rest = np.random.default_rng((1, number)).integers(0, vocab_size, request.prompt - len(known))
    return np.concatenate([known, rest])
