"""Reading the lists inside a body: of objects whose `type` says what they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from jaxpaged.request import RequestError

T = TypeVar("T")


def read(raw: Any, kinds: Mapping[str, type[T]], where: str, default: str | None = None) -> T:
    """The object as the struct of its type; `default`: the type of one that has none. RequestError (400) says where what is
    wrong. Fields that the struct lacks are ignored, null is the same as not given."""
    if not isinstance(raw, dict):
        raise RequestError(f"{where} must be an object, got {raw!r:.80}.", where)
    kind = raw.get("type", default)
    if not isinstance(kind, str) or kind not in kinds:
        known = ", ".join(kinds)
        raise RequestError(f"{where} has the type {kind!r:.80}; this server takes {known} there.", f"{where}.type")
    return convert({name: value for name, value in raw.items() if value is not None}, kinds[kind], where)


def convert(raw: Any, kind: type[T], where: str) -> T:
    """msgspec.convert, with its error as a RequestError."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        place = where + path.rstrip("`")
        raise RequestError(f"{place}: {message}.", place) from None


class Text(msgspec.Struct):
    text: str


def texts(content: str | list[Any], kinds: Iterable[str], where: str) -> list[str]:
    """The texts of a content: a string, or a list of blocks of `kinds`, which have a `text`."""
    if isinstance(content, str):
        return [content]
    known = dict.fromkeys(kinds, Text)
    return [read(block, known, f"{where}[{i}]").text for i, block in enumerate(content)]


def content_of(texts: list[str]) -> str | list[dict[str, str]]:
    """A chat message's content: a string where one will do."""
    if len(texts) <= 1:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]
