"""The bodies of OpenAI's completions and chat, with vLLM's further fields, and of vLLM's smaller endpoints.

Types and names only: ranges are SamplingParams' business, messages the chat template's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import msgspec

from jaxpaged_server.fields import Body

NOTHING: tuple[Any, ...] = ()
TEXT = {"type": "text"}

# Fields of OpenAI, vLLM (0.33) and SGLang for generation that this version does not have, and the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": NOTHING, "best_of": (1,), "custom_logit_processor": NOTHING, "custom_params": NOTHING, "ebnf": NOTHING,
    "ec_transfer_params": NOTHING, "function_call": ("none",), "functions": ([],), "guided_choice": NOTHING,
    "guided_grammar": NOTHING, "guided_json": NOTHING, "guided_regex": NOTHING, "input_ids": NOTHING,
    "kv_transfer_params": NOTHING, "length_penalty": (1.0, 1), "logprob_token_ids": ([],), "lora_path": NOTHING,
    "media_io_kwargs": ({},), "mm_payload": ("tensors",), "mm_processor_kwargs": ({},), "modalities": (["text"],),
    "prediction": NOTHING, "prompt_embeds": NOTHING, "regex": NOTHING, "repetition_detection": NOTHING,
    "response_format": (TEXT,), "return_hidden_states": (False,), "return_mm_kwargs": (False,),
    "return_token_offsets": (False,), "return_weight_versions": (False,), "routed_experts_prompt_start": (0,),
    "stop_regex": NOTHING, "structured_outputs": NOTHING, "thinking_token_budget": NOTHING, "use_beam_search": (False,),
    "verbosity": ("medium",), "vllm_xargs": ({},), "watermarking": (False,), "web_search_options": NOTHING,
}  # fmt: skip
# Fields that change nothing of the result.
IGNORED = frozenset(("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
                     "prompt_cache_options", "service_tier", "session_id"))  # fmt: skip


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = False  # OpenAI's padding against traffic analysis: never sent


class Sampled(Body, kw_only=True):
    """What completions and chat have in common. A field that is None was not given: the server's default counts."""

    model: str | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool = True
    skip_reading_prefix_cache: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int | None = None
    priority: int = 0
    request_id: str | None = None
    cache_salt: str = ""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None


class CompletionRequest(Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]]  # a text, token ids, or a list of either: `completions.split_prompts`
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True
    REFUSED: ClassVar = REFUSED | {"suffix": ("",)}
    IGNORED: ClassVar = IGNORED


class Conversation(Protocol):
    """What decides how messages become a prompt: `ChatRequest` and `TokenizeRequest` have it."""

    messages: Any
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: Any
    documents: list[dict[str, Any]] | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: str | None


class ChatRequest(Sampled, kw_only=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    echo: bool = False
    return_prompt_text: bool = False
    REFUSED: ClassVar = REFUSED
    IGNORED: ClassVar = IGNORED


class TokenizeRequest(Body, kw_only=True):
    """`prompt`, or `messages` with the fields of chat that shape a prompt."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # None: as the endpoint that generates would
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    return_token_strs: bool = False
    REFUSED: ClassVar = {"mm_processor_kwargs": ({},), "media_io_kwargs": ({},)}


class DetokenizeRequest(Body, kw_only=True):
    tokens: list[int]
    model: str | None = None


class GenerateRequest(Body, kw_only=True):
    """vLLM's token-in / token-out: `sampling_params` takes every field of SamplingParams that can be JSON."""

    token_ids: list[int]
    sampling_params: dict[str, Any] = msgspec.field(default_factory=dict)
    model: str | None = None
    request_id: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    output_mode: str = "tokens"
    cache_salt: str = ""
    priority: int = 0
    lora_name: str | None = None
    REFUSED: ClassVar = {"kv_transfer_params": NOTHING, "ec_transfer_params": NOTHING, "features": NOTHING}
    IGNORED: ClassVar = frozenset(("session_id",))


class LoadLoraRequest(Body, kw_only=True):
    """vLLM's. load_inplace: in the place of the one of that name, for requests from now on."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    REFUSED: ClassVar = {"is_3d_lora_weight": (False,)}


class UnloadLoraRequest(Body, kw_only=True):
    """vLLM's."""

    lora_name: str
    IGNORED: ClassVar = frozenset(("lora_int_id",))


class AbortRequest(Body, kw_only=True):
    """No ids: every request."""

    request_ids: list[str] | None = None
