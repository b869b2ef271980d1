"""The real server and OpenAI's own client, on an engine whose model says what the test has it say: shapes, order, errors."""

import json

import httpx
import openai
import pytest
from live_server import serve
from scripted import END, START, scripted_service

TEXT = "Grüße 👩‍👩‍👧 from the fox: 1 2 3."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
THOUGHT = "<think>the fox, hm</think>"


def parrot(prompt: str) -> str:
    """Says what the user has said last; of a text, the whole."""
    _, found, after = prompt.rpartition(f"{START}user\n")
    return after.partition(END)[0] if found else prompt


@pytest.fixture(scope="module")
def live():
    with serve(scripted_service(parrot, tool_call_parser="hermes", reasoning_parser="qwen3")) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=f"{live.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(live):
    with httpx.Client(base_url=live.base_url) as http:
        yield http


def complete(client, prompt, **options):
    return client.completions.create(model="scripted", prompt=prompt, **{"max_tokens": 100, "temperature": 0, **options})


def chat(client, says, **options):
    """A conversation in which the model will say `says`."""
    messages = options.pop("messages", [{"role": "user", "content": says}])
    return client.chat.completions.create(model="scripted", messages=messages, **{"temperature": 0, **options})


def refused(kind: type[openai.APIStatusError], call, *arguments, **options) -> dict:
    """The error's body, of a call that the server refuses."""
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    assert caught.value.body["code"] == caught.value.status_code
    return caught.value.body


def ids_of(http, text: str) -> list[int]:
    return http.post("/tokenize", json={"prompt": text}).json()["tokens"]


# -- /v1/completions -------------------------------------------------------------------------------------------------------


def test_a_completion_has_openais_fields(client, http):
    answer = complete(client, TEXT)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (TEXT, "stop", 0, None)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "scripted"
    size = len(ids_of(http, TEXT))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (size, size + 1, 2 * size + 1)  # and EOS


def test_max_tokens_is_16_unless_said_otherwise(client):
    assert complete(client, TEXT, max_tokens=3).usage.completion_tokens == 3
    answer = complete(client, TEXT * 2, max_tokens=None)
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_echo_shows_the_prompt_first(client):
    assert complete(client, "the fox. ", echo=True).choices[0].text == "the fox. the fox. "
    alone = complete(client, "the fox. ", echo=True, max_tokens=0)
    assert alone.choices[0].text == "the fox. " and alone.usage.completion_tokens == 0
    assert refused(openai.BadRequestError, complete, client, "the fox", max_tokens=0)["param"] == "max_tokens"


@pytest.mark.parametrize("max_tokens", [0, 100])
def test_echoed_prompts_have_logprobs_of_their_own(client, http, max_tokens):
    answer = complete(client, "the fox. ", echo=True, logprobs=2, max_tokens=max_tokens).choices[0]
    scores, size = answer.logprobs, len(ids_of(http, "the fox. "))
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert all(p < 0 for p in scores.token_logprobs[1:]) and len(scores.token_logprobs) == (
        size if not max_tokens else 2 * size + 1
    )
    assert "".join(scores.tokens[:size]) == "the fox. "


def test_logprobs_say_where_each_token_stands(client):
    choice = complete(client, "the quick brown fox", logprobs=3).choices[0]
    scores = choice.logprobs
    assert len({len(column) for column in (scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset)}) == 1
    for offset, token in zip(scores.text_offset[:-1], scores.tokens):
        assert choice.text[offset:].startswith(token)
    assert all(len(top) == 3 and token in top for token, top in zip(scores.tokens, scores.top_logprobs))
    assert refused(openai.BadRequestError, complete, client, "x", logprobs=10_000)["param"] == "logprobs"


