"""Many replicas' answers to the same request as one: metrics side by side, counts added, the first refusal of any."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxpaged.ray.calls import Answer

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?( .*)$")  # name, labels, value and time
FAMILY = re.compile(r"^# (?:HELP|TYPE) (\S+)")


def gathered(answers: Sequence[Answer]) -> Answer:
    """One answer. 503 if there is no replica."""
    if not answers:
        body = {"error": {"message": "there is no replica that could answer.", "type": "ServiceUnavailableError",
                          "param": None, "code": 503}}  # fmt: skip
        return Answer("", 503, [(b"content-type", b"application/json")], json.dumps(body).encode())
    for answer in answers:
        if answer.status >= 400:
            return answer
    first, kind = answers[0], _media_type(answers[0])
    if kind == "application/json":
        return _with_body(first, json.dumps(_sum([json.loads(one.body) for one in answers])).encode())
    if first.body.startswith(b"# HELP"):
        return _with_body(first, merged_metrics({one.replica: one.body.decode() for one in answers}).encode())
    return first


def _media_type(answer: Answer) -> str:
    return next((value.decode() for name, value in answer.headers if name.lower() == b"content-type"), "").partition(";")[0]


def _with_body(answer: Answer, body: bytes) -> Answer:
    headers = [(name, value) for name, value in answer.headers if name.lower() != b"content-length"]
    return Answer("", answer.status, [*headers, (b"content-length", str(len(body)).encode())], body)


def _sum(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of objects: numbers are added, anything else is the first one's."""
    return {name: sum(one[name] for one in values) if isinstance(value, (int, float)) else value
            for name, value in values[0].items()}  # fmt: skip


def merged_metrics(texts: dict[str, str]) -> str:
    """Expositions in Prometheus' text format by replica, as one: each sample gets a label `replica`; families stay together."""
    heads, samples = dict[str, list[str]](), dict[str, list[str]]()
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if (named := FAMILY.match(line)) is not None:
                family = named[1]
                head = heads.setdefault(family, [])
                head += [] if line in head else [line]
            elif (sample := SAMPLE.match(line)) is not None:
                labels = f'replica="{replica}"' + (f",{sample[2]}" if sample[2] else "")
                samples.setdefault(family, []).append(f"{sample[1]}{{{labels}}}{sample[3]}")
    return "".join(f"{line}\n" for family, head in heads.items() for line in (*head, *samples.get(family, ())))
