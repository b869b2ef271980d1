"""Tool calls written as JSON: `{"name": "f", "arguments": {...}}`, in the wrappings that models put around them.

The arguments go out as they come, as the model spelled them, so they are not parsed here: a value ends where its brackets
close, or before the first character that JSON has at no such place. One thing is mended: a raw control character inside a
string, which JSON forbids and models write, is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from jaxpaged_server.parsers.output import Output
from jaxpaged_server.parsers.source import SPACE, Reading, Source
from jaxpaged_server.parsers.values import NOT_A_VALUE, to_json

PARTNER = {"{": "}", "[": "]"}
STRING = re.compile(r'[^"\\]*')
BETWEEN = re.compile(r"[ \t\r\nA-Za-z0-9.,:+\-]*")  # what JSON has beside strings and brackets
SCALAR = re.compile(r"[A-Za-z0-9.+\-]*")
CONTROLS = {code: json.dumps(chr(code))[1:-1] for code in range(32)}
ARGUMENTS = ("arguments", "parameters")
KEYS = ("name", "type", "id", *ARGUMENTS)

Sink = Callable[[str], object]


# -- JSON values ---------------------------------------------------------------------------------------------------------------


def copy_string(source: Source, sink: Sink) -> Reading[bool]:
    """Reads a string that begins here; it goes to `sink` as it comes. False: the text ended first."""
    sink((yield from source.next()))
    while True:
        yield from source.copy(STRING, lambda text: sink(text.translate(CONTROLS)))
        character = yield from source.next()
        sink(character)
        if character != "\\":
            return character == '"'
        sink((yield from source.next()))  # what the backslash escapes


def copy_brackets(source: Source, sink: Sink, closing: list[str]) -> Reading[bool]:
    """Reads until all brackets are closed. closing: the partners of those that are open. False: they never are."""
    while closing:
        yield from source.copy(BETWEEN, sink)
        character = yield from source.peek()
        if character == '"':
            if not (yield from copy_string(source, sink)):
                return False
        elif character in PARTNER or character == closing[-1]:
            sink((yield from source.next()))
            closing.append(PARTNER[character]) if character in PARTNER else closing.pop()
        else:
            return False
    return True


def copy_value(source: Source, sink: Sink) -> Reading[bool]:
    """Reads a JSON value. False: here is none, or it breaks off."""
    character = yield from source.peek()
    if character == '"':
        return (yield from copy_string(source, sink))
    if character in PARTNER:
        sink((yield from source.next()))
        return (yield from copy_brackets(source, sink, [PARTNER[character]]))
    text = yield from source.read(SCALAR)
    sink(text)
    return text != ""


def read_string(source: Source) -> Reading[str | None]:
    """The value of a JSON string; None: here is none."""
    parts: list[str] = []
    if (yield from source.peek()) != '"' or not (yield from copy_string(source, parts.append)):
        return None
    try:
        text = json.loads("".join(parts))
        text.encode()  # a lone surrogate has no UTF-8
    except ValueError:
        return None
    return text


# -- one call ------------------------------------------------------------------------------------------------------------------


class Call:
    """A call while it is read. It begins, for good, once its name and the beginning of its arguments are known."""

    def __init__(self, source: Source, out: Output, name: str = ""):
        self.source, self.out, self.name = source, out, name
        self.has_arguments, self.begun = False, False
        self._early: list[str] = []  # arguments that came before the name

    def arguments(self, text: str) -> None:
        self.out.arguments(text) if self.begun else self._early.append(text)

    def begin(self) -> bool:
        """Begins if enough is known. From here on nothing that was read is given back."""
        if self.name and self.has_arguments and not self.begun:
            self.begun = True
            self.source.keep()
            self.out.begin_call(self.name)
            self.out.arguments("".join(self._early))
        return self.begun


def read_arguments(source: Source, call: Call) -> Reading[bool]:
    """Reads the arguments, which must be an object. False: they are not, or break off."""
    if (yield from source.peek()) != "{":
        return (yield from _read_wrapped(source, call))
    call.arguments((yield from source.next()))
    call.arguments((yield from source.read(SPACE)))
    if (yield from source.peek()) not in ('"', "}"):
        return False
    call.has_arguments = True
    call.begin()
    whole = yield from copy_brackets(source, call.arguments, ["}"])
    if call.begun:
        source.keep()
    return whole


def _read_wrapped(source: Source, call: Call) -> Reading[bool]:
    """Arguments that are null, which is no arguments, or a string of JSON text, as OpenAI sends them."""
    parts: list[str] = []
    yield from copy_value(source, parts.append)
    try:
        value = json.loads("".join(parts))
        value = json.loads(value) if isinstance(value, str) else {} if value is None else value
        call.arguments(to_json(value))
    except NOT_A_VALUE:
        return False
    call.has_arguments = isinstance(value, dict)
    call.begin()
    return call.has_arguments


def _read_name(source: Source, call: Call) -> Reading[bool]:
    call.name = (yield from read_string(source)) or ""
    call.begin()
    return call.name != ""


def _read_member(source: Source, call: Call, marked: bool) -> Reading[bool]:
    """Reads `"key": value`. False: here is none, or none of a call."""
    key = yield from read_string(source)
    yield from source.read(SPACE)
    if key is None or not (yield from source.accept(":")):
        return False
    yield from source.read(SPACE)
    if key == "name" and not call.name:
        return (yield from _read_name(source, call))
    if key in ARGUMENTS and not call.has_arguments:
        return (yield from read_arguments(source, call))
    if key not in KEYS and not marked and not call.begun:
        return False
    return (yield from copy_value(source, lambda text: None))


def read_object(source: Source, call: Call, marked: bool) -> Reading[None]:
    """Reads an object that says a call; its "{" has been read."""
    separator = ","
    while separator == ",":
        yield from source.read(SPACE)
        if not (yield from _read_member(source, call, marked)):
            return
        yield from source.read(SPACE)
        separator = yield from source.accept(",", "}")
    if separator and marked and not call.has_arguments:
        call.arguments("{}")
        call.has_arguments = True
    if separator and call.begin():
        source.keep()


def read_calls(source: Source, out: Output, bracket: str, marked: bool) -> Reading[None]:
    """Reads a call, several with "," or ";" between them, or a list of them; the first "{" or "[" has been read.

    marked: a marker has said that calls come. Without one, an object must look exactly like a call to be taken for it.
    """
    if bracket == "[":
        yield from source.read(SPACE)
        if not (yield from source.accept("{")):
            return
    more = True
    while more:
        yield from read_object(source, Call(source, out), marked)
        more = source.clean and (yield from _read_separator(source))
    if bracket == "[":
        yield from source.close("]")


def _read_separator(source: Source) -> Reading[bool]:
    """Reads what stands between two calls, with the second one's "{"."""
    yield from source.read(SPACE)
    if not (yield from source.accept(",", ";")):
        return False
    yield from source.read(SPACE)
    return (yield from source.accept("{")) is not None
