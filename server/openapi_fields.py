"""What /openapi.json says about the fields of bodies beyond their types: what they mean and what values they take.

The limits are those that SamplingParams, the chat template and the endpoints check; a test holds the two together.
"""

from __future__ import annotations

from typing import Any

from jaxpaged.request import MAX_BAD_WORDS, MAX_LOGIT_BIAS, MAX_NUM_SAMPLES, POOLINGS
from jaxpaged_server.embeddings import ENCODING_FORMATS, MAX_INPUTS
from jaxpaged_server.params import MAX_STOPS
from jaxpaged_server.prompting import EFFORTS
from jaxpaged_server.service import Service

Schema = dict[str, Any]

TOKEN_ID: Schema = {"$ref": "#/components/schemas/TokenId"}
INT64: Schema = {"minimum": -(2**63), "maximum": 2**63 - 1}
WORDS: Schema = {"items": {"type": "string", "minLength": 1}}
NAMED: Schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "minLength": 1}}}


def ids(**limits: int) -> Schema:
    return {"type": "array", "items": TOKEN_ID, **limits}


def inputs(limit: int) -> list[Schema]:
    """A text, token ids, or a list of either."""
    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": limit}
    many = {"type": "array", "items": ids(minItems=1), "minItems": 1, "maxItems": limit}
    return [{"type": "string"}, ids(minItems=1), texts, many]


