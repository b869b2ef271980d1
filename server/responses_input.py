"""What a Responses request asks for, as a chat request: items become messages, flat tools become chat's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import msgspec

from jaxpaged.request import RequestError
from jaxpaged_server.blocks import content_of, read, texts
from jaxpaged_server.fields import Body
from jaxpaged_server.schemas import NOTHING, ChatRequest

LOGPROBS = "message.output_text.logprobs"
# What may be included. Reasoning is in the open here: clients that ask for it encrypted get its text, and send that back.
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
STATELESS = "this server stores no responses and no conversations: send the whole conversation as input."
SAME = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
        "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids",
        "bad_words", "skip_special_tokens", "spaces_between_special_tokens", "skip_reading_prefix_cache", "stream", "priority",
        "request_id", "cache_salt", "parallel_tool_calls", "model", "chat_template_kwargs")  # fmt: skip


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextConfig(msgspec.Struct):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(Body, kw_only=True):
    """OpenAI's body, and of vLLM's further fields those that SamplingParams and the chat template have."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    include: list[str] = []
    text: TextConfig = msgspec.field(default_factory=TextConfig)
    reasoning: Reasoning = msgspec.field(default_factory=Reasoning)
    metadata: dict[str, str] = {}
    truncation: Literal["auto", "disabled"] = "disabled"
    background: bool = False
    conversation: str | dict[str, Any] | None = None
    previous_response_id: str | None = None
    user: str | None = None
    stream: bool = False
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool = True
    skip_reading_prefix_cache: bool | None = None
    priority: int = 0
    request_id: str | None = None
    cache_salt: str = ""
    chat_template_kwargs: dict[str, Any] | None = None
    REFUSED: ClassVar = {
        "context_management": ([],), "ec_transfer_params": NOTHING, "enable_response_messages": (False,),
        "include_reasoning": (True,), "kv_transfer_params": NOTHING, "max_tool_calls": NOTHING, "media_io_kwargs": ({},),
        "mm_payload": ("tensors",), "mm_processor_kwargs": ({},), "moderation": NOTHING, "previous_input_messages": ([],),
        "prompt": NOTHING, "response_format": ({"type": "text"},), "return_mm_kwargs": (False,), "structured_outputs": NOTHING,
        "vllm_xargs": ({},), "watermarking": (False,),
    }  # fmt: skip
    IGNORED: ClassVar = frozenset(("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
                                   "service_tier", "session_id", "store", "stream_options"))  # fmt: skip

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include


def to_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request in chat's words. RequestError for what this server does not have."""
    _check(body)
    return ChatRequest(
        messages=messages(body.instructions, body.input), tools=chat_tools(body.tools) or None,
        tool_choice=chat_tool_choice(body.tool_choice), max_completion_tokens=body.max_output_tokens,
        logprobs=body.wants_logprobs, top_logprobs=body.top_logprobs, reasoning_effort=body.reasoning.effort,
        **{name: getattr(body, name) for name in SAME},
    )  # fmt: skip


def _check(body: ResponsesRequest) -> None:
    for name, why in (("previous_response_id", STATELESS), ("conversation", STATELESS), ("background", STATELESS)):
        if getattr(body, name):
            raise RequestError(f"{name} is not supported: {why}", name)
    if body.truncation == "auto":
        raise RequestError('truncation "auto" is not supported: drop old items from the input yourself.', "truncation")
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise RequestError(f"max_output_tokens must be at least 1, got {body.max_output_tokens}.", "max_output_tokens")
    if body.top_logprobs and not body.wants_logprobs:
        raise RequestError(f'top_logprobs needs include: ["{LOGPROBS}"].', "top_logprobs")
    _check_output(body)


def _check_output(body: ResponsesRequest) -> None:
    """What the request says about the shape of its answer."""
    for name in body.include:
        if name not in INCLUDABLE:
            raise RequestError(f"include has {name!r:.80}; this server can include {', '.join(INCLUDABLE)}.", "include")
    if body.text.format is not None and body.text.format.get("type") != "text":
        raise RequestError(
            'text.format must be {"type": "text"}: this server does not hold answers to a format.', "text.format"
        )
    if body.text.verbosity not in (None, "medium"):
        raise RequestError("text.verbosity is not supported by this server; leave it out.", "text.verbosity")
    for name in ("summary", "generate_summary"):
        if getattr(body.reasoning, name) not in (None, "auto"):
            raise RequestError(f"reasoning.{name} is not supported: this server gives the reasoning itself; leave it out.",
                               f"reasoning.{name}")  # fmt: skip


# -- tools -------------------------------------------------------------------------------------------------------------------


