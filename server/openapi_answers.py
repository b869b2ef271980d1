"""The answers that /openapi.json promises: what a client may rely on. Objects may get further fields."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}
IDS: Schema = {"type": "array", "items": COUNT}
MAYBE_STRING: Schema = {"type": ["string", "null"]}
MAYBE_INTEGER: Schema = {"type": ["integer", "null"]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object that has all of `required`, and perhaps some of `optional`."""
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def headed(kind: str, choice: str) -> dict[str, Schema]:
    """What all of OpenAI's answers begin with."""
    return {"id": STRING, "object": {"const": kind}, "created": INTEGER, "model": STRING, "choices": array(ref(choice))}


REASONS = ("stop", "length", "abort", "error")
CHAT_REASONS = ("stop", "length", "tool_calls", "abort", "error")
STOP_REASON: Schema = {"type": ["string", "integer", "null"], "description": "The stop string or token id that ended it."}
USAGE = ref("Usage")
TOKEN_IDS: dict[str, Schema] = {"token_ids": IDS, "prompt_token_ids": or_null(IDS)}
REASONING: dict[str, Schema] = {"reasoning": MAYBE_STRING, "reasoning_content": MAYBE_STRING}

ERRORS: dict[str, Schema] = {
    "Error": record({"error": record({
        "message": STRING, "type": STRING, "param": {"type": ["string", "null"], "description": "The field at fault."},
        "code": {"type": "integer", "description": "The HTTP status."}})}),
    "AnthropicError": record({"type": {"const": "error"}, "error": record({"type": STRING, "message": STRING})}),
    "Trouble": record({"status": {"const": "unhealthy"}, "cause": STRING}),
}  # fmt: skip
SHARED: dict[str, Schema] = {
    "Usage": record({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
                    {"prompt_tokens_details": record({"cached_tokens": COUNT}),
                     "completion_tokens_details": record({"reasoning_tokens": COUNT})}),
    "Logprob": record({"logprob": NUMBER, "rank": MAYBE_INTEGER, "decoded_token": MAYBE_STRING}),
    "PromptLogprobs": {**array(or_null({"type": "object", "additionalProperties": ref("Logprob")})),
                       "description": "For each token of the prompt, by token id; null for the first one."},
    "TokenLogprob": record({"token": STRING, "logprob": NUMBER, "bytes": array(COUNT)}),
    "ChatLogprobs": record({"content": array({"allOf": [ref("TokenLogprob"),
                                                        record({"top_logprobs": array(ref("TokenLogprob"))})]})}),
    "TextLogprobs": record({
        "text_offset": array(COUNT), "token_logprobs": array({"type": ["number", "null"]}), "tokens": array(STRING),
        "top_logprobs": array(or_null({"type": "object", "additionalProperties": NUMBER}))}),
    "Model": record({"id": STRING, "object": {"const": "model"}, "created": INTEGER, "owned_by": STRING, "root": STRING,
                     "parent": MAYBE_STRING, "max_model_len": INTEGER, "permission": array({})}),
    "ModelList": record({"object": {"const": "list"}, "data": array(ref("Model"))}),
}  # fmt: skip
COMPLETIONS: dict[str, Schema] = {
    "TextChoice": record({"index": COUNT, "text": STRING, "logprobs": or_null(ref("TextLogprobs")),
                          "finish_reason": one_of(*REASONS), "stop_reason": STOP_REASON},
                         {**TOKEN_IDS, "prompt_logprobs": ref("PromptLogprobs")}),
    "TextCompletion": record({**headed("text_completion", "TextChoice"), "usage": USAGE}),
    "TextChunkChoice": record({"index": COUNT, "text": STRING, "logprobs": or_null(ref("TextLogprobs")),
                               "finish_reason": one_of(*REASONS, None), "stop_reason": STOP_REASON}, TOKEN_IDS),
    "TextCompletionChunk": record(headed("text_completion", "TextChunkChoice"), {"usage": USAGE}),
}  # fmt: skip
CHAT: dict[str, Schema] = {
    "ToolCall": record({"id": STRING, "type": {"const": "function"},
                        "function": record({"name": STRING, "arguments": {**STRING, "description": "JSON text."}})}),
    "ToolCallPiece": record({"index": COUNT, "function": record({"arguments": STRING}, {"name": STRING})},
                            {"id": STRING, "type": {"const": "function"}}),
    "ChatMessage": record({"role": STRING, "content": MAYBE_STRING, "refusal": NULL, "annotations": NULL,
                           "audio": NULL, "function_call": NULL}, {**REASONING, "tool_calls": array(ref("ToolCall"))}),
    "ChatChoice": record({"index": COUNT, "message": ref("ChatMessage"), "logprobs": or_null(ref("ChatLogprobs")),
                          "finish_reason": one_of(*CHAT_REASONS), "stop_reason": STOP_REASON}, {"token_ids": IDS}),
    "ChatCompletion": record({**headed("chat.completion", "ChatChoice"), "usage": USAGE},
                             {"prompt_logprobs": ref("PromptLogprobs"), "prompt_token_ids": IDS, "prompt_text": STRING}),
    "ChatDelta": record({}, {"role": STRING, "content": STRING, **REASONING, "tool_calls": array(ref("ToolCallPiece"))}),
    "ChatChunkChoice": record({"index": COUNT, "delta": ref("ChatDelta"), "logprobs": or_null(ref("ChatLogprobs")),
                               "finish_reason": one_of(*CHAT_REASONS, None)}, {"stop_reason": STOP_REASON, "token_ids": IDS}),
    "ChatCompletionChunk": record(headed("chat.completion.chunk", "ChatChunkChoice"),
                                  {"usage": USAGE, "prompt_token_ids": IDS, "prompt_text": STRING}),
}  # fmt: skip
TOKENS: dict[str, Schema] = {
    "Tokens": record({"count": COUNT, "max_model_len": INTEGER, "tokens": IDS, "token_strs": or_null(array(STRING))}),
    "Text": record({"prompt": STRING}),
    "RenderedPrompt": record({"prompt": STRING, "prompt_token_ids": IDS, "count": COUNT}),
    "RankedLogprob": record({"token_id": COUNT, "token": STRING, "logprob": NUMBER, "rank": MAYBE_INTEGER}),
    "TokenLogprobs": record({"content": array({"allOf": [ref("RankedLogprob"),
                                                         record({"top_logprobs": array(ref("RankedLogprob"))})]})}),
    "TokenChoice": record({"index": COUNT, "token_ids": IDS, "logprobs": or_null(ref("TokenLogprobs")),
                           "finish_reason": one_of(*REASONS, None), "stop_reason": STOP_REASON}, {"text": STRING}),
    "GeneratedChunk": record({"request_id": STRING, "model": STRING, "choices": array(ref("TokenChoice"))}, {"usage": USAGE}),
    "Generated": {"allOf": [ref("GeneratedChunk"),
                            record({"prompt_logprobs": or_null(ref("PromptLogprobs")), "usage": USAGE})]},
}  # fmt: skip
OPERATIONS: dict[str, Schema] = {
    "Version": record({"version": STRING}),
    "Load": record({"server_load": COUNT}),
    "Aborted": record({"aborted": COUNT}),
    "Document": record({"openapi": STRING, "info": OBJECT, "paths": OBJECT}),
}
MESSAGES: dict[str, Schema] = {
    "TokenCount": record({"input_tokens": COUNT}),
    "MessageUsage": record({"input_tokens": COUNT, "output_tokens": COUNT, "cache_read_input_tokens": COUNT,
                            "cache_creation_input_tokens": COUNT}),
    "ContentBlock": {"anyOf": [
        record({"type": {"const": "text"}, "text": STRING}),
        record({"type": {"const": "thinking"}, "thinking": STRING, "signature": STRING}),
        record({"type": {"const": "tool_use"}, "id": STRING, "name": STRING, "input": OBJECT})]},
    "MessageAnswer": record({
        "id": STRING, "type": {"const": "message"}, "role": {"const": "assistant"}, "model": STRING,
        "content": array(ref("ContentBlock")),
        "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", None),
        "stop_sequence": MAYBE_STRING, "usage": ref("MessageUsage")}),
    "MessageEvent": record({"type": one_of("message_start", "ping", "content_block_start", "content_block_delta",
                                           "content_block_stop", "message_delta", "message_stop", "error")},
                           {"message": ref("MessageAnswer"), "index": COUNT, "content_block": ref("ContentBlock"),
                            "delta": OBJECT}),
}  # fmt: skip
STATUS = one_of("in_progress", "completed", "incomplete")
RESPONSES: dict[str, Schema] = {
    "OutputItem": {"anyOf": [
        record({"type": {"const": "message"}, "id": STRING, "role": {"const": "assistant"}, "status": STATUS,
                "content": array(record({"type": {"const": "output_text"}, "text": STRING, "annotations": array({}),
                                         "logprobs": array(OBJECT)}))}),
        record({"type": {"const": "reasoning"}, "id": STRING, "summary": array({}),
                "content": array(record({"type": {"const": "reasoning_text"}, "text": STRING})), "status": STATUS}),
        record({"type": {"const": "function_call"}, "id": STRING, "call_id": STRING, "name": STRING, "arguments": STRING,
                "status": STATUS})]},
    "ResponseUsage": record({"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT,
                             "input_tokens_details": record({"cached_tokens": COUNT}),
                             "output_tokens_details": record({"reasoning_tokens": COUNT})}),
    "ResponseAnswer": record({
        "id": STRING, "object": {"const": "response"}, "created_at": NUMBER, "model": STRING,
        "status": one_of("in_progress", "completed", "incomplete", "failed"),
        "error": or_null(record({"code": STRING, "message": STRING})),
        "incomplete_details": or_null(record({"reason": STRING})), "output": array(ref("OutputItem")),
        "usage": or_null(ref("ResponseUsage")), "instructions": MAYBE_STRING,
        "metadata": OBJECT, "temperature": NUMBER, "top_p": NUMBER, "tools": array(OBJECT), "tool_choice": {},
        "parallel_tool_calls": {"type": "boolean"}}),
    "ResponseEvent": record({"type": STRING, "sequence_number": COUNT},
                            {"response": ref("ResponseAnswer"), "output_index": COUNT, "item": OBJECT, "item_id": STRING}),
}  # fmt: skip
ANSWERS: dict[str, Schema] = {**ERRORS, **SHARED, **COMPLETIONS, **CHAT, **TOKENS, **OPERATIONS, **MESSAGES, **RESPONSES}
