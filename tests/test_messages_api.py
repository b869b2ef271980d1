"""Anthropic's Messages API through the anthropic package: what clients send, and that streams add up to the whole."""

import contextlib
import json
import re

import anthropic
import httpx
import jiter
import pytest
from live_server import serve, wait_until
from scripted import echo, scripted_service

from jaxpaged_server.messages_output import arguments

THOUGHT = "<think>\nHe greets; so do I.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 👩‍👧", "days": [1, 2]}}\n</tool_call>'
TOOLS = [{"name": "get_weather", "description": "Tomorrow's.", "input_schema": {"type": "object"}}]
SAMPLING = {"temperature": 0.5, "top_k": 5, "top_p": 0.9}  # newer clients have no parameters for them
FALLS = "Fall over!"
prompts = []  # that the model has seen


def reply(prompt):
    prompts.append(prompt)
    if echo(prompt) == FALLS:
        raise RuntimeError("the model fell over")
    return echo(prompt)


@contextlib.contextmanager
def connected(seconds=0.0, **options):
    """(client, live server) of a model that says what it is asked to; seconds: a step."""
    parsers = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
    with serve(scripted_service(reply, seconds=seconds, **{**parsers, **options})) as live:
        with anthropic.Anthropic(base_url=live.base_url, api_key="key", max_retries=0) as client:
            yield client, live


@pytest.fixture(scope="module")
def client():
    with connected() as (client, _):
        yield client


def body_of(said, **fields):
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    return {"model": "scripted", "messages": messages, "max_tokens": 500, **fields}


def ask(client, said, **fields):
    return client.messages.create(**body_of(said, **fields))


def prompt_of(client, said, **fields):
    """The prompt that messages become."""
    ask(client, said, **fields)
    return prompts[-1]


def plain(message):
    """A message without what differs from one to the next: ids, cached tokens."""
    body = message.to_dict(exclude_none=True)
    for name in ("input_tokens", "cache_read_input_tokens"):
        body["usage"].pop(name)
    for block in body["content"]:
        block.pop("parsed_output", None)
    return json.loads(re.sub(r'"(msg|call)_[0-9a-f]{32}"', '"an id"', json.dumps(body)))


def test_a_text_is_answered_by_a_text(client):
    message = ask(client, "Hi there!", system="Be brief.", metadata={"user_id": "u"}, extra_body=SAMPLING)
    assert [(block.type, block.text) for block in message.content] == [("text", "Hi there!")]
    assert message.id.startswith("msg_") and (message.type, message.role, message.model) == ("message", "assistant", "scripted")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None) and message.usage.output_tokens > 1


def test_cached_tokens_are_counted_apart(client):
    said = "Hi" + " the quick brown fox" * 20
    count = client.messages.count_tokens(model="scripted", messages=[{"role": "user", "content": said}]).input_tokens
    first, second = ask(client, said).usage, ask(client, said).usage
    assert second.cache_read_input_tokens > first.cache_read_input_tokens
    for usage in (first, second):
        assert usage.input_tokens + usage.cache_read_input_tokens == count and usage.cache_creation_input_tokens == 0


def test_thoughts_text_and_calls_come_in_their_order(client):
    message = ask(client, THOUGHT + "I look." + CALL + CALL + "Looked.", tools=TOOLS)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use", "text"]
    thought, _, call, other, last = message.content
    assert thought.thinking.strip() == "He greets; so do I." and thought.signature
    assert call.name == "get_weather" and call.input == {"city": "Köln 👩‍👧", "days": [1, 2]}
    assert call.id != other.id and last.text == "Looked." and message.stop_reason == "tool_use"


REPLIES = {
    "text": "The quick brown fox. Grüße 👩‍👩‍👧!",
    "thoughts": THOUGHT + "Hi",
    "call": CALL,
    "everything": THOUGHT + "I look." + CALL + "\n" + CALL + " and so on",
    "broken call": 'So: <tool_call>\n{"name": "get_weather", "argum',
    "broken input": '<tool_call>\n{"name": "get_weather", "arguments": {"days": [1, 2], "city": "Kö',
    "nothing": "",  # but the end
    "only thoughts": "<think>\nhm",
    "a stop": "one two STOP three",
}


@pytest.mark.parametrize("said", REPLIES.values(), ids=REPLIES)
def test_a_stream_adds_up_to_the_whole(client, said):
    fields = body_of(said, tools=TOOLS, stop_sequences=["STOP"])
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        texts = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert plain(streamed) == plain(whole)
    assert texts == "".join(block.text for block in whole.content if block.type == "text")
    ours, theirs = (message.usage.input_tokens + message.usage.cache_read_input_tokens for message in (whole, streamed))
    assert ours == theirs