def test_streamed_offsets_go_on_where_the_last_chunk_ended(client):
    whole = complete(client, "the quick brown fox", logprobs=1, echo=True).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in complete(client, "the quick brown fox", logprobs=1, echo=True, stream=True)]
    for column in ("tokens", "text_offset", "token_logprobs"):
        assert sum((getattr(chunk, column) for chunk in chunks if chunk), []) == getattr(whole, column)


def test_several_prompts_are_numbered_prompt_by_prompt(client, http):
    answer = complete(client, ["the fox", "a dog"], n=2, temperature=1)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "the fox"), (1, "the fox"), (2, "a dog"), (3, "a dog")]
    sizes = len(ids_of(http, "the fox")) + len(ids_of(http, "a dog"))
    assert answer.usage.prompt_tokens == sizes and answer.usage.completion_tokens == 2 * (sizes + 2)


def test_prompts_may_be_token_ids(client, http):
    fox, dog = ids_of(http, "the fox"), ids_of(http, "a dog")
    assert [c.text for c in complete(client, fox, echo=True).choices] == ["the foxthe fox"]
    assert [c.text for c in complete(client, [fox, dog]).choices] == ["the fox", "a dog"]


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], "a"], [[]], "", [1.5], [10**6], [-1]])
def test_prompts_that_are_none(client, prompt):
    assert refused(openai.BadRequestError, complete, client, prompt)["message"]


def test_stop_strings_and_ids_end_the_text(client, http):
    choice = complete(client, TEXT, stop=["never", " from"]).choices[0]
    assert choice.text == "Grüße 👩‍👩‍👧" and choice.finish_reason == "stop" and choice.stop_reason == " from"
    kept = complete(client, TEXT, stop=" from", extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == "Grüße 👩‍👩‍👧 from"
    (colon,) = ids_of(http, ":")
    by_id = complete(client, "a: b", extra_body={"stop_token_ids": [colon]}).choices[0]
    assert by_id.text == "a" and by_id.stop_reason == colon
    assert complete(client, "a b").choices[0].stop_reason is None  # EOS


def test_a_suffix_is_refused(client):
    assert refused(openai.BadRequestError, complete, client, "x", suffix="y")["param"] == "suffix"
    assert complete(client, "x", suffix="").choices[0].text == "x"


@pytest.mark.parametrize("interval", [1, 4])
def test_a_streamed_completion_is_the_same_text(client, interval):
    chunks = list(complete(client, TEXT, stream=True, extra_body={"stream_interval": interval}))
    assert "".join(c.choices[0].text for c in chunks) == TEXT
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1 and all(c.usage is None for c in chunks)


def test_a_stream_interval_makes_fewer_chunks(client):
    count = lambda interval: len(list(complete(client, TEXT, stream=True, extra_body={"stream_interval": interval})))
    assert count(8) <= count(1) / 4
    assert (
        refused(openai.BadRequestError, complete, client, "x", stream=True, extra_body={"stream_interval": 0})["param"]
        == "stream_interval"
    )


def test_a_stream_interval_does_not_hold_back_the_first_token(client):
    first = next(iter(complete(client, TEXT, stream=True, extra_body={"stream_interval": 1000}))).choices[0].text
    assert first and TEXT.startswith(first) and first != TEXT  # a reader who is late finds two tokens, but not all


def test_streams_of_several_prompts_and_samples(client):
    texts = dict.fromkeys(range(4), "")
    for chunk in complete(client, ["the fox", "a dog"], n=2, temperature=1, stream=True, echo=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "the foxthe fox", 1: "the foxthe fox", 2: "a doga dog", 3: "a doga dog"}


def test_usage_in_streams(client):
    whole = complete(client, TEXT).usage
    *chunks, last = complete(client, TEXT, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole and all(chunk.usage is None for chunk in chunks)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(client, TEXT, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1 and last.usage == whole
    assert refused(openai.BadRequestError, complete, client, "x", stream_options=options)["param"] == "stream_options"


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-2, None)), ("right", slice(None, 2))])
def test_long_prompts_may_be_cut(client, http, side, kept):
    ids = ids_of(http, "the quick brown fox")
    options = {"truncate_prompt_tokens": 2, "truncation_side": side, "return_token_ids": True}
    assert complete(client, ids, extra_body=options).choices[0].prompt_token_ids == ids[kept]


