"""Chat templates: a conversation, checked, through the model's own Jinja template in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jaxpaged.request import RequestError

_CONTINUE = "\u2060CONTINUE HERE\u2060 "  # goes behind the message to go on with; ends in a space that trimming drops


def read_messages(messages: Any, parts: bool) -> list[dict[str, Any]]:
    """Checked copies; content as the template wants it: a list of parts if `parts`, else a string."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list of {'role': ..., 'content': ...}.", "messages")
    return [_message(i, message, parts) for i, message in enumerate(messages)]


def _message(i: int, message: Any, parts: bool) -> dict[str, Any]:
    where = f"messages[{i}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a string 'role' and a 'content', got {message!r:.200}.", where)
    out, content = dict(message), message.get("content")
    if content is None and not (out.get("tool_calls") or out["role"] == "assistant"):
        raise RequestError(f"{where} (role {out['role']!r}) has no content.", f"{where}.content")
    if content is None:
        out["content"] = ""
    elif not isinstance(content, str):
        texts = _texts(content, f"{where}.content")
        out["content"] = [{"type": "text", "text": t} for t in texts] if parts else "\n".join(texts)
    calls = out.get("tool_calls")
    if not isinstance(calls, (list, tuple, type(None))):
        raise RequestError(f"{where}.tool_calls must be a list, got {calls!r:.200}.", f"{where}.tool_calls")
    if calls:
        out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in calls]
    return out


def _texts(content: Any, where: str) -> list[str]:
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"{where} must be a string or a list of text parts, got {type(content).__name__}.", where)
    out = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{where} has a part of type {kind!r}; only {{'type': 'text', 'text': '...'}} is served here.", where
            )
        out.append(text)
    return out


def _tool_call(call: Any, where: str) -> Any:
    """OpenAI sends arguments as JSON text; templates want the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{where} must be objects with a 'function', got {call!r:.200}.", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: the function's arguments are not JSON ({error}).", where) from None
    return {**call, "function": {**function, "arguments": arguments}}


def render(template: str, messages: list[dict], values: dict[str, Any], go_on: bool) -> str:
    import jinja2

    if go_on:
        _mark(messages[-1])
    try:
        text = _compile(template).render(messages=messages, **values)
    except RequestError:
        raise
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, jinja2.TemplateError) else error
        raise RequestError(f"The chat template refuses these messages: {what}", "messages") from error
    return _cut_at_mark(text) if go_on else text


def _mark(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _CONTINUE
    else:
        content[-1] = {**content[-1], "text": content[-1]["text"] + _CONTINUE}


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE.rstrip())
    if at < 0:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message's content.", "continue_final_message"
        )
    trims = not text.startswith(_CONTINUE, at)  # the template trims content: then what we go on with is trimmed too
    return text[:at].rstrip() if trims else text[:at]


@lru_cache(maxsize=32)
def _compile(template: str) -> Any:
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"The chat template is no valid Jinja: line {error.lineno}: {error.message}.", "chat_template"
        ) from None


@lru_cache(maxsize=1)
def _environment() -> Any:
    """Sandboxed Jinja with what Hugging Face templates expect."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant said (for training): here its body is just text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment


@lru_cache(maxsize=32)
def wants_parts(template: str) -> bool:
    """Whether the template loops over a message's content: then content may be a list of parts."""
    from jinja2 import TemplateSyntaxError, nodes

    try:
        tree = _environment().parse(template)
    except TemplateSyntaxError:
        return False  # `_compile` says what is wrong
    names = {"content"}

    def is_content(node: Any) -> bool:
        key = node.attr if isinstance(node, nodes.Getattr) else getattr(getattr(node, "arg", None), "value", None)
        return key == "content" or (isinstance(node, nodes.Name) and node.name in names)

    names.update(a.target.name for a in tree.find_all(nodes.Assign) if isinstance(a.target, nodes.Name) and is_content(a.node))
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
