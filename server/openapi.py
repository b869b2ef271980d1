"""`openapi(service, routes)`: what the server does, as an OpenAPI 3.1 document, for GET /openapi.json.

Types of bodies come from the structs that check them, what else is known of their fields from openapi_fields.py, answers
from openapi_answers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

import jaxpaged
from jaxpaged.request import SamplingParams
from jaxpaged_server.embeddings import EmbeddingRequest, EmbeddingResponse
from jaxpaged_server.errors import ANTHROPIC_PATH
from jaxpaged_server.fields import Body
from jaxpaged_server.live import Frame
from jaxpaged_server.messages_input import CountTokensRequest, MessagesRequest
from jaxpaged_server.middleware import OPEN_PATHS
from jaxpaged_server.openapi_answers import ANSWERS, STRING, Schema, ref
from jaxpaged_server.openapi_fields import BODIES, rules
from jaxpaged_server.replies import json_reply
from jaxpaged_server.responses_input import ResponsesRequest
from jaxpaged_server.schemas import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateRequest,
    LoadLoraRequest,
    TokenizeRequest,
    UnloadLoraRequest,
)
from jaxpaged_server.service import Service

JSON, EVENTS, HTML, TEXT = "application/json", "text/event-stream", "text/html", "text/plain"
NOT_FOR_HTTP = ("output_kind", "extra_args")  # of SamplingParams
STATUSES = {
    400: "The request is not right; the message says what is wrong and what to do.",
    401: "No valid API key.",
    403: "The server was not started to do this.",
    404: "There is no such model.",
    413: "The body is too large (--max-body-size).",
    500: "The request failed in the engine, or the server made a mistake.",
    503: "Too many requests wait, or the server shuts down: try again later.",
}


@dataclass(frozen=True)
class Operation:
    """One method of one path. bodies: any of these structs. answer: the name of a component. events: that of what a stream's
    events hold. fails: statuses beside those that all have. media: of an answer without a component."""

    summary: str
    tag: str
    answer: str | None = None
    bodies: tuple[type[Body], ...] = ()
    events: str | None = None
    fails: tuple[int, ...] = ()
    media: str | None = None


WORK = (400, 404, 413, 500, 503)  # what may become of a request for the engine
PROMPT = (400, 404, 413, 500)
LORA = (400, 403, 413)
RENDERS = Operation("The exact prompt that a chat or completion request becomes.", "tokens", "RenderedPrompt",
                    (ChatRequest, CompletionRequest), fails=PROMPT)  # fmt: skip
STORED = Operation("Not supported: responses are not stored.", "responses", fails=(404,))
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("GET", "/v1/models"): Operation("The names of the model.", "models", "ModelList"),
    ("GET", "/v1/models/{name}"): Operation("One name of the model.", "models", "Model", fails=(404,)),
    ("POST", "/v1/completions"): Operation("Goes on with prompts.", "openai", "TextCompletion", (CompletionRequest,),
                                           "TextCompletionChunk", WORK),
    ("POST", "/v1/chat/completions"): Operation("Answers a conversation.", "openai", "ChatCompletion", (ChatRequest,),
                                                "ChatCompletionChunk", WORK),
    ("POST", "/v1/responses"): Operation("Answers items (OpenAI's Responses API); has no memory.", "openai", "ResponseAnswer",
                                         (ResponsesRequest,), "ResponseEvent", WORK),
    ("GET", "/v1/responses/{response_id}"): STORED,
    ("DELETE", "/v1/responses/{response_id}"): STORED,
    ("POST", "/v1/embeddings"): Operation("A vector for each input.", "openai", "EmbeddingResponse", (EmbeddingRequest,),
                                          fails=WORK),
    ("POST", "/v1/messages"): Operation("Answers a conversation (Anthropic's Messages API).", "anthropic", "MessageAnswer",
                                        (MessagesRequest,), "MessageEvent", WORK),
    ("POST", "/v1/messages/count_tokens"): Operation("The tokens of a conversation's prompt.", "anthropic", "TokenCount",
                                                     (CountTokensRequest,), fails=PROMPT),
    ("POST", "/inference/v1/generate"): Operation("Token ids in, token ids out.", "tokens", "Generated", (GenerateRequest,),
                                                  "GeneratedChunk", WORK),
    ("POST", "/tokenize"): Operation("The token ids of a text or a conversation.", "tokens", "Tokens", (TokenizeRequest,),
                                     fails=PROMPT),
    ("POST", "/detokenize"): Operation("The text of token ids.", "tokens", "Text", (DetokenizeRequest,), fails=PROMPT),
    ("POST", "/render"): RENDERS,
    ("POST", "/v1/completions/render"): RENDERS,
    ("POST", "/v1/chat/completions/render"): RENDERS,
    ("GET", "/health"): Operation("200 while requests can be served.", "operations", fails=(503,)),
    ("GET", "/ping"): Operation("200 while requests can be served.", "operations", fails=(503,)),
    ("GET", "/version"): Operation("jaxpaged's version.", "operations", "Version"),
    ("GET", "/load"): Operation("Requests that have not ended.", "operations", "Load"),
    ("GET", "/metrics"): Operation("Metrics for Prometheus.", "operations", media=TEXT),
    ("GET", "/openapi.json"): Operation("This document.", "operations", "Document"),
    ("POST", "/reset_prefix_cache"): Operation("Forgets the cached pages that no request holds.", "operations", fails=(500,)),
    ("POST", "/abort_requests"): Operation("Ends requests.", "operations", "Aborted", (AbortRequest,), fails=(400, 413)),
    ("POST", "/v1/load_lora_adapter"): Operation("Loads a LoRA adapter, which is a model of its own then.", "operations",
                                                 bodies=(LoadLoraRequest,), fails=LORA, media=TEXT),
    ("POST", "/v1/unload_lora_adapter"): Operation("Forgets a LoRA adapter.", "operations", bodies=(UnloadLoraRequest,),
                                                   fails=(*LORA, 404), media=TEXT),
    ("GET", "/"): Operation("The page: a playground and a live view.", "page", media=HTML),
    ("GET", "/live"): Operation("The live view's frames, without an end.", "page", events="Frame"),
}  # fmt: skip


async def document(service: Service, request: Request) -> Response:
    """GET /openapi.json. Made once: it takes longer than anything else here."""
    app = request.app
    if not hasattr(app.state, "document"):
        app.state.document = openapi(service, app.routes)
    return json_reply(app.state.document)


def openapi(service: Service, routes: Iterable[BaseRoute]) -> dict[str, Any]:
    """The document of an application with these routes. KeyError for one that is not in `OPERATIONS`."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path in methods(routes):
        paths.setdefault(path, {})[method.lower()] = _operation(service, method, path, OPERATIONS[method, path])
    components = {"schemas": schemas(service)}
    if service.options.api_key:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"},
                                         "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}  # fmt: skip
    return {
        "openapi": "3.1.0", "info": {"title": "jaxpaged", "version": jaxpaged.__version__, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": service.options.root_path or "/"}], "paths": paths, "components": components,
    }  # fmt: skip


def methods(routes: Iterable[BaseRoute]) -> list[tuple[str, str]]:
    """(method, path) of what the routes serve; a path's parameters without the patterns they are matched by."""
    found = [(method, route.path) for route in routes if isinstance(route, Route) for method in sorted(route.methods or ())]
    return [(method, re.sub(r":\w+}", "}", path)) for method, path in found if method != "HEAD"]


# -- operations ------------------------------------------------------------------------------------------------------------


def _operation(service: Service, method: str, path: str, one: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": one.summary, "tags": [one.tag], "operationId": _id(method, path),
                                 "responses": _responses(service, path, one)}  # fmt: skip
    if parameters := _parameters(path, one):
        described["parameters"] = parameters
    if one.bodies:
        kinds = [ref(kind.__name__) for kind in one.bodies]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    if service.options.api_key and path not in OPEN_PATHS:
        described["security"] = [{"bearer": []}, {"key": []}]
    return described


def _id(method: str, path: str) -> str:
    words = re.findall(r"\w+", path)
    return "_".join([method.lower(), *words] if words else [method.lower(), "page"])


def _parameters(path: str, one: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": name, "in": "path", "required": True, "schema": STRING}
                                   for name in re.findall(r"{(\w+)}", path)]  # fmt: skip
    if one.fails == WORK:
        text = "Becomes part of the answer's id, where the body has no request_id. At most 128 printable characters."
        found.append({"name": "X-Request-Id", "in": "header", "description": text, "schema": STRING})
    return found


def _responses(service: Service, path: str, one: Operation) -> dict[str, Any]:
    error = "AnthropicError" if path.startswith(ANTHROPIC_PATH) else "Error"
    fails = sorted({*one.fails, 401} if service.options.api_key and path not in OPEN_PATHS else one.fails)
    answers: dict[str, Any] = {} if one is STORED else {"200": _good(one)}
    for status in fails:
        kind = "Trouble" if one.tag == "operations" and status == 503 else error
        answers[str(status)] = {"description": STATUSES[status], "content": {JSON: {"schema": ref(kind)}}}
        if status == 503 and kind == error:
            text = "Seconds after which to try again."
            answers["503"]["headers"] = {"Retry-After": {"description": text, "schema": {"type": "integer"}}}
    return answers


def _good(one: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if one.answer is not None:
        content[JSON] = {"schema": ref(one.answer)}
    if one.events is not None:
        content[EVENTS] = {"schema": _event(one.events)}
    if one.media is not None:
        content[one.media] = {"schema": STRING}
    return {"description": one.summary, **({"content": content} if content else {})}


def _event(name: str) -> Schema:
    """One of a stream's events. OpenAI's streams may have an error among their chunks, and end with [DONE]."""
    chunks = name.endswith("Chunk")
    data = {"contentMediaType": JSON, "contentSchema": {"anyOf": [ref(name), ref("Error")]} if chunks else ref(name)}
    either = {"anyOf": [{"const": "[DONE]"}, data]} if chunks else data
    properties = {"data": {**STRING, **either}, "event": STRING}
    return {"type": "object", "description": "One event.", "required": ["data"], "properties": properties}


# -- schemas ---------------------------------------------------------------------------------------------------------------


def schemas(service: Service) -> dict[str, Schema]:
    """Every component: bodies by the names of their structs, answers."""
    bodies = list(dict.fromkeys(body for one in OPERATIONS.values() for body in one.bodies))
    template = "#/components/schemas/{name}"
    _, found = msgspec.json.schema_components([*bodies, SamplingParams, EmbeddingResponse, Frame], ref_template=template)
    for body in bodies:
        found[body.__name__] = _body(service, body, found[body.__name__])
    found["SamplingParams"] = _sampling(service, found["SamplingParams"])
    token = {"type": "integer", "minimum": 0, "maximum": service.engine.engine.limits.vocab_size - 1}
    return {**found, **ANSWERS, "TokenId": {**token, "description": "An id of the model's vocabulary."}}


def _body(service: Service, body: type[Body], schema: Schema) -> Schema:
    """A body as it is taken: null is the same as not given, fields that nobody knows are ignored or refused."""
    required = schema["required"]
    own = {name: _field(service, body.__name__, name, one, name not in required) for name, one in schema["properties"].items()}
    refused = {name: _refused(values) for name, values in sorted(body.REFUSED.items()) if name not in own}
    ignored = {name: {"description": "Taken; changes nothing."} for name in sorted(body.IGNORED) if name not in own}
    properties, more = {**own, **refused, **ignored}, not service.options.strict_fields
    return {**schema, "properties": properties, "additionalProperties": more, **BODIES.get(body.__name__, {})}


def _sampling(service: Service, schema: Schema) -> Schema:
    fields = {name: one for name, one in schema["properties"].items() if name not in NOT_FOR_HTTP}
    described = {name: _field(service, "SamplingParams", name, one, True) for name, one in fields.items()}
    return {**schema, "description": "", "properties": described, "additionalProperties": False}


def _field(service: Service, struct: str, name: str, schema: Schema, may_be_null: bool) -> Schema:
    said = rules(struct, name, service)
    replaced = ("type", "anyOf") if said.keys() & {"type", "anyOf", "enum", "$ref"} else ()
    merged = {**{key: value for key, value in schema.items() if key not in replaced}, **said}
    if merged.get("default", ...) is None:
        del merged["default"]
    return _nullable(merged) if may_be_null else merged


def _nullable(schema: Schema) -> Schema:
    """The schema, and null."""
    if "$ref" in schema:
        said = {key: value for key, value in schema.items() if key != "$ref"}
        return {"anyOf": [{"$ref": schema["$ref"]}, {"type": "null"}], **said}
    if "enum" in schema:
        return {**schema, "enum": [*(value for value in schema["enum"] if value is not None), None]}
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind != {"type": "null"}]
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        if len(kinds) == 1 and "type" in kinds[0]:
            return {**kinds[0], "type": [kinds[0]["type"], "null"], **rest}
        return {"anyOf": [*kinds, {"type": "null"}], **rest}
    return {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema


def _refused(values: tuple[Any, ...]) -> Schema:
    """A field that is not supported: null, and the values that ask for nothing."""
    distinct = [value for i, value in enumerate(values) if value not in values[:i]]
    return {"description": "Not supported: only what asks for nothing is taken.", "enum": [*distinct, None]}
