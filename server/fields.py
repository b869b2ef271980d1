"""From a body's bytes to a checked msgspec struct. What a body may hold, field by field:

- a field of the struct: checked for type and taken;
- a field in the struct's `REFUSED`, which OpenAI, vLLM or SGLang define and we do not implement: 400, unless its value is one
  of those listed there, which ask for nothing;
- a field in the struct's `IGNORED`, which does not change the result: taken without a word;
- any other: nobody defines it. Logged once a name; 400 with `strict`.

null is the same as not given, and 1.0 the same as 1, everywhere.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import logging
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import msgspec

from jaxpaged.request import RequestError

log = logging.getLogger(__name__)

MAX_LOGGED = 1000  # names of unknown fields that are remembered as logged
MAX_FIELDS = 1000  # of a body: no API has a tenth of them, and each one costs time


class Body(msgspec.Struct, kw_only=True):
    """A request body. Values in `REFUSED` are those that ask for nothing."""

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()


B = TypeVar("B", bound=Body)


class Decoder:
    """Decodes bodies; remembers which unknown fields it has logged."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self._logged: set[str] = set()

    def __call__(self, data: bytes, kind: type[B]) -> B:
        """RequestError (400) says what is wrong with the body and where."""
        return self.convert(parse_json(data), kind)

    def convert(self, raw: Any, kind: type[B]) -> B:
        if not isinstance(raw, dict):
            raise RequestError(f"the body must be a JSON object, got {_kind(raw)}.")
        if len(raw) > MAX_FIELDS:
            raise RequestError(f"the body has {len(raw):,} fields, at most {MAX_FIELDS:,} are read.")
        raw = {name: _plain(value) for name, value in raw.items() if value is not None}
        for name in raw.keys() - kind.__struct_encode_fields__:
            self._judge(name, raw[name], kind)
        try:
            with _no_collections():
                return msgspec.convert(raw, kind)
        except msgspec.ValidationError as error:
            message, param = _located(error)
            raise RequestError(message, param) from None

    def _judge(self, name: str, value: Any, kind: type[Body]) -> None:
        if name in kind.REFUSED:
            if not any(type(value) is type(allowed) and value == allowed for allowed in kind.REFUSED[name]):
                raise RequestError(f"{name} is not supported by this server; leave it out.", name)
        elif name not in kind.IGNORED:
            self._unknown(name, kind)

    def _unknown(self, name: str, kind: type[Body]) -> None:
        if self.strict:
            near = difflib.get_close_matches(name, kind.__struct_encode_fields__, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"there is no field {name!r:.80}.{hint}", name[:80])
        if name not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(name)
            log.warning("requests have a field that nobody defines and that is not used: %.80r (logged once)", name)


def parse_json(data: bytes) -> Any:
    try:
        with _no_collections():
            return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}.") from None
    except RecursionError:
        raise RequestError("the body is nested too deeply.") from None


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """A large body is millions of objects and no garbage: to look for some among them takes several times as long as to make
    them, and the event loop stands still meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _plain(value: Any) -> Any:
    """JSON has one kind of number: 16.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _located(error: msgspec.ValidationError) -> tuple[str, str | None]:
    """msgspec says "Expected `int`, got `str` - at `$.max_tokens`"; or "... missing required field `model`"."""
    text = str(error)
    message, _, path = text.partition(" - at `")
    path = path.rstrip("`").removeprefix("$").lstrip(".") or None
    if "missing required field" in message and path is None:
        path = message.split("`")[1]
    return (f"{path}: {message}." if path else f"{message}."), path


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