class FunctionTool(msgspec.Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


def chat_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chat has a tool's fields under "function"."""
    return [{"type": "function", "function": _function(tool, f"tools[{i}]")} for i, tool in enumerate(tools)]


def _function(raw: dict[str, Any], where: str) -> dict[str, Any]:
    tool = read(raw, {"function": FunctionTool}, where)
    if tool.strict:
        raise RequestError(
            f"{where}.strict is not supported: arguments are not held to the schema; send false.", f"{where}.strict"
        )
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {name: value for name, value in fields.items() if value is not None}


def chat_tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) or choice not in (None, "none", "auto", "required"):
        known = '"none", "auto", "required" or {"type": "function", "name": ...}'
        raise RequestError(f"tool_choice must be {known}; got {choice!r:.80}.", "tool_choice")
    return choice


# -- input -------------------------------------------------------------------------------------------------------------------


class MessageItem(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Any]


class CallItem(msgspec.Struct):
    call_id: str
    name: str
    arguments: str


class OutputItem(msgspec.Struct):
    call_id: str
    output: str | list[Any]


class ReasoningItem(msgspec.Struct):
    summary: list[Any] = []
    content: list[Any] = []


ITEMS: Mapping[str, type[Any]] = {"message": MessageItem, "function_call": CallItem, "function_call_output": OutputItem,
                                  "reasoning": ReasoningItem}  # fmt: skip
TEXTS = ("input_text", "output_text", "text")


def messages(instructions: str | None, items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in chat's words. The instructions, and system or developer messages right behind them, are one system
    message, as many chat templates take no more."""
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not items:
        raise RequestError("input must not be an empty list.", "input")
    conversation = Conversation([instructions] if instructions else [])
    for i, item in enumerate(items):
        conversation.add(item, f"input[{i}]")
    return conversation.messages()


class Conversation:
    """Messages in the making: what the assistant thought, said and called in one go becomes one message."""

    def __init__(self, system: list[str]):
        self._system, self._messages = system, list[dict[str, Any]]()
        self._turn: dict[str, Any] | None = None  # the assistant's message that items may still go to
        self._said: list[str] = []  # its texts
        self._names: dict[str, str] = {}  # of the functions, by call: some templates want them beside the output

    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": content_of(self._system)}] if self._system else []
        return system + self._messages

    def add(self, raw: dict[str, Any], where: str) -> None:
        item = read(raw, ITEMS, where, default="message")
        if isinstance(item, MessageItem):
            self._message(item, where)
        elif isinstance(item, CallItem):
            self._call(item, where)
        elif isinstance(item, OutputItem):
            content = content_of(texts(item.output, TEXTS, f"{where}.output"))
            name = {"name": self._names[item.call_id]} if item.call_id in self._names else {}
            self._put({"role": "tool", "tool_call_id": item.call_id, **name, "content": content})
        else:
            self._reasoning(item, where)

    def _put(self, message: dict[str, Any]) -> dict[str, Any]:
        self._messages.append(message)
        self._turn = message if message["role"] == "assistant" else None
        self._said = []
        return message

    def _turn_for(self, kind: str) -> dict[str, Any]:
        """The assistant's message that an item of this kind belongs to. Reasoning begins a new one; so does a text behind
        another, unless calls stand between them."""
        turn = self._turn or {}
        another = kind == "reasoning" or (kind == "text" and self._said and "tool_calls" not in turn)
        if not turn or another:
            turn = self._put({"role": "assistant", "content": ""})
        return turn

    def _message(self, item: MessageItem, where: str) -> None:
        found = texts(item.content, (*TEXTS, "refusal"), f"{where}.content")
        if item.role == "assistant":
            turn = self._turn_for("text")
            self._said += found
            turn["content"] = content_of(self._said)
        elif item.role != "user" and not self._messages:
            self._system += found
        else:
            self._put({"role": "system" if item.role == "developer" else item.role, "content": content_of(found)})

    def _call(self, item: CallItem, where: str) -> None:
        try:
            arguments = msgspec.json.decode(item.arguments) if item.arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"{where}.arguments are not JSON: {error}.", f"{where}.arguments") from None
        self._names[item.call_id] = item.name
        call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}
        self._turn_for("call").setdefault("tool_calls", []).append(call)

    def _reasoning(self, item: ReasoningItem, where: str) -> None:
        """Its text; its summary where a client has no more. What is encrypted is not ours to read."""
        found = texts(item.content, ("reasoning_text", "text"), f"{where}.content")
        found = found or texts(item.summary, ("summary_text",), f"{where}.summary")
        if found:
            self._turn_for("reasoning")["reasoning_content"] = "\n".join(found)