def test_the_longest_prompt_that_fits_is_kept(client, http):
    answer = complete(client, [5] * 3000, max_tokens=1, extra_body={"truncate_prompt_tokens": -1})
    assert answer.usage.prompt_tokens == 2047 and answer.choices[0].finish_reason == "length"
    for wrong in (0, -2):
        assert (
            refused(openai.BadRequestError, complete, client, "x", extra_body={"truncate_prompt_tokens": wrong})["param"]
            == "truncate_prompt_tokens"
        )


def test_token_ids_on_demand(client, http):
    ids = ids_of(http, TEXT)
    choice = complete(client, TEXT, extra_body={"return_token_ids": True}).choices[0]
    assert choice.prompt_token_ids == ids and choice.token_ids[:-1] == ids
    chunks = [c.choices[0] for c in complete(client, TEXT, stream=True, extra_body={"return_token_ids": True})]
    assert chunks[0].prompt_token_ids == ids and all(c.prompt_token_ids is None for c in chunks[1:])
    assert sum((c.token_ids for c in chunks), [])[:-1] == ids


def test_prompt_logprobs(client, http):
    ids = ids_of(http, "the quick brown fox")
    first, *scores = complete(client, "the quick brown fox", extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs
    assert first is None and len(scores) == len(ids) - 1
    assert all(score[str(i)]["logprob"] < 0 and score[str(i)]["rank"] >= 1 for i, score in zip(ids[1:], scores))
    body = refused(openai.BadRequestError, complete, client, "x", stream=True, extra_body={"prompt_logprobs": 1})
    assert body["param"] == "prompt_logprobs"


def test_tokens_may_be_named_by_id(client, http):
    (fox,) = ids_of(http, "q")
    scores = complete(client, "q", logprobs=0, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    assert scores.tokens[0] == f"token_id:{fox}"


# -- /v1/chat/completions --------------------------------------------------------------------------------------------------


def test_a_chat_has_openais_fields(client):
    answer = chat(client, TEXT)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.message.tool_calls is None and choice.message.refusal is None and choice.logprobs is None
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"


def rendered(http, **body) -> str:
    reply = http.post("/v1/chat/completions/render", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["prompt"]


def test_the_system_message_and_parts_of_content(client, http):
    parts = [{"type": "text", "text": "the quick"}, {"type": "text", "text": "brown fox"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    expected = f"{START}system\nBe brief.{END}\n{START}user\nthe quick\nbrown fox{END}\n{START}assistant\n"
    assert rendered(http, messages=messages) == expected
    assert chat(client, "", messages=messages).choices[0].message.content == "the quick\nbrown fox"
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert "image_url" in refused(openai.BadRequestError, chat, client, "", messages=picture)["message"]


def test_the_chunks_of_a_stream_come_in_order(client):
    first, *middle, last = (chunk.choices[0] for chunk in chat(client, TEXT, stream=True))
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert all(choice.delta.role is None and choice.finish_reason is None for choice in middle) and last.finish_reason == "stop"
    assert "".join(choice.delta.content or "" for choice in (*middle, last)) == TEXT
    assert not any("\ufffd" in (choice.delta.content or "") for choice in middle)  # no half characters


def test_usage_of_a_chat_stream(client):
    *chunks, last = chat(client, TEXT, stream=True, stream_options={"include_usage": True})
    assert last.usage == chat(client, TEXT).usage and last.choices == []
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1


def test_chat_logprobs_have_bytes(client):
    *entries, end = chat(client, TEXT, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == TEXT
    assert end.token == END and all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in entries)
    assert all(len(e.top_logprobs) == 0 for e in chat(client, TEXT, logprobs=True).choices[0].logprobs.content)
    streamed = chat(client, TEXT, logprobs=True, top_logprobs=2, stream=True)
    assert sum((c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs), []) == [*entries, end]
    assert refused(openai.BadRequestError, chat, client, "x", top_logprobs=2)["param"] == "top_logprobs"


def test_several_answers(client):
    answer = chat(client, TEXT, n=2, temperature=1)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, TEXT), (1, TEXT)]
    texts, roles = {0: "", 1: ""}, []
    for chunk in chat(client, TEXT, n=2, temperature=1, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        roles += [chunk.choices[0].index] * bool(chunk.choices[0].delta.role)
    assert texts == {0: TEXT, 1: TEXT} and sorted(roles) == [0, 1]
    assert refused(openai.BadRequestError, chat, client, TEXT, n=2)["param"] == "n"  # greedy: twice the same


def test_how_long_an_answer_may_be(client):
    assert chat(client, "a b c d e f g", max_tokens=2).usage.completion_tokens == 2
    assert chat(client, "a b c d e f g", max_tokens=9, max_completion_tokens=3).choices[0].finish_reason == "length"
    answer = chat(client, "1" * 1900, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 2048  # no limit given: to the end of the context
    assert refused(openai.BadRequestError, chat, client, "x", max_completion_tokens=0)["param"] == "max_completion_tokens"
    assert "maximum context length is 2048 tokens" in refused(openai.BadRequestError, chat, client, "1" * 2048)["message"]


# -- tools -----------------------------------------------------------------------------------------------------------------


def gathered(stream) -> tuple[str, list[dict], str | None]:
    """(content, calls, the reason of the end) of a chat stream, put together as clients do it."""
    content, calls, reason = "", [], None
    for chunk in stream:
        choice = chunk.choices[0]
        content, reason = content + (choice.delta.content or ""), choice.finish_reason or reason
        for piece in choice.delta.tool_calls or []:
            if piece.index == len(calls):
                assert piece.id and piece.type == "function"
                calls.append({"name": piece.function.name, "arguments": ""})
            calls[piece.index]["arguments"] += piece.function.arguments or ""
    return content, calls, reason


def whole(answer) -> tuple[str, list[dict], str | None]:
    choice = answer.choices[0]
    calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in choice.message.tool_calls or []]
    return choice.message.content or "", calls, choice.finish_reason


WEATHER_CALL = {"name": "weather", "arguments": '{"city": "Köln"}'}


@pytest.mark.parametrize("says, expected", [
    (CALL, ("", [WEATHER_CALL], "tool_calls")),
    (f"Let me see.\n{CALL}", ("Let me see.", [WEATHER_CALL], "tool_calls")),
    (f"{CALL}\n{CALL}", ("", [WEATHER_CALL] * 2, "tool_calls")),
    ("No tool for that.", ("No tool for that.", [], "stop")),
    ("<tool_call>\nnot JSON\n</tool_call>", ("<tool_call>\nnot JSON\n</tool_call>", [], "stop")),
])  # fmt: skip
def test_tool_calls_are_read_and_streamed(client, says, expected):
    content, calls, reason = whole(chat(client, says, tools=[WEATHER], tool_choice="auto"))
    assert (content.strip(), calls, reason) == expected
    assert gathered(chat(client, says, tools=[WEATHER], stream=True)) == (content, calls, reason)


def test_one_call_only(client):
    _, calls, _ = whole(chat(client, f"{CALL}\n{CALL}", tools=[WEATHER], parallel_tool_calls=False))
    assert calls == [WEATHER_CALL]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice, says, reason", [
    ("required", 'weather", "arguments": {"city": "Köln"}}\n</tool_call>', "tool_calls"),
    ({"type": "function", "function": {"name": "weather"}}, '"city": "Köln"}}\n</tool_call>', "stop"),
])  # fmt: skip
def test_a_call_can_be_forced(client, http, choice, says, reason, stream):
    body = {"messages": [{"role": "user", "content": says}], "tools": [WEATHER], "tool_choice": choice}
    opened = rendered(http, **body).rpartition("assistant\n")[2]
    assert opened.startswith("<tool_call>") and "{" in opened
    assert json.loads(opened.removeprefix("<tool_call>") + says.removesuffix("</tool_call>"))["name"] == "weather"
    answer = chat(client, says, tools=[WEATHER], tool_choice=choice, stream=stream)
    assert (gathered if stream else whole)(answer) == ("", [WEATHER_CALL], reason)


def test_tool_choice_none_leaves_the_text_alone(client):
    assert whole(chat(client, CALL, tools=[WEATHER], tool_choice="none")) == (CALL, [], "stop")


@pytest.mark.parametrize("options, param", [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": []}, "tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "whether"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict"),
])  # fmt: skip
def test_tools_that_cannot_be_served(client, options, param):
    assert refused(openai.BadRequestError, chat, client, "x", **options)["param"] == param


def test_the_answer_of_a_tool_goes_back(client, http):
    call = chat(client, CALL, tools=[WEATHER]).choices[0].message
    messages = [{"role": "user", "content": "Köln?"}, call.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "rain"}]  # fmt: skip
    prompt = rendered(http, messages=messages, tools=[WEATHER])
    assert '"arguments": {"city": "Köln"}' in prompt and f"{START}tool\nrain{END}" in prompt
    assert chat(client, "", messages=messages, tools=[WEATHER]).choices[0].message.content == "Köln?"


# -- reasoning, templates --------------------------------------------------------------------------------------------------


def test_reasoning_comes_under_both_names(client):
    message = chat(client, f"{THOUGHT}A fox.").choices[0].message
    assert message.reasoning == message.reasoning_content == "the fox, hm" and message.content == "A fox."
    deltas = [c.choices[0].delta for c in chat(client, f"{THOUGHT}A fox.", stream=True)]
    assert "".join(getattr(d, "reasoning", None) or "" for d in deltas) == message.reasoning
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning
    assert "".join(d.content or "" for d in deltas) == "A fox."
    hidden = chat(client, f"{THOUGHT}A fox.", extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "A fox." and not hasattr(hidden, "reasoning")


def test_reasoning_and_a_call(client):
    answer = chat(client, THOUGHT + CALL, tools=[WEATHER])
    assert whole(answer) == ("", [WEATHER_CALL], "tool_calls") and answer.choices[0].message.reasoning == "the fox, hm"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_may_come_under_either_name(http, name):
    messages = [
        {"role": "user", "content": "fox?"},
        {"role": "assistant", "content": "Yes.", name: "hm"},
        {"role": "user", "content": "dog?"},
    ]
    assert f"{START}assistant\n<think>\nhm\n</think>\n\nYes.{END}" in rendered(http, messages=messages)


@pytest.mark.parametrize("body", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}])
def test_thinking_can_be_switched_off(client, http, body):
    messages = [{"role": "user", "content": "A fox."}]
    assert rendered(http, messages=messages, **body).endswith("<think>\n\n</think>\n\n")
    message = chat(client, "A fox.", extra_body=body).choices[0].message
    assert message.content == "A fox." and message.reasoning is None


