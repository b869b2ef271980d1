"""What a Messages request asks for, as a chat request: blocks become contents, tool calls and tool messages."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from jaxpaged.request import RequestError
from jaxpaged_server.blocks import content_of, read, texts
from jaxpaged_server.fields import Body
from jaxpaged_server.schemas import NOTHING, ChatRequest

Content = str | list[dict[str, Any]]


class Message(msgspec.Struct):
    role: Literal["user", "assistant", "system"]
    content: Content


class ToolChoice(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(msgspec.Struct):
    """budget_tokens is taken and not held: max_tokens is what ends an answer. display "omitted": without the text of it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(msgspec.Struct):
    """effort: for templates that know `reasoning_effort`; a hint, so no error where they do not."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(Body, kw_only=True):
    """What becomes the prompt."""

    messages: list[Message]
    model: str | None = None
    system: Content = ""
    tools: list[dict[str, Any]] = []
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = msgspec.field(default_factory=OutputConfig)
    chat_template_kwargs: dict[str, Any] = {}
    REFUSED: ClassVar = {
        "container": NOTHING, "ec_transfer_params": NOTHING, "kv_transfer_params": NOTHING, "mcp_servers": ([],),
        "mm_payload": ("tensors",), "output_format": NOTHING, "return_mm_kwargs": (False,), "vllm_xargs": ({},),
        "watermarking": (False,),
    }  # fmt: skip
    # context_management is advice on what to shorten: what is too long without it is refused by its length.
    IGNORED: ClassVar = frozenset(("cache_control", "context_management", "diagnostics", "inference_geo", "metadata",
                                   "service_tier", "speed", "user_profile_id", "workspace_id"))  # fmt: skip


class MessagesRequest(CountTokensRequest, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] = []
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False
    cache_salt: str = ""


def to_chat(body: CountTokensRequest) -> ChatRequest:
    """The same request in chat's words. RequestError for what this server does not have."""
    if not body.messages:
        raise RequestError("messages must not be an empty list.", "messages")
    if body.output_config.format is not None:
        raise RequestError("output_config.format is not supported: this server does not hold answers to a format.",
                           "output_config.format")  # fmt: skip
    goes_on = body.messages[-1].role == "assistant"  # the answer goes on with the last message
    return ChatRequest(
        messages=chat_messages(body.system, body.messages), tools=chat_tools(body.tools) or None,
        tool_choice=_tool_choice(body.tool_choice), chat_template_kwargs=_template_kwargs(body),
        parallel_tool_calls=body.tool_choice is None or not body.tool_choice.disable_parallel_tool_use,
        add_generation_prompt=not goes_on, continue_final_message=goes_on, **_sampling(body),
    )  # fmt: skip


def _sampling(body: CountTokensRequest) -> dict[str, Any]:
    if not isinstance(body, MessagesRequest):
        return {}
    if body.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {body.max_tokens}.", "max_tokens")
    if not all(body.stop_sequences):
        raise RequestError("stop_sequences must be non-empty strings.", "stop_sequences")
    same = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "cache_salt")
    return {"stop": body.stop_sequences, **{name: getattr(body, name) for name in same}}


def _template_kwargs(body: CountTokensRequest) -> dict[str, Any]:
    """Templates that do not know a variable do not mind it."""
    thinking = {} if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}
    effort = {} if body.output_config.effort is None else {"reasoning_effort": body.output_config.effort}
    return {**thinking, **effort, **body.chat_template_kwargs}


# -- tools -------------------------------------------------------------------------------------------------------------------


class Tool(msgspec.Struct):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool = False
    defer_loading: bool = False
    input_examples: list[Any] = []
    allowed_callers: list[str] = []

    def unsupported(self) -> str | None:
        """The field that asks for what this server does not do."""
        asks = {"strict": self.strict, "defer_loading": self.defer_loading, "input_examples": bool(self.input_examples),
                "allowed_callers": self.allowed_callers not in ([], ["direct"])}  # fmt: skip
        return next((name for name, asked in asks.items() if asked), None)


