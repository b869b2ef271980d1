"""Tool calls as a list of Python calls: [get_weather(city="Paris", days=2), get_time()].

Arguments are keywords with literal values; nothing is ever evaluated. A call goes out when it is complete.
"""

from __future__ import annotations

import re

from jaxpaged_server.parsers.output import Output
from jaxpaged_server.parsers.source import SPACE, Reading, Source
from jaxpaged_server.parsers.values import NOT_A_VALUE, read_keywords, to_json

NAME = re.compile(r"[\w.\-]*")
CODE = re.compile(r"""[^"'()\[\]{}]*""")
QUOTED = {quote: re.compile(rf"[^{quote}\\]*") for quote in "\"'"}


def read_list(source: Source, out: Output) -> Reading[None]:
    """Reads a list of calls; its "[" has been read."""
    more = True
    while more:
        yield from source.read(SPACE)
        name = yield from source.read(NAME)
        arguments = yield from _read_arguments(source)
        if not name or arguments is None:
            return
        source.keep()
        out.begin_call(name)
        out.arguments(arguments)
        yield from source.read(SPACE)
        more = (yield from source.accept(",")) is not None
    yield from source.close("]")


def _read_arguments(source: Source) -> Reading[str | None]:
    """JSON text of the arguments that stand in parentheses here; None: here are none."""
    if (yield from source.peek()) != "(":
        return None
    parts: list[str] = []
    depth = 0
    while depth or not parts:
        parts.append((yield from source.read(CODE)))
        character = yield from source.peek()
        if not character:
            return None
        if character in QUOTED:
            parts.append((yield from _read_quoted(source, character)))
        else:
            parts.append((yield from source.next()))
            depth += 1 if character in "([{" else -1
    try:
        return to_json(read_keywords("".join(parts)))
    except NOT_A_VALUE:
        return None


def _read_quoted(source: Source, quote: str) -> Reading[str]:
    """A string literal that begins here, or what there is of it."""
    start = (yield from source.accept(quote * 3)) or (yield from source.next())
    parts = [start]
    while not source.exhausted:
        parts.append((yield from source.read(QUOTED[quote])))
        if end := (yield from source.accept(start)):
            parts.append(end)
            break
        parts.append((yield from source.next()))
        if parts[-1] == "\\":
            parts.append((yield from source.next()))
    return "".join(parts)
