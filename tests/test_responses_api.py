"""OpenAI's Responses API through the openai package: what clients send, and that streams add up to the whole."""

import contextlib
import json
import re

import httpx
import openai
import pytest
from live_server import serve, wait_until
from scripted import echo, scripted_service

THOUGHT = "<think>\nHe greets; so do I.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 👩‍👧", "days": [1, 2]}}\n</tool_call>'
TOOLS = [
    {"type": "function", "name": "get_weather", "description": "Tomorrow's.", "parameters": {"type": "object"}, "strict": False}
]
LOGPROBS = ["message.output_text.logprobs"]
FALLS = "Fall over!"
prompts = []  # that the model has seen


def reply(prompt):
    prompts.append(prompt)
    if echo(prompt) == FALLS:
        raise RuntimeError("the model fell over")
    return echo(prompt)


@contextlib.contextmanager
def connected(seconds=0.0):
    """(client, live server) of a model that says what it is asked to; seconds: a step."""
    service = scripted_service(reply, seconds=seconds, tool_call_parser="hermes", reasoning_parser="qwen3")
    with serve(service) as live, openai.OpenAI(base_url=f"{live.base_url}/v1", api_key="-", max_retries=0) as client:
        yield client, live


@pytest.fixture(scope="module")
def client():
    with connected() as (client, _):
        yield client


def ask(client, input, **fields):
    return client.responses.create(model="scripted", input=input, temperature=0, **fields)


def prompt_of(client, input, **fields):
    """The prompt that an input becomes."""
    ask(client, input, **fields)
    return prompts[-1]


def plain(response):
    """A response without what differs from one to the next: ids, times, cached tokens."""
    body = response.to_dict()
    body["usage"] and body["usage"].pop("input_tokens_details")
    body.pop("completed_at", None), body.pop("created_at")
    for item in body["output"]:
        item.pop("parsed_arguments", None)
        for content in item.get("content", []):
            content.pop("parsed", None)
    return json.loads(re.sub(r'"(resp|msg|rs|fc|call)_[0-9a-f]{32}"', '"an id"', json.dumps(body)))


def test_a_text_is_answered_by_a_text(client):
    response = ask(client, "Hi there!", instructions="Be brief.", max_output_tokens=50, metadata={"a": "b"}, user="u")
    assert response.output_text == "Hi there!" and response.status == "completed"
    assert [item.type for item in response.output] == ["message"]
    assert response.id.startswith("resp_") and response.object == "response" and response.model == "scripted"
    assert response.metadata == {"a": "b"} and response.instructions == "Be brief." and response.user == "u"
    assert response.temperature == 0 and response.max_output_tokens == 50 and response.to_dict()["store"] is False
    assert response.error is None and response.incomplete_details is None
    usage = response.usage
    assert usage.output_tokens > 1 and usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_cached_and_reasoning_tokens_are_counted(client):
    said = THOUGHT + "Hi" + " the quick brown fox" * 20
    first, second = ask(client, said).usage, ask(client, said).usage
    assert first.input_tokens_details.cached_tokens < 32 and second.input_tokens_details.cached_tokens > 100
    assert 5 < second.output_tokens_details.reasoning_tokens < 25


def test_reasoning_text_and_calls_come_in_their_order(client):
    response = ask(client, THOUGHT + "I look." + CALL + CALL + "Looked.", tools=TOOLS)
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call", "message"]
    thought, _, call, other, last = response.output
    assert thought.content[0].text.strip() == "He greets; so do I." and thought.summary == []
    assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Köln 👩‍👧", "days": [1, 2]}
    assert call.call_id != other.call_id and last.content[0].text == "Looked."


REPLIES = {
    "text": "The quick brown fox. Grüße 👩‍👩‍👧!",
    "reasoning": THOUGHT + "Hi",
    "call": CALL,
    "everything": THOUGHT + "I look." + CALL + "\n" + CALL + " and so on",
    "broken call": 'So: <tool_call>\n{"name": "get_weather", "argum',
    "broken arguments": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kö',
    "nothing": "",  # but the end
    "only thoughts": "<think>\nhm",
}


@pytest.mark.parametrize("said", REPLIES.values(), ids=REPLIES)
def test_a_stream_adds_up_to_the_whole(client, said):
    fields = dict(tools=TOOLS, include=LOGPROBS, top_logprobs=2)
    whole = ask(client, said, **fields)
    with client.responses.stream(model="scripted", input=said, temperature=0, **fields) as stream:
        texts = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        streamed = stream.get_final_response()
    assert plain(streamed) == plain(whole)
    assert texts == whole.output_text


