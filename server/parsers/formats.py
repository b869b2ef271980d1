"""The tool-call formats by name, and the grammar of an answer: content with calls in it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from secrets import choice
from string import ascii_letters, digits
from typing import NamedTuple

from jaxpaged_server.parsers import json_calls, pythonic, xml_calls
from jaxpaged_server.parsers.output import Output
from jaxpaged_server.parsers.source import SPACE, Reading, Source, marks
from jaxpaged_server.parsers.values import Schemas

CALL, END_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
START, END = "<|python_start|>", "<|python_end|>"
MISTRAL_NAME = re.compile(r"[\w.:/\-]*")


def openai_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def mistral_id() -> str:
    """Mistral's chat templates refuse any other: nine letters and digits."""
    return "".join(choice(ascii_letters + digits) for _ in range(9))


class ToolFormat(NamedTuple):
    """How a family of models writes tool calls.

    read(source, out, marker, schemas): reads the calls that begin with `marker`, which has been read and is kept: what is
    kept when it returns was no call. begins: markers that begin calls anywhere. first: those that do so only where nothing
    but whitespace stands before, at the beginning of the answer or behind a call. inner: further markers.
    required, named: texts that force a call: of any tool, of the tool put in for "%s".
    """

    read: Callable[[Source, Output, str, Schemas], Reading[None]]
    begins: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    required: str = ""
    named: str = ""
    new_id: Callable[[], str] = openai_id

    @property
    def markers(self) -> tuple[str, ...]:
        return *self.begins, *self.inner

    def opening(self, name: str | None) -> str:
        return self.required if name is None else self.named % json.dumps(name, ensure_ascii=False)[1:-1]


def read_answer(source: Source, out: Output, form: ToolFormat, schemas: Schemas, lead: str) -> Reading[None]:
    """Reads to the end of the text. lead: whitespace that was read already."""
    begins, fresh = marks(frozenset(form.begins)), True
    while True:
        marker = None
        if fresh:  # only here whitespace may turn out to be no content
            lead += yield from source.read(SPACE)
            marker = yield from source.accept(*form.begins, *form.first)
        if marker is None:
            if source.exhausted:
                break
            out.content.append(lead)
            lead = ""
            marker = yield from source.copy_until(begins, out.content.append)
        if marker is None:
            break
        source.keep(lead + marker)
        yield from form.read(source, out, marker, schemas)
        lead = source.release()
        fresh = not lead.strip()
    if lead.strip() or not out.marked:
        out.content.append(lead)


# -- the formats ---------------------------------------------------------------------------------------------------------------


def _hermes(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    yield from source.read(SPACE)
    if bracket := (yield from source.accept("{", "[")):
        yield from json_calls.read_calls(source, out, bracket, marked=True)
        yield from source.close(END_CALL)


def _llama3_json(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    bracket = marker
    if marked := marker == PYTHON_TAG:
        yield from source.read(SPACE)
        bracket = yield from source.accept("{", "[")
    if bracket:
        yield from json_calls.read_calls(source, out, bracket, marked)


def _mistral(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    yield from source.read(SPACE)
    if bracket := (yield from source.accept("{", "[")):
        return (yield from json_calls.read_calls(source, out, bracket, marked=True))
    name = yield from source.read(MISTRAL_NAME)
    while (yield from source.accept(CALL_ID, ARGS)) == CALL_ID:
        yield from source.read(MISTRAL_NAME)
    yield from source.read(SPACE)
    if name and (yield from source.peek()) == "{":
        yield from json_calls.read_arguments(source, json_calls.Call(source, out, name))


def _qwen3_coder(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    if marker == CALL:
        yield from source.read(SPACE)
        marker = (yield from source.accept(xml_calls.FUNCTION)) or ""
    if marker:
        yield from xml_calls.read_function(source, out, schemas)


def _qwen(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    if marker == CALL:
        yield from source.read(SPACE)
    is_json = marker == CALL and (yield from source.peek()) != "<"
    yield from (_hermes if is_json else _qwen3_coder)(source, out, marker, schemas)


def _pythonic(source: Source, out: Output, marker: str, schemas: Schemas) -> Reading[None]:
    if marker == START:
        yield from source.read(SPACE)
        marker = (yield from source.accept("[")) or ""
    if marker:
        yield from pythonic.read_list(source, out)
        yield from source.close(END)


NO_TOOLS = ToolFormat(_hermes)  # without a marker that begins calls there are none
_OBJECT, _NAMED_OBJECT = '{"name": "', '{"name": "%s", "arguments": {'
_HERMES = ToolFormat(_hermes, (CALL,), inner=(END_CALL,), required=f"{CALL}\n{_OBJECT}", named=f"{CALL}\n{_NAMED_OBJECT}")
_LLAMA3_JSON = ToolFormat(
    _llama3_json,
    (PYTHON_TAG,),
    first=("{", "["),
    required=_OBJECT,
    named=_NAMED_OBJECT.replace("arguments", "parameters"),
)
_MISTRAL = ToolFormat(
    _mistral, (CALLS,), inner=(CALL_ID, ARGS), required=CALLS, named=f"{CALLS}[{_NAMED_OBJECT}", new_id=mistral_id
)
_QWEN3_CODER = ToolFormat(
    _qwen3_coder,
    (CALL, xml_calls.FUNCTION),
    inner=(END_CALL,),
    required=f"{CALL}\n{xml_calls.FUNCTION}",
    named=f"{CALL}\n{xml_calls.FUNCTION}%s>\n",
)
_PYTHONIC = ToolFormat(_pythonic, (START,), first=("[",), inner=(END,), required="[", named="[%s(")

TOOL_PARSERS = {
    "hermes": _HERMES,
    "llama3_json": _LLAMA3_JSON,
    "llama4_json": _LLAMA3_JSON,
    "llama4_pythonic": _PYTHONIC,
    "mistral": _MISTRAL,
    "pythonic": _PYTHONIC,
    "qwen": _HERMES._replace(read=_qwen, begins=_QWEN3_CODER.begins),  # what the model writes: JSON (2.5, 3), XML (Coder, 3.5)
    "qwen3_coder": _QWEN3_CODER,
    "qwen3_xml": _QWEN3_CODER,
}
