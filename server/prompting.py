"""From messages to a prompt: the chat template with everything a request may say about it, tools and forced calls included."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from jaxpaged.request import RequestError
from jaxpaged_server.parsers import end_of_reasoning, opening
from jaxpaged_server.schemas import Conversation
from jaxpaged_server.service import Service

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class Prompt:
    """text and ids of the prompt. tools: those that the answer may call. forced: text with which the answer has been made
    to begin (it is at the prompt's end, and belongs to the answer)."""

    text: str
    ids: list[int]
    tools: list[dict[str, Any]]
    forced: str = ""


async def render(service: Service, body: Conversation) -> Prompt:
    """The exact prompt of a conversation. RequestError says which message, tool or option is wrong."""
    tools, forced = _tools(service, body)
    options = _options(service, body)
    shown = body.tools if body.tools and not _hides_tools(service, body) else None
    messages = [_with_reasoning(message) for message in body.messages]
    tokenizer = service.need_tokenizer("a conversation")
    text = await asyncio.to_thread(tokenizer.apply_chat_template, messages, tools=shown, tokenize=False, **options)
    if forced:  # after what the template or the model has begun to think
        text = str(text) + end_of_reasoning(service.options.reasoning_parser, str(text)) + forced
    ids = await service.encode(str(text), add_special_tokens=bool(body.add_special_tokens))
    return Prompt(str(text), ids, tools, forced)


def _options(service: Service, body: Conversation) -> dict[str, Any]:
    if body.chat_template is not None and not service.options.trust_request_chat_template:
        raise RequestError("chat_template of a request is not used by this server; start it with "
                           "--trust-request-chat-template to allow it.", "chat_template")  # fmt: skip
    template = body.chat_template or service.chat_template
    given = {**service.options.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    for name in ("self", "tokenize", "messages", "tools", "chat_template"):
        if name in given:
            raise RequestError(f"chat_template_kwargs must not have {name!r}.", "chat_template_kwargs")
    if body.documents is not None:
        given.setdefault("documents", body.documents)
    given |= _effort(service, body, template)
    given.setdefault("add_generation_prompt", body.add_generation_prompt)
    given.setdefault("continue_final_message", body.continue_final_message)
    return {**given, "chat_template": template}


def _effort(service: Service, body: Conversation, template: str | None) -> dict[str, Any]:
    """reasoning_effort reaches templates that know it; one that only knows whether to think is told so for "none"."""
    effort = body.reasoning_effort
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise RequestError(f"reasoning_effort must be one of {', '.join(EFFORTS)}; got {effort!r:.80}.", "reasoning_effort")
    source = template or (service.tokenizer.chat_template if service.tokenizer else None) or ""
    if "reasoning_effort" in source:
        return {"reasoning_effort": effort}
    if "enable_thinking" in source:
        return {"enable_thinking": effort != "none"}
    if effort == "none":
        return {}
    raise RequestError("this model's chat template knows no reasoning_effort; leave it out.", "reasoning_effort")


def _with_reasoning(message: Any) -> Any:
    """An assistant's earlier reasoning may come under either name; templates look for `reasoning_content`."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return {**message, "reasoning_content": reasoning, "reasoning": reasoning} if reasoning else message


# -- tools ----------------------------------------------------------------------------------------------------------------


def _hides_tools(service: Service, body: Conversation) -> bool:
    return body.tool_choice == "none" and service.options.exclude_tools_when_tool_choice_none


def _tools(service: Service, body: Conversation) -> tuple[list[dict[str, Any]], str]:
    """(the tools that the answer may call, text that forces a call)."""
    if body.tools is None:
        if body.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools.", "tool_choice")
        return [], ""
    names = [_tool_name(i, tool) for i, tool in enumerate(body.tools)]
    if not names:
        raise RequestError("tools must not be an empty list; leave it out.", "tools")
    choice = _choice(body.tool_choice)
    if choice == "none":
        return [], ""
    parser = service.options.tool_call_parser
    if choice == "auto":
        if parser is None and body.tool_choice == "auto":
            raise RequestError('tool_choice "auto" needs a parser for this model\'s tool calls; start the server with '
                               '--tool-call-parser, or send tool_choice "none".', "tool_choice")  # fmt: skip
        return (body.tools if parser else []), ""
    if parser is None:
        raise RequestError("tool_choice needs a parser for this model's tool calls; start the server with --tool-call-parser.",
                           "tool_choice")  # fmt: skip
    name = None if choice == "required" else choice[1]
    if name is not None and name not in names:
        raise RequestError(f"tool_choice names {name!r:.80}, which is not among the tools: {', '.join(names)}.", "tool_choice")
    if not body.add_generation_prompt:
        raise RequestError("a forced tool call needs add_generation_prompt: true.", "tool_choice")
    return body.tools, opening(parser, name)


def _tool_name(i: int, tool: dict[str, Any]) -> str:
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict):
        raise RequestError(f"tools[{i}] must be {{'type': 'function', 'function': {{'name': ...}}}}.", f"tools[{i}]")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise RequestError(f"tools[{i}].function.name must be a non-empty string.", f"tools[{i}].function.name")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(
            f"tools[{i}].function.parameters must be a JSON schema (an object).", f"tools[{i}].function.parameters"
        )
    if function.get("strict"):
        raise RequestError(f"tools[{i}].function.strict is not supported by this server: arguments are not held to the schema; "
                           "leave it out.", f"tools[{i}].function.strict")  # fmt: skip
    return name


def _choice(given: Any) -> str | tuple[str, str]:
    """ "none", "auto", "required", or ("function", its name)."""
    if given is None:
        return "auto"
    if given in ("none", "auto", "required"):
        return given
    function = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return "function", function["name"]
    raise RequestError('tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}.',
                       "tool_choice")  # fmt: skip