def test_what_is_broken_comes_back_as_text(client):
    assert ask(client, REPLIES["broken call"], tools=TOOLS).content[0].text == REPLIES["broken call"]
    assert ask(client, CALL).content[0].text == CALL  # nobody offered tools


def test_events_come_in_anthropics_order(client):
    fields = body_of(THOUGHT + "Hi!" + CALL, tools=TOOLS, stream=True)
    reply = httpx.post(f"{client.base_url}/v1/messages", json=fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    names = re.findall("^event: (.*)$", reply.text, re.MULTILINE)
    seen = [json.loads(data) for data in re.findall("^data: (.*)$", reply.text, re.MULTILINE)]
    assert names == [event["type"] for event in seen]
    kinds = [event.get("delta", event).get("type", event["type"]) for event in seen]
    assert [kind for i, kind in enumerate(kinds) if kinds[i - 1] != kind] == [
        "message_start", "ping",
        "content_block_start", "thinking_delta", "signature_delta", "content_block_stop",
        "content_block_start", "text_delta", "content_block_stop",
        "content_block_start", "input_json_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    blocks = [event for event in seen if event["type"] == "content_block_start"]
    assert [block["index"] for block in blocks] == [0, 1, 2]
    assert blocks[2]["content_block"]["name"] == "get_weather" and blocks[2]["content_block"]["input"] == {}
    begun, ended = seen[0]["message"], seen[-2]
    assert begun["content"] == [] and begun["stop_reason"] is None and begun["usage"]["input_tokens"] > 0
    assert ended["delta"]["stop_reason"] == "tool_use" and ended["usage"]["output_tokens"] > 5


def test_why_an_answer_ended(client):
    cut = ask(client, "word " * 50, max_tokens=5)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 5
    stopped = ask(client, "one two three", stop_sequences=["none", " three"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " three")
    assert stopped.content[0].text == "one two"
    assert ask(client, CALL, tools=TOOLS, max_tokens=20).stop_reason == "max_tokens"
    assert ask(client, "Hi", max_tokens=10_000).stop_reason == "end_turn"  # more than the context has: no limit


def test_a_call_can_be_forced_or_forbidden(client):
    arguments = '"city": "Bonn"}}\n</tool_call>'  # what comes behind the forced beginning
    forced = ask(client, arguments, tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"})
    assert (forced.content[0].name, forced.content[0].input) == ("get_weather", {"city": "Bonn"})
    any_of_them = ask(client, 'get_weather", "arguments": {}}', tools=TOOLS, tool_choice={"type": "any"})
    assert (any_of_them.content[0].name, any_of_them.stop_reason) == ("get_weather", "tool_use")
    assert ask(client, CALL, tools=TOOLS, tool_choice={"type": "none"}).content[0].text == CALL
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert [block.type for block in ask(client, CALL + CALL, tools=TOOLS, tool_choice=choice).content] == ["tool_use"]


def test_blocks_become_the_conversation_that_they_are(client):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "A tool knows.", "signature": "s"}, {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Wait."},
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Bonn"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no such tool", "is_error": True},
            {"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    assert prompt_of(client, messages, system=system) == (
        "<|im_start|>system\nBe brief.\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nA tool knows.\n</think>\n\nWait.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool (get_weather)\nrain<|im_end|>\n"
        "<|im_start|>tool\nError: no such tool<|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_answers_blocks_can_be_sent_back(client):
    asked = [{"role": "user", "content": THOUGHT + "I look." + CALL}]
    first = ask(client, asked, tools=TOOLS)
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": "It rains."}
    messages = [*asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = ask(client, messages, tools=TOOLS)
    assert second.content[0].text == "It rains." and "</think>\n\n\n\nI look.\n<tool_call>" in prompts[-1]


def test_an_assistants_last_message_is_gone_on_with(client):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I say: "}]
    assert prompt_of(client, messages).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nI say: ")


def test_tools_and_thinking_reach_the_template(client):
    assert '"name": "get_weather", "description": "Tomorrow\'s.", "parameters": {"type": "object"}' in prompt_of(
        client, "Hi", tools=TOOLS
    )
    assert prompt_of(client, "Hi", thinking={"type": "disabled"}).endswith("<think>\n\n</think>\n\n")
    enabled = {"type": "enabled", "budget_tokens": 1024}
    assert prompt_of(client, "Hi", thinking=enabled, output_config={"effort": "high"}).endswith("assistant\n")


def test_thoughts_can_be_omitted(client):
    fields = body_of(THOUGHT + "Hi", thinking={"type": "adaptive", "display": "omitted"})
    message = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    assert message.content[0].thinking == "" and message.content[1].text.strip() == "Hi"
    assert plain(message) == plain(streamed)


def test_count_tokens_counts_the_prompt(client):
    fields = dict(system="Be brief.", tools=TOOLS, thinking={"type": "disabled"})
    counted = client.messages.count_tokens(model="scripted", messages=[{"role": "user", "content": "Hi"}], **fields)
    usage = ask(client, "Hi", **fields).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def user(*blocks):
    return [{"role": "user", "content": list(blocks)}]


REFUSED = {
    "messages[0].content[0] has the type 'image'": dict(said=user({"type": "image", "source": {}})),
    "messages[0].content[0].text": dict(said=user({"type": "text", "text": 3})),
    "messages[0].content[0].content[0] has the type 'document'":
        dict(said=user({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]})),
    "messages must not be an empty list": dict(said=[]),
    "messages[0].role": dict(said=[{"role": "chef", "content": "x"}]),
    "tool_result blocks must follow": dict(said=[{"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]),
    "tools[0] has the type 'web_search_20250305'": dict(tools=[{"type": "web_search_20250305", "name": "web_search"}]),
    "tools[0].strict is not supported": dict(tools=[{**TOOLS[0], "strict": True}]),
    "tools[0]: Object missing required field `input_schema`": dict(tools=[{"name": "f"}]),
    "not among the tools": dict(tools=TOOLS, tool_choice={"type": "tool", "name": "other"}),
    "needs the tool's name": dict(tools=TOOLS, tool_choice={"type": "tool"}),
    "tool_choice needs tools": dict(tool_choice={"type": "any"}),
    "output_config.format": dict(output_config={"format": {"type": "json_schema", "schema": {}}}),
    "max_tokens must be at least 1": dict(max_tokens=0),
    "stop_sequences": dict(stop_sequences=[""]),
    "temperature": dict(extra_body={"temperature": 3}),
    "mcp_servers is not supported": dict(extra_body={"mcp_servers": [{}]}),
    "maximum context length is 2048": dict(said="word " * 3000),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_there_is_refused_in_anthropics_shape(client, words):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **{"said": "Hi", **REFUSED[words]})
    assert caught.value.body["type"] == "error" and caught.value.body["error"]["type"] == "invalid_request_error"
    assert words in caught.value.body["error"]["message"]


def test_max_tokens_is_needed_and_the_model_must_be_there(client):
    fields = body_of("Hi")
    del fields["max_tokens"]
    missing = httpx.post(f"{client.base_url}/v1/messages", json=fields)
    assert missing.status_code == 400 and "max_tokens" in missing.json()["error"]["message"]
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(client, "Hi", model="other")
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_a_request_that_fails_says_so(client):
    with pytest.raises(anthropic.InternalServerError, match="fell over"):
        ask(client, FALLS)
    with (
        pytest.raises(anthropic.APIStatusError, match="fell over") as caught,
        client.messages.stream(**body_of(FALLS)) as stream,
    ):
        stream.until_done()
    assert caught.value.body["error"]["type"] == "api_error"


def test_a_client_that_leaves_ends_its_request():
    with connected(seconds=0.01) as (client, live):
        stream = ask(client, "word " * 300, stream=True)
        next(event for event in stream if event.type == "content_block_delta")
        stream.close()
        with pytest.raises(anthropic.APITimeoutError):
            ask(client, "word " * 300, timeout=0.2)
        wait_until(lambda: not live.service.engine.streams, "the requests end", seconds=2)
        assert live.service.engine.engine.counters.finished == {"abort": 2}


def test_an_aborted_request_has_failed():
    with connected(seconds=0.01) as (client, live):
        stream = ask(client, "word " * 300, stream=True)
        next(event for event in stream if event.type == "content_block_delta")
        httpx.post(f"{live.base_url}/abort_requests", json={})
        with pytest.raises(anthropic.APIStatusError, match="aborted") as caught:
            list(stream)
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_the_key_may_come_as_anthropics_clients_send_it():
    with connected(api_key=("key",)) as (client, live):
        assert ask(client, "Hi").content[0].text == "Hi"
        refused = httpx.post(f"{live.base_url}/v1/messages", json=body_of("Hi"), headers={"x-api-key": "other"})
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"


def test_input_that_breaks_off_is_what_the_client_makes_of_it():
    text = '{"city": "K\\"öl\\u00e9n \\\\", "n": [1, 2.5e3, {"a": null, "b": [true, "x,]"]}], "e": {}, "z": -12}'
    for end in range(1, len(text) + 1):
        assert arguments(text[:end]) == jiter.from_json(text[:end].encode(), partial_mode=True)
