"""/openapi.json says what the server does: it is valid, complete, and what it says of limits and answers is true. The server
that is asked is the real one, on a loopback port."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_server import LiveServer, serve
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from scripted import scripted_service
from scripted_vectors import scripted_engine_with_vectors
from starlette.routing import Route

from jaxpaged.async_engine import AsyncEngine
from jaxpaged.request import MAX_LOGIT_BIAS, MAX_NUM_SAMPLES, RequestError, SamplingParams
from jaxpaged_server.app import create_app
from jaxpaged_server.openapi import OPERATIONS, document, methods, openapi
from jaxpaged_server.openapi_answers import ANSWERS
from jaxpaged_server.openapi_fields import FIELDS
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service

MAX_MODEL_LEN = 256
ENDLESS = "/live"
MESSAGE = {"role": "user", "content": "hi"}
# The least that each endpoint takes, and what a field needs beside it.
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1]},
    "/v1/chat/completions": {"messages": [MESSAGE]},
    "/v1/messages": {"messages": [MESSAGE], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [MESSAGE]},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/inference/v1/generate": {"token_ids": [1]},
    "/tokenize": {"messages": [MESSAGE]},
    "/detokenize": {"tokens": [1]},
}
BESIDE = {
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
    "stream_interval": {"stream": True},
    "truncation_side": {"truncate_prompt_tokens": 1},
    "logprobs": {"max_tokens": 1},
    "min_tokens": {"max_tokens": None},
    "max_tokens": {"echo": True},
}
SAME_AS = {"max_completion_tokens": ["max_tokens"], "max_output_tokens": ["max_tokens"], "top_logprobs": ["logprobs"],
           "stop_sequences": ["stop"], "token_ids": ["prompt"]}  # fmt: skip  # what fields are called where they are checked


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    engine = scripted_engine_with_vectors("Hello there", max_model_len=MAX_MODEL_LEN)
    options = ServerOptions(max_num_prompts=8, tool_call_parser="hermes", reasoning_parser="qwen3")
    with serve(Service(AsyncEngine(engine), options, ["scripted"])) as live:
        yield live


@pytest.fixture(scope="module")
def client(live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.base_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def doc(client) -> dict[str, Any]:
    return client.get("/openapi.json").raise_for_status().json()


def described(**options: Any) -> dict[str, Any]:
    service = scripted_service("", **options)
    return openapi(service, create_app(service).routes)


def operations(doc: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method.upper(), path, one) for path, item in doc["paths"].items() for method, one in item.items()]


def body_schemas(doc: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema of each endpoint's body, by path; those of one struct."""
    found = {}
    for _, path, one in operations(doc):
        schema = one.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        if "$ref" in schema:
            found[path] = doc["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


# -- the document -----------------------------------------------------------------------------------------------------------


def test_it_is_a_valid_document(doc):
    schemathesis.openapi.from_dict(doc).validate()


def test_every_reference_leads_somewhere(doc):
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(doc)))
    assert names and names <= doc["components"]["schemas"].keys()