PART: Schema = {
    "anyOf": [{"type": "string"}, {
        "type": "object", "required": ["text"],
        "properties": {"type": {"enum": ["text", "input_text", "output_text", "refusal"]}, "text": {"type": "string"}},
    }],
}  # fmt: skip
TOOL_CALL: Schema = {
    "type": "object", "required": ["function"],
    "properties": {"function": {"type": "object", "properties": {
        "name": {"description": "The function."}, "arguments": {"description": "JSON text, or the object itself."}}}},
}  # fmt: skip
CHAT_MESSAGE: Schema = {
    "type": "object", "required": ["role"],
    "properties": {
        "role": {"type": "string", "description": "system, user, assistant, tool, ...: what the chat template knows."},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": PART}, {"type": "null"}],
                    "description": "Text, or a list of parts of text. null: of an assistant, or beside tool_calls."},
        "tool_calls": {"type": ["array", "null"], "items": TOOL_CALL, "description": "Calls of the assistant."},
        "tool_call_id": {"description": "Of a tool's message: the call that it answers."},
        "reasoning_content": {"description": "What the assistant thought; `reasoning` is taken too."},
    },
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
        {"properties": {"role": {"const": "assistant"}}},
    ],
}  # fmt: skip
CHAT_TOOL: Schema = {
    "type": "object", "required": ["function"],
    "properties": {"type": {"const": "function"}, "function": {**NAMED, "properties": {
        "name": {"type": "string", "minLength": 1}, "description": {},
        "parameters": {"type": ["object", "null"], "description": "A JSON schema of the arguments."}}}},
}  # fmt: skip
CHAT_TOOL_CHOICE: list[Schema] = [
    {"enum": ["none", "auto", "required"]},
    {"type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}, "function": NAMED}},
]

# What is said of a body as a whole, by its struct's name.
BODIES: dict[str, Schema] = {
    "TokenizeRequest": {"oneOf": [{"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
                                  {"required": ["messages"], "properties": {"messages": {"type": "array"}}}]},
}  # fmt: skip
# By the field's name, or by "Struct.field" where a struct is different.
FIELDS: dict[str, Schema] = {
    "model": {"description": "One of the names at /v1/models; the first of them if it is left out."},
    # -- sampling
    "n": {"description": "Samples for each prompt.", "minimum": 1, "maximum": MAX_NUM_SAMPLES},
    "temperature": {"description": "0 is greedy.", "minimum": 0, "maximum": 2},
    "top_p": {"description": "Nucleus sampling.", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"description": "0 or -1: off.", "minimum": -1},
    "min_p": {"description": "Relative to the most probable token.", "minimum": 0, "maximum": 1},
    "seed": {"description": "Makes the answer repeatable, whatever runs beside it. -1: drawn.",
             "minimum": -(2**63), "maximum": 2**64 - 1},
    "stop": {"description": "Strings that end the text.", "minLength": 1, "maxItems": MAX_STOPS, **WORDS},
    "SamplingParams.stop": {"description": "Strings that end the text.", "minLength": 1, **WORDS},
    "stop_token_ids": {"description": "Token ids that end the answer.", "items": TOKEN_ID},
    "include_stop_str_in_output": {"description": "Whether the text ends with the stop string."},
    "ignore_eos": {"description": "Goes on after the model's end-of-sequence tokens."},
    "max_tokens": {"description": "Of the answer; with the prompt at most the model's context.", "minimum": 1},
    "CompletionRequest.max_tokens": {"description": "0 with echo: only the prompt.", "minimum": 0},
    "min_tokens": {"description": "The answer does not end before.", "minimum": 0},
    "presence_penalty": {"description": "Subtracted for tokens of the answer so far.", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"description": "Subtracted for each occurrence.", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"description": "Divides logits of tokens seen in prompt or answer.", "exclusiveMinimum": 0},
    "logit_bias": {"description": "Token id -> bias, clamped to [-100, 100].", "maxProperties": MAX_LOGIT_BIAS,
                   "propertyNames": {"pattern": "^[0-9]{1,18}$"}},
    "allowed_token_ids": {"description": "Only these can be sampled.", "minItems": 1, "items": TOKEN_ID},
    "bad_words": {"description": "Words that are not generated.", "maxItems": MAX_BAD_WORDS,
                  "items": {"type": "string", "minLength": 1, "maxLength": 256}},
    "prompt_logprobs": {"description": "Alternatives for each token of the prompt; -1: all.", "minimum": -1},
    "logprobs": {"description": "Alternatives for each token of the answer; -1: all.", "minimum": -1},
    "ChatRequest.logprobs": {"description": "With logprobs; see top_logprobs."},
    "top_logprobs": {"description": "Alternatives for each token; needs logprobs. -1: all.", "minimum": -1},
    "detokenize": {"description": "With text; needed for stop."},
    "skip_special_tokens": {"description": "The text is without special tokens (default: true)."},
    "spaces_between_special_tokens": {"description": "Taken for vLLM's sake."},
    "skip_reading_prefix_cache": {"description": "Computes the whole prompt."},
    # -- the answer
    "stream": {"description": "Server-sent events instead of one object."},
    "stream_options": {"description": "Needs stream: true."},
    "stream_interval": {"description": "Tokens that a chunk has at least.", "minimum": 1},
    "echo": {"description": "The answer begins with the prompt."},
    "ChatRequest.echo": {"description": "The answer begins with the last message."},
    "return_token_ids": {"description": "With the token ids of prompt and answer."},
    "return_tokens_as_token_ids": {"description": 'Tokens in logprobs are written "token_id:123".'},
    "return_prompt_text": {"description": "With the text of the prompt."},
    "return_token_strs": {"description": "With the text of each token."},
    "output_mode": {"description": "With or without text.", "enum": ["tokens", "text"]},
    # -- the request
    "priority": {"description": "Lower is served first (--scheduling-policy priority).", **INT64},
    "request_id": {"description": "Part of the answer's id. Printable characters.", "maxLength": 128},
    "cache_salt": {"description": "Prompts share cached pages only with prompts of the same salt."},
    "user": {"description": "Changes nothing."},
    "lora_name": {"description": "What the adapter is called as a model.", "minLength": 1},
    "GenerateRequest.lora_name": {"description": "A LoRA adapter; as model does."},
    "lora_path": {"description": "A folder that the server can read, as PEFT saves it."},
    "load_inplace": {"description": "In the place of the adapter of that name, for requests from now on."},
    "request_ids": {"description": "The ids of answers. Left out: every request."},
    # -- the prompt
    "truncate_prompt_tokens": {"description": "Keeps so many tokens of the prompt; -1: as many as the model takes.",
                               "minimum": -1, "not": {"const": 0}},
    "truncation_side": {"description": "Where the prompt is cut.", "enum": ["left", "right"]},
    "add_special_tokens": {"description": "The prompt gets the tokenizer's BOS and the like."},
    "TokenizeRequest.prompt": {"description": "A text; or give messages."},
    "token_ids": {"description": "The prompt.", **ids(minItems=1)},
    "tokens": {"description": "Token ids.", **ids()},
    "sampling_params": {"description": "SamplingParams.", "$ref": "#/components/schemas/SamplingParams"},
    "messages": {"description": "The conversation.", "type": "array", "minItems": 1, "items": CHAT_MESSAGE},
    "tools": {"description": "Functions that the model may call.", "minItems": 1, "items": CHAT_TOOL},
    "tool_choice": {"description": "Whether, or which, a function is called.", "anyOf": CHAT_TOOL_CHOICE},
    "parallel_tool_calls": {"description": "Whether an answer may have several calls."},
    "add_generation_prompt": {"description": "The prompt ends where the assistant's message begins."},
    "continue_final_message": {"description": "The answer goes on with the last message; needs add_generation_prompt: false."},
    "documents": {"description": "For templates that know documents."},
    "chat_template": {"description": "Needs --trust-request-chat-template."},
    "chat_template_kwargs": {"description": "Variables for the chat template."},
    "reasoning_effort": {"description": "For models whose template knows it.", "enum": list(EFFORTS)},
    "include_reasoning": {"description": "Whether the answer has its reasoning."},
    "max_completion_tokens": {"description": "The newer name of max_tokens.", "minimum": 1},
    # -- Messages API
    "CountTokensRequest.messages": {"description": "The conversation.", "minItems": 1},
    "MessagesRequest.messages": {"description": "The conversation.", "minItems": 1},
    "CountTokensRequest.tools": {"description": "The caller's own tools."},
    "MessagesRequest.tools": {"description": "The caller's own tools."},
    "CountTokensRequest.tool_choice": {"description": "Whether, or which, a tool is used."},
    "MessagesRequest.tool_choice": {"description": "Whether, or which, a tool is used."},
    "system": {"description": "The system prompt: text, or blocks of text."},
    "thinking": {"description": "Whether the model thinks, for templates that know enable_thinking."},
    "output_config": {"description": "effort, for templates that know it."},
    "stop_sequences": {"description": "Strings that end the text.", "maxItems": MAX_STOPS, **WORDS},
    # -- Responses API
    "instructions": {"description": "The system message."},
    "ResponsesRequest.tools": {"description": "Functions that the model may call."},
    "ResponsesRequest.tool_choice": {"description": "Whether, or which, a function is called."},
    "max_output_tokens": {"description": "Of the answer.", "minimum": 1},
    "include": {"description": "What else the answer has.",
                "items": {"enum": ["message.output_text.logprobs", "reasoning.encrypted_content"]}},
    "text": {"description": "The text's format: only plain text."},
    "reasoning": {"description": "How much the model thinks."},
    "metadata": {"description": "Repeated in the answer."},
    "truncation": {"description": 'Only "disabled".', "enum": ["disabled"]},
    "background": {"description": "Only false.", "enum": [False]},
    "conversation": {"description": "Not supported: this server has no memory."},
    "previous_response_id": {"description": "Not supported: this server has no memory."},
    "ResponsesRequest.input": {"description": "Text, or items: messages, function calls, their outputs, reasoning."},
    # -- embeddings
    "EmbeddingRequest.input": {"description": "A text, token ids, or a list of either.", "anyOf": inputs(MAX_INPUTS)},
    "encoding_format": {"description": "Numbers, or base64 of little-endian float32.", "enum": list(ENCODING_FORMATS)},
    "dimensions": {"description": "Only the first so many numbers of each vector.", "minimum": 1},
    "pooling": {"description": "Of the prompt's hidden states.", "enum": list(POOLINGS)},
    "use_activation": {"description": "Vectors have length 1 (default: true)."},
    "normalize": {"description": "The older name of use_activation."},
}  # fmt: skip


def own_limits(service: Service) -> dict[str, Schema]:
    """What depends on the model and on the server's options."""
    engine, longest = service.engine.engine, {"maximum": service.max_model_len - 1}
    width = {"minimum": -1 if engine.limits.vocab_size <= engine.max_logprobs else 0, "maximum": engine.max_logprobs}
    limits: dict[str, Schema] = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), longest)
    limits["MessagesRequest.max_tokens"] = {}  # clients must say a number there: a large one is as many as fit
    limits |= dict.fromkeys(("prompt_logprobs", "top_logprobs", "CompletionRequest.logprobs", "SamplingParams.logprobs"), width)
    prompt = {"description": "A text, token ids, or a list of either.", "anyOf": inputs(service.options.max_num_prompts)}
    return {**limits, "CompletionRequest.prompt": prompt}


def rules(struct: str, field: str, service: Service) -> Schema:
    """Everything that is said about a field of a struct."""
    own, limits = f"{struct}.{field}", own_limits(service)
    return {**FIELDS.get(own, FIELDS.get(field, {})), **limits.get(own, limits.get(field, {}))}