def chat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": _function(raw, f"tools[{i}]")} for i, raw in enumerate(tools)]


def _function(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Tools without a type are the caller's own; those that Anthropic would run have one."""
    tool = read(raw, {"custom": Tool}, where, default="custom")
    if name := tool.unsupported():
        raise RequestError(f"{where}.{name} is not supported by this server; leave it out.", f"{where}.{name}")
    described = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **described, "parameters": tool.input_schema}


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None or choice.type != "tool":
        return None if choice is None else "required" if choice.type == "any" else choice.type
    if not choice.name:
        raise RequestError('tool_choice of type "tool" needs the tool\'s name.', "tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


# -- messages ----------------------------------------------------------------------------------------------------------------


class TextBlock(msgspec.Struct):
    text: str


class ThinkingBlock(msgspec.Struct):
    thinking: str


class RedactedBlock(msgspec.Struct):
    """Thoughts that only Anthropic can read."""


class ToolUseBlock(msgspec.Struct):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct):
    tool_use_id: str
    content: Content = ""
    is_error: bool = False


ASSISTANT: dict[str, type[Any]] = {"text": TextBlock, "thinking": ThinkingBlock, "redacted_thinking": RedactedBlock,
                                   "tool_use": ToolUseBlock}  # fmt: skip
USER: dict[str, type[Any]] = {"text": TextBlock, "tool_result": ToolResultBlock}


def chat_messages(system: Content, messages: list[Message]) -> list[dict[str, Any]]:
    """The conversation in chat's words. System messages at the beginning are one with `system`."""
    first = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    told = texts(system, ("text",), "system") if system else []
    for i, message in enumerate(messages[:first]):
        told += texts(message.content, ("text",), f"messages[{i}].content")
    out: list[dict[str, Any]] = [{"role": "system", "content": content_of(told)}] if told else []
    names: dict[str, str] = {}  # of tools, by call: some templates want them beside the result
    for i, message in enumerate(messages[first:], first):
        where = f"messages[{i}].content"
        out += [_assistant(message.content, where, names)] if message.role == "assistant" else _user(message, where, names)
    _check_end(messages, out)
    return out


def _check_end(messages: list[Message], out: list[dict[str, Any]]) -> None:
    if out and out[-1].get("tool_calls"):
        message = "the last message has tool_use blocks: a user's message with their tool_result blocks must follow."
        raise RequestError(message, f"messages[{len(messages) - 1}]")


def _blocks(content: Content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _assistant(content: Content, where: str, names: dict[str, str]) -> dict[str, Any]:
    said, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, raw in enumerate(_blocks(content)):
        block = read(raw, ASSISTANT, f"{where}[{i}]")
        if isinstance(block, TextBlock):
            said.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            names[block.id] = block.name
            calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}})
    more = {"reasoning_content": "\n".join(thoughts), "tool_calls": calls}
    return {"role": "assistant", "content": content_of(said), **{name: value for name, value in more.items() if value}}


def _user(message: Message, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    """A user's (or, inside a conversation, a system's) message: tool results are messages of their own, in their order."""
    out: list[dict[str, Any]] = []
    said: list[str] = []
    kinds = USER if message.role == "user" else {"text": TextBlock}
    for i, raw in enumerate(_blocks(message.content)):
        block = read(raw, kinds, f"{where}[{i}]")
        if isinstance(block, ToolResultBlock):
            out += [*_said(message.role, said), _result(block, f"{where}[{i}]", names)]
            said = []
        else:
            said.append(block.text)
    return out + _said(message.role, said) or _said(message.role, [""])


def _said(role: str, said: list[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content_of(said)}] if said else []


def _result(block: ToolResultBlock, where: str, names: dict[str, str]) -> dict[str, Any]:
    found = texts(block.content, ("text",), f"{where}.content")
    if block.is_error:  # templates have no place for it but the text
        found = ["Error: " + "".join(found[:1]), *found[1:]]
    name = {"name": names[block.tool_use_id]} if block.tool_use_id in names else {}
    return {"role": "tool", "tool_call_id": block.tool_use_id, **name, "content": content_of(found)}