def test_every_schema_is_one(doc):
    for schema in doc["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_route_is_there(live, doc):
    app = create_app(scripted_service(""))
    assert sorted(methods(app.routes)) == sorted((method, path) for method, path, _ in operations(doc))


def test_a_route_that_nobody_described_is_noticed():
    routes = [*create_app(service := scripted_service("")).routes, Route("/new/{name:path}", document)]
    with pytest.raises(KeyError, match=re.escape("/new/{name}")):
        openapi(service, routes)


def test_every_field_is_there_and_described(doc):
    for body in {body for one in OPERATIONS.values() for body in one.bodies}:
        properties = doc["components"]["schemas"][body.__name__]["properties"]
        assert properties.keys() == {*body.__struct_encode_fields__, *body.REFUSED, *body.IGNORED}
        for name, schema in properties.items():
            assert schema.get("description"), f"{body.__name__}.{name}"


def test_no_description_is_left_over(doc):
    """A field that went away, or has another name now."""
    structs = {body.__name__: set(body.__struct_encode_fields__) for one in OPERATIONS.values() for body in one.bodies}
    structs["SamplingParams"] = set(SamplingParams.__dataclass_fields__)
    for name in FIELDS:
        struct, _, field = name.rpartition(".")
        assert any(field in fields for own, fields in structs.items() if struct in ("", own)), name


def test_answers_and_structs_have_names_of_their_own(doc):
    service = scripted_service("")
    assert len(doc["components"]["schemas"]) == len(openapi(service, [])["components"]["schemas"])
    bodies = {body.__name__ for one in OPERATIONS.values() for body in one.bodies}
    assert not bodies & ANSWERS.keys()
    titles = [schema["title"] for schema in doc["components"]["schemas"].values() if "title" in schema]
    assert not set(titles) & ANSWERS.keys()


def test_options_are_in_it():
    plain, told = described(), described(api_key=("k",), root_path="/llm", strict_fields=True)
    assert plain["servers"] == [{"url": "/"}] and told["servers"] == [{"url": "/llm"}]
    assert "securitySchemes" not in plain["components"] and "bearer" in told["components"]["securitySchemes"]
    chat = told["paths"]["/v1/chat/completions"]["post"]
    assert {"bearer": []} in chat["security"] and "401" in chat["responses"]
    assert "security" not in told["paths"]["/health"]["get"] and "401" not in plain["paths"]["/load"]["get"]["responses"]
    assert plain["components"]["schemas"]["ChatRequest"]["additionalProperties"] is True
    assert told["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


def test_keys_are_needed_where_it_says_so():
    with serve(scripted_service("", api_key=("k",))) as live:
        doc = httpx.get(f"{live.base_url}/openapi.json").json()
        for method, path, one in operations(doc):
            if "{" not in path:
                answer = httpx.request(method, live.base_url + path, json={} if "requestBody" in one else None)
                assert (answer.status_code == 401) == ("security" in one), path


# -- its limits are the server's --------------------------------------------------------------------------------------------


def edges(schema: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(values at a field's limits, values beyond them)."""
    step = 1 if "integer" in schema.get("type", ()) else 1e-3
    allowed, beyond = list[Any](), list[Any]()
    for limit, sign in (("minimum", -1), ("maximum", 1)):
        if limit in schema:
            allowed.append(schema[limit])
            beyond.append(schema[limit] + sign * step)
    if "exclusiveMinimum" in schema:
        allowed.append(schema["exclusiveMinimum"] + step)
        beyond.append(schema["exclusiveMinimum"])
    if "enum" in schema:
        allowed += [value for value in schema["enum"] if value is not None]
        beyond.append("nonsense")
    if "maxLength" in schema:
        allowed.append("x" * schema["maxLength"])
        beyond.append("x" * (schema["maxLength"] + 1))
    if "maxItems" in schema and schema["items"].get("type") == "string":
        allowed.append(["x"] * schema["maxItems"])
        beyond += [["x"] * (schema["maxItems"] + 1), [""]]
        if longest := schema["items"].get("maxLength"):
            allowed.append(["x" * longest])
            beyond.append(["x" * (longest + 1)])
    if schema.get("minItems") == 1:
        beyond.append([])
    return allowed, beyond


def refusal(answer: httpx.Response) -> str:
    """What an error says of the field at fault; empty if there is none."""
    if answer.status_code != 400:
        return ""
    error = answer.json()["error"]
    return f"{error.get('param')} {error['message']}"


def limited(doc: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(path, field, its schema, what a body needs beside it)."""
    for path, schema in body_schemas(doc).items():
        for field, one in schema["properties"].items():
            if path in LEAST and not (field in ("n", "messages") or "anyOf" in one or "Not supported" in one["description"]):
                more = {name: value for name, value in BESIDE.get(field, {}).items() if name in schema["properties"]}
                yield path, field, one, {**LEAST[path], **more}


def test_limits_of_fields_are_those_that_are_checked(client, doc):
    wrong, checked = [], 0
    for path, field, one, rest in limited(doc):
        allowed, beyond = edges(one)
        if field.startswith("max_") and path != "/v1/completions":
            allowed = allowed[:1]  # elsewhere, prompts are longer than one token
        for value in allowed:
            said = refusal(client.post(path, json={**rest, field: value}))
            if re.search(rf"\b{field}\b", said):
                wrong.append(f"{path} {field}={value!r:.80} was refused: {said}")
        for value in beyond:
            said = refusal(client.post(path, json={**rest, field: value}))
            names = (field, *SAME_AS.get(field, ()))
            if not any(name in said for name in names):
                wrong.append(f"{path} {field}={value!r:.80} was not refused: {said}")
        checked += len(allowed) + len(beyond)
    assert not wrong, "\n".join(wrong)
    assert checked > 150


def test_limits_of_sampling_params_are_theirs(doc):
    for field, one in doc["components"]["schemas"]["SamplingParams"]["properties"].items():
        beside = {"max_tokens": None} if field != "max_tokens" else {}
        allowed, beyond = edges(one)
        for value in allowed:
            assert SamplingParams(**{**beside, field: value}) is not None
        for value in beyond:
            if field in ("logprobs", "prompt_logprobs") or (field, value) == ("max_tokens", MAX_MODEL_LEN):
                continue  # the engine's business: see the test above
            with pytest.raises(RequestError, match=field):
                SamplingParams(**{**beside, field: value})
    assert doc["components"]["schemas"]["SamplingParams"]["properties"]["n"]["maximum"] == MAX_NUM_SAMPLES
    assert SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 0.0)) is not None


def test_fields_that_are_not_supported_take_what_it_says(client, doc):
    for path, schema in body_schemas(doc).items():
        refused = {field: one["enum"] for field, one in schema["properties"].items()
                   if path in LEAST and "enum" in one and "Not supported" in one["description"]}  # fmt: skip
        for i in range(max(map(len, refused.values()), default=0)):
            nothing = {field: values[min(i, len(values) - 1)] for field, values in refused.items()}
            answer = client.post(path, json={**LEAST[path], **nothing})
            assert answer.status_code == 200, f"{path} {nothing}: {answer.text:.300}"
        for field in refused:
            assert field in refusal(client.post(path, json={**LEAST[path], field: "please"}))


# -- schemathesis -----------------------------------------------------------------------------------------------------------

CHECKS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.response_headers_conformance, checks.negative_data_rejection,
          checks.missing_required_header, checks.unsupported_method]  # fmt: skip


def only_a_few(context: Any, body: Any) -> Any:
    """A hook: 16384 samples would be right, and take minutes."""
    for params in (body, body.get("sampling_params") if isinstance(body, dict) else None):
        if isinstance(params, dict) and isinstance(params.get("n"), int) and 2 < params["n"] <= MAX_NUM_SAMPLES:
            params["n"] = 2
    return body


def check_events(doc: dict[str, Any], path: str, content: str) -> None:
    """The events of a stream hold what the document says, and the last of OpenAI's is [DONE]."""
    said = doc["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
    chunk = said["anyOf"][1] if "anyOf" in said else said
    schema = {**chunk["contentSchema"], "components": doc["components"]}
    events = re.findall(r"^data: (.*)$", content, re.MULTILINE)
    assert events and (events[-1] == "[DONE]") == ("anyOf" in said)
    for event in events:
        if event != "[DONE]":
            jsonschema.validate(json.loads(event), schema)


def with_few(body: Any, required: set[str], data: st.DataObject) -> Any:
    """Of a body that is right, what is required and a few fields more: with all of them, some two never go together."""
    if not isinstance(body, dict):
        return body
    more = sorted(body.keys() - required)  # (of /tokenize, which takes a prompt too, messages may be missing)
    kept = required & body.keys() | data.draw(st.sets(st.sampled_from(more), max_size=4) if more else st.just(set()))
    return {name: with_whole_numbers(value) for name, value in body.items() if name in kept}


def with_whole_numbers(value: Any) -> Any:
    """JSON schema's integers may be written 1.0, which is right for a field but not within lists and objects."""
    if isinstance(value, list):
        return [with_whole_numbers(one) for one in value]
    if isinstance(value, dict):
        return {name: with_whole_numbers(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def try_all(live: LiveServer, doc: dict[str, Any], examples: int, without: tuple[str, ...] = ()) -> Counter[str]:
    """Asks every operation, rightly and wrongly; returns how often there was which status."""
    schema = schemathesis.openapi.from_dict(doc)
    schema.hook("map_body")(only_a_few)
    required = {path: set(LEAST[path]) for path in LEAST}
    seen: Counter[str] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
            if operation.path in without:
                continue

            @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
            def ask(case: Any, data: st.DataObject) -> None:
                if mode is GenerationMode.POSITIVE and operation.path in LEAST:  # noqa: B023
                    case.body = with_few(case.body, required[operation.path], data)  # noqa: B023
                response = case.call_and_validate(base_url=live.base_url, checks=CHECKS, timeout=60)
                if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
                    check_events(doc, case.path, response.content.decode())
                seen[f"{mode.value} {response.status_code}"] += 1  # noqa: B023

            ask()
    return seen


def test_streams_are_what_it_says(client, doc):
    streams = [path for _, path, one in operations(doc) if path != ENDLESS
               and "text/event-stream" in one["responses"].get("200", {}).get("content", {})]  # fmt: skip
    assert len(streams) >= 3
    for path in streams:
        answer = client.post(path, json={**LEAST[path], "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        check_events(doc, path, answer.text)


def test_answers_are_what_it_says(live, doc):
    seen = try_all(live, doc, 5, without=(ENDLESS, "/v1/completions/render", "/v1/chat/completions/render"))
    assert seen["positive 200"] > 30 and seen["negative 400"] > 30, seen
    live.check()


@pytest.mark.slow
def test_answers_are_what_it_says_in_a_thousand_cases(live, doc):
    seen = try_all(live, doc, 40, without=(ENDLESS,))
    assert seen["positive 200"] > 250 and seen["negative 400"] > 250, seen
    live.check()