def test_the_last_message_can_be_gone_on_with(client, http):
    messages = [{"role": "user", "content": " a dog."}, {"role": "assistant", "content": "A fox and"}]
    on = {"continue_final_message": True, "add_generation_prompt": False}
    assert rendered(http, messages=messages, **on).endswith(f"{START}assistant\nA fox and")
    assert chat(client, "", messages=messages, extra_body=on).choices[0].message.content == " a dog."
    assert chat(client, "", messages=messages, extra_body={**on, "echo": True}).choices[0].message.content == "A fox and a dog."
    stream = chat(client, "", messages=messages, extra_body={**on, "echo": True}, stream=True)
    assert gathered(stream)[0] == "A fox and a dog."
    body = refused(openai.BadRequestError, chat, client, "", messages=messages, extra_body={"continue_final_message": True})
    assert "add_generation_prompt" in body["message"]


def test_a_template_of_the_request_needs_trust(client):
    template = {"chat_template": "{{ messages[0].content }}!"}
    body = refused(openai.BadRequestError, chat, client, "x", extra_body=template)
    assert body["param"] == "chat_template" and "--trust-request-chat-template" in body["message"]
    with (
        serve(scripted_service(parrot, trust_request_chat_template=True)) as live,
        httpx.Client(base_url=live.base_url) as http,
    ):
        assert rendered(http, messages=[{"role": "user", "content": "x"}], **template) == "x!"
        bad = http.post("/render", json={"messages": [{"role": "user", "content": "x"}], "chat_template": "{% if %}"})
        assert bad.status_code == 400 and "line 1" in bad.json()["error"]["message"]