def test_what_is_broken_comes_back_as_text(client):
    assert ask(client, REPLIES["broken call"], tools=TOOLS).output_text == REPLIES["broken call"]
    assert ask(client, CALL).output_text == CALL  # nobody offered tools


def test_events_come_in_openais_order_and_are_numbered(client):
    seen = list(ask(client, THOUGHT + "Hi!" + CALL, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    names = [event.type.removeprefix("response.") for event in seen]
    assert [name for i, name in enumerate(names) if names[i - 1] != name] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    added, done = ([event for event in seen if event.type == f"response.output_item.{what}"] for what in ("added", "done"))
    assert [event.item.id for event in added] == [event.item.id for event in done]
    assert [event.output_index for event in added] == [0, 1, 2]
    assert added[2].item.name == "get_weather" and added[2].item.arguments == "" and added[1].item.content == []
    deltas = [event.delta for event in seen if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 3 and "".join(deltas) == done[2].item.arguments
    assert {event.item_id for event in seen if event.type == "response.output_text.delta"} == {added[1].item.id}
    assert seen[0].response.status == "in_progress" and seen[0].response.output == []
    assert seen[-1].response.status == "completed"


def test_an_answer_that_is_cut_is_incomplete(client):
    response = ask(client, "word " * 50, max_output_tokens=5)
    last = list(ask(client, "word " * 50, max_output_tokens=5, stream=True))[-1]
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output[-1].status == "incomplete" and response.usage.output_tokens == 5
    assert last.type == "response.incomplete" and plain(last.response) == plain(response)


def test_logprobs_are_those_of_the_text_alone(client):
    said = THOUGHT + "Grüße 👩‍👧" + CALL
    text = ask(client, said, tools=TOOLS, include=LOGPROBS, top_logprobs=3).output[1].content[0]
    without = ask(client, said, tools=TOOLS).output[1].content[0]
    assert b"".join(bytes(entry.bytes) for entry in text.logprobs).decode() == text.text == without.text
    assert {len(entry.top_logprobs) for entry in text.logprobs} == {3} and text.logprobs[0].logprob == -0.5
    assert without.logprobs == []


def test_a_call_can_be_forced_or_forbidden(client):
    arguments = '"city": "Bonn"}}\n</tool_call>'  # what comes behind the forced beginning
    forced = ask(client, arguments, tools=TOOLS, tool_choice={"type": "function", "name": "get_weather"})
    assert (forced.output[0].name, forced.output[0].arguments) == ("get_weather", '{"city": "Bonn"}')
    assert forced.tool_choice.name == "get_weather"
    assert ask(client, CALL, tools=TOOLS, tool_choice="none").output_text == CALL
    one = ask(client, CALL + CALL, tools=TOOLS, parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["function_call"]


def test_items_become_the_conversation_that_they_are(client):
    items = [
        {"role": "developer", "content": "Answer in German."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "A tool knows."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
            {"type": "output_text", "text": "Wait.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Bonn"}', "id": None},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]  # fmt: skip
    assert prompt_of(client, items, instructions="Be brief.") == (
        "<|im_start|>system\nBe brief.\nAnswer in German.<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nA tool knows.\n</think>\n\nWait.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool (get_weather)\nrain<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_answers_items_can_be_sent_back(client):
    asked = [{"role": "user", "content": THOUGHT + "I look." + CALL + "Looked."}]
    first = ask(client, asked, tools=TOOLS, include=["reasoning.encrypted_content"])
    call = next(item for item in first.output if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    second = ask(client, [*asked, *first.output, result], tools=TOOLS)
    assert second.output_text == "It rains."
    answer = prompts[-1].split("<|im_start|>assistant\n")[1]  # one message, whatever the number of items
    assert (
        answer.startswith("<think>\n")
        and "I look.\nLooked.\n<tool_call>\n" in answer
        and answer.endswith("<|im_start|>tool (get_weather)\nIt rains.<|im_end|>\n")
    )


def test_messages_of_the_assistant_stay_apart(client):
    said = [{"role": role, "content": role[0] * 3} for role in ("user", "assistant", "assistant", "user")]
    assert prompt_of(client, said).count("<|im_start|>assistant\naaa<|im_end|>") == 2


REFUSED = {
    "previous_response_id": (dict(previous_response_id="resp_1"), "stores no responses"),
    "conversation": (dict(conversation="conv_1"), "stores no"),
    "background": (dict(background=True), "stores no"),
    "truncation": (dict(truncation="auto"), "drop old items"),
    "tools[0].type": (dict(tools=[{"type": "web_search"}]), "'web_search'; this server takes function"),
    "tools[0].strict": (dict(tools=[{**TOOLS[0], "strict": True}]), "not held to the schema"),
    "tools[0].name": (dict(tools=[{"type": "function", "name": 3}]), "Expected `str`"),
    "text.format": (dict(text={"format": {"type": "json_object"}}), "format"),
    "text.verbosity": (dict(text={"verbosity": "low"}), "verbosity"),
    "reasoning.summary": (dict(reasoning={"summary": "detailed"}), "summary"),
    "reasoning_effort": (dict(reasoning={"effort": "very"}), "must be one of"),
    "tool_choice": (dict(tools=TOOLS, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": []}), "allowed_tools"),
    "include": (dict(include=["file_search_call.results"]), "can include"),
    "top_logprobs": (dict(top_logprobs=2), "needs include"),
    "max_tool_calls": (dict(max_tool_calls=3), "not supported"),
    "max_output_tokens": (dict(max_output_tokens=0), "at least 1"),
    "min_p": (dict(extra_body={"min_p": 3}), "[0, 1]"),
    "input": (dict(input=[]), "empty"),
    "input[0].type": (dict(input=[{"type": "item_reference", "id": "msg_1"}]), "item_reference"),
    "input[0].content[0].type": (dict(input=[{"role": "user", "content": [{"type": "input_image"}]}]), "input_image"),
    "input[0].role": (dict(input=[{"role": "chef", "content": "x"}]), "chef"),
    "input[0].arguments": (dict(input=[{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]), "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("param", REFUSED)
def test_what_is_not_there_is_refused_by_name(client, param):
    fields, words = REFUSED[param]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"input": "Hi", **fields})
    assert caught.value.param == param and words in caught.value.message


def test_vllms_fields_reach_the_sampler(client):
    more = {"stop": ["two"], "include_stop_str_in_output": True, "top_k": 5, "seed": 1}
    assert ask(client, "one two three", extra_body=more).output_text == "one two"


def test_effort_reaches_the_template(client):
    assert prompt_of(client, "Hi", reasoning={"effort": "none"}).endswith("<think>\n\n</think>\n\n")
    assert prompt_of(client, "Hi", reasoning={"effort": "high", "summary": "auto"}).endswith("assistant\n")


def test_a_request_that_fails_says_so(client):
    with pytest.raises(openai.InternalServerError, match="fell over"):
        ask(client, FALLS)
    seen = list(ask(client, FALLS, stream=True))
    assert [event.type for event in seen[-2:]] == ["error", "response.failed"]
    assert "fell over" in seen[-2].message and seen[-1].response.status == "failed"
    assert "fell over" in seen[-1].response.error.message


@pytest.fixture(scope="module")
def slow():
    """(client, live server) of a slow model."""
    with connected(seconds=0.01) as pair:
        yield pair


def begun(client):
    """A stream, of which some text has been read."""
    stream = ask(client, "word " * 300, stream=True)
    next(event for event in stream if event.type == "response.output_text.delta")
    return stream


def test_an_aborted_request_has_failed(slow):
    client, live = slow
    stream = begun(client)
    httpx.post(f"{live.base_url}/abort_requests", json={})
    last = list(stream)[-1]
    assert last.type == "response.failed" and "aborted" in last.response.error.message
    text = last.response.output[0].content[0].text
    assert text and ("word " * 300).startswith(text), "what had come by then"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_request(slow, streamed):
    client, live = slow
    if streamed:
        begun(client).close()
    else:
        with pytest.raises(openai.APITimeoutError):
            ask(client, "word " * 300, timeout=0.2)
    wait_until(lambda: not live.service.engine.streams, "the request ends", seconds=2)
    assert set(live.service.engine.engine.counters.finished) == {"abort"}


def test_nothing_is_stored(client):
    response = ask(client, "Hi", store=True)
    with pytest.raises(openai.NotFoundError, match="stores no responses"):
        client.responses.retrieve(response.id)


def test_an_id_of_the_clients_is_the_responses(client):
    assert ask(client, "Hi", extra_headers={"x-request-id": "mine-1"}).id == "resp_mine-1"
