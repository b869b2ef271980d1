"""Tool calls as Qwen3-Coder writes them: <function=name><parameter=key>value</parameter></function>.

Values are bare text: the tool's JSON schema says what they are. A string goes out as it comes, any other value when it is
complete. One newline after <parameter=...> and one before </parameter> belong to the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jaxpaged_server.parsers.output import Output
from jaxpaged_server.parsers.source import SPACE, Reading, Source, marks
from jaxpaged_server.parsers.values import STRING, Schemas, typed_json, types_of

FUNCTION, PARAMETER = "<function=", "<parameter="
END_CALL, END_FUNCTION, END_PARAMETER = "</tool_call>", "</function>", "</parameter>"
END_VALUE = marks(frozenset([END_PARAMETER, f"\n{END_PARAMETER}"]))
JSON = json.JSONEncoder(ensure_ascii=False)
NAME = re.compile(r"[^\s<>]*")


def read_function(source: Source, out: Output, schemas: Schemas) -> Reading[None]:
    """Reads a call; "<function=" has been read. It begins, for good, with its name."""
    name = yield from source.read(NAME)
    if not name or not (yield from source.accept(">")):
        return
    out.begin_call(name)
    out.arguments("{")
    separator = ""
    while True:
        source.keep()
        yield from source.read(SPACE)
        marker = yield from source.accept(PARAMETER, END_FUNCTION, END_CALL)
        if marker != PARAMETER or not (yield from _read_parameter(source, out, schemas.get(name, {}), separator)):
            break
        separator = ", "
    if marker in (END_FUNCTION, END_CALL):
        out.arguments("}")
        source.keep()
    if marker == END_FUNCTION:
        yield from source.close(END_CALL)


def _read_parameter(source: Source, out: Output, schemas: Mapping[str, Any], separator: str) -> Reading[bool]:
    """Reads one parameter; "<parameter=" has been read. False: here is none, or the text ended in it."""
    key = yield from source.read(NAME)
    if not key or not (yield from source.accept(">")):
        return False
    source.release()
    out.arguments(f"{separator}{JSON.encode(key)}: ")
    yield from source.accept("\n")
    types = types_of(schemas.get(key))
    if types == STRING:
        return (yield from _copy_string(source, out))
    parts: list[str] = []
    whole = (yield from source.copy_until(END_VALUE, parts.append)) is not None
    text = "".join(parts)
    out.arguments(typed_json(text, types) if whole else text)
    return whole


def _copy_string(source: Source, out: Output) -> Reading[bool]:
    out.arguments('"')
    escaped = lambda text: out.arguments(JSON.encode(text)[1:-1])
    whole = (yield from source.copy_until(END_VALUE, escaped)) is not None
    if whole:
        out.arguments('"')
    return whole