def test_what_a_template_refuses_is_said(client):
    messages = [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
    assert (
        "The system message must come first." in refused(openai.BadRequestError, chat, client, "", messages=messages)["message"]
    )


# -- errors ----------------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_served(client):
    body = refused(openai.NotFoundError, client.completions.create, model="gpt-9", prompt="x")
    assert (
        "The model `gpt-9` does not exist" in body["message"] and body["param"] == "model" and body["type"] == "NotFoundError"
    )
    refused(openai.NotFoundError, client.models.retrieve, "gpt-9")


@pytest.mark.parametrize("form", [{"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}, {"type": "json_object"}])
def test_formats_that_would_need_constrained_decoding(client, form):
    body = refused(openai.BadRequestError, chat, client, "x", response_format=form)
    assert body["param"] == "response_format" and "response_format" in body["message"]
    assert chat(client, "x", response_format={"type": "text"}).choices[0].message.content == "x"


def test_a_prompt_that_is_too_long_is_said_in_openais_words(client):
    body = refused(openai.BadRequestError, complete, client, [5] * 2048)
    assert body["message"].startswith("This model's maximum context length is 2048 tokens. However, your prompt contains 2,048")
    assert body["param"] == "input_tokens"
    refused(openai.BadRequestError, complete, client, "x" * 3_000_000)


@pytest.mark.parametrize("options, param", [
    ({"temperature": 3}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"max_tokens": -1}, "max_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"), ({"stop": [""]}, "stop"), ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"extra_body": {"min_tokens": 101}}, "min_tokens"), ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
    ({"extra_body": {"guided_json": {}}}, "guided_json"), ({"extra_body": {"top_k": "many"}}, "top_k"),
    ({"extra_body": {"allowed_token_ids": [10**6]}}, "allowed_token_ids"), ({"extra_body": {"bad_words": [""]}}, "bad_words"),
])  # fmt: skip
def test_values_that_are_out_of_range_are_named(client, options, param):
    body = refused(openai.BadRequestError, complete, client, "x", **options)
    assert body["param"] == param and param in body["message"]


def test_bodies_that_are_none(http):
    def error(status: int, method: str = "POST", path: str = "/v1/completions", **request) -> dict:
        reply = http.request(method, path, **request)
        assert reply.status_code == status, reply.text
        return reply.json()["error"]

    as_json = {"content-type": "application/json"}
    assert "JSON" in error(400, content=b"{", headers=as_json)["message"]
    assert "object" in error(400, json=[1])["message"]
    assert "application/json" in error(400, content=b"{}", headers={"content-type": "text/plain"})["message"]
    assert error(400, json={"prompt": "x", "max_tokens": "many"})["param"] == "max_tokens"
    assert error(400, json={})["param"] == "prompt"
    assert error(400, path="/v1/chat/completions", json={"messages": [{"role": "user"}]})["param"] == "messages[0].content"
    assert error(405, "GET")["type"] == "MethodNotAllowedError"
    assert error(404, path="/v1/completion", json={})["type"] == "NotFoundError"
    assert error(400, content=b"[" * 100_000, headers=as_json)["message"]


def test_a_body_may_be_too_large():
    with serve(scripted_service("x", max_body_size=100)) as live, httpx.Client(base_url=live.base_url) as http:
        for body in (b"x" * 101, iter([b"x" * 60] * 2)):  # with its length in the header, and in chunks
            reply = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            assert reply.status_code == 413 and "--max-body-size" in reply.json()["error"]["message"]


def test_fields_that_nobody_defines(client, caplog):
    for _ in range(2):
        assert complete(client, "x", extra_body={"temprature": 1, "user": "me"}).choices[0].text == "x"
    assert sum("temprature" in record.getMessage() for record in caplog.records) == 1
    with serve(scripted_service("x", strict_fields=True)) as live:
        with openai.OpenAI(base_url=f"{live.base_url}/v1", api_key="none", max_retries=0) as strict:
            body = refused(openai.BadRequestError, complete, strict, "x", extra_body={"temprature": 1})
            assert body["param"] == "temprature" and "Did you mean 'temperature'?" in body["message"]
            assert complete(strict, "x", user="me").choices[0].text == "x"


# -- models, tokens --------------------------------------------------------------------------------------------------------


def test_the_models_are_listed(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.max_model_len) == ("scripted", "model", 2048)
    assert client.models.retrieve("scripted") == card


def test_text_to_tokens_and_back(http):
    made = http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"]) and made["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": made["tokens"]}).json() == {"prompt": TEXT}
    messages = {"messages": [{"role": "user", "content": TEXT}], "tools": [WEATHER]}
    prompt = http.post("/render", json=messages).json()
    assert http.post("/tokenize", json=messages).json()["tokens"] == prompt["prompt_token_ids"]
    assert http.post("/detokenize", json={"tokens": prompt["prompt_token_ids"]}).json()["prompt"] == prompt["prompt"]
    assert http.post("/tokenize", json={"prompt": "x", **messages}).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_the_prompt_of_a_completion_is_rendered(http):
    made = http.post("/v1/completions/render", json={"prompt": TEXT}).json()
    assert (
        made["prompt"] == TEXT and made["prompt_token_ids"] == ids_of(http, TEXT) and made["count"] == len(ids_of(http, TEXT))
    )
    assert http.post("/render", json={"prompt": ids_of(http, TEXT)}).json() == made


def test_tokens_in_tokens_out(http):
    ids = ids_of(http, TEXT)
    params = {"temperature": 0, "max_tokens": 100, "logprobs": 1, "prompt_logprobs": 0}
    body = {"token_ids": ids, "sampling_params": params, "request_id": "mine"}
    answer = http.post("/inference/v1/generate", json=body).json()
    (choice,) = answer["choices"]
    assert choice["token_ids"][:-1] == ids and choice["finish_reason"] == "stop" and "text" not in choice
    assert [e["token_id"] for e in choice["logprobs"]["content"]] == choice["token_ids"]
    assert answer["request_id"] == "mine" and len(answer["prompt_logprobs"]) == len(ids)
    streamed = http.post(
        "/inference/v1/generate", json={**body, "sampling_params": {"max_tokens": 100}, "stream": True, "output_mode": "text"}
    )
    *events, done = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    pieces = [json.loads(event)["choices"][0] for event in events]
    assert done == "[DONE]" and sum((p["token_ids"] for p in pieces), []) == choice["token_ids"]
    assert "".join(p["text"] for p in pieces) == TEXT
    assert http.post("/inference/v1/generate", json={"token_ids": []}).status_code == 400
    unknown = http.post("/inference/v1/generate", json={"token_ids": ids, "sampling_params": {"temprature": 1}})
    assert unknown.status_code == 400 and "temperature" in unknown.json()["error"]["message"]
