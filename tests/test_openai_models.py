"""What clients ask of the sampler, through OpenAI's client, on models that compute: a tiny one with random weights, and the
demo model."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from live_server import serve
from server_process import tiny_model

from jaxpaged.build import build_engine
from jaxpaged.config import EngineConfig
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import open_service

pytest_plugins = ["demo_server"]

PROMPT = "the quick brown fox"
SIZES = {"load_format": "dummy", "enforce_eager": True, "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    service = open_service(
        [build_engine(EngineConfig(str(folder), **SIZES), progress=False)], ServerOptions(served_model_name=("tiny",))
    )
    with serve(service) as live:
        yield live.base_url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def greedy(client):
    """Token ids and text of the likeliest completion of PROMPT."""
    return complete(client, temperature=0)


def complete(client, prompt=PROMPT, **options):
    """One choice; what is vLLM's goes into `extra`."""
    extra = {"return_token_ids": True, "ignore_eos": True, **options.pop("extra", {})}
    values = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 1, **options}
    (choice,) = client.completions.create(extra_body=extra, **values).choices
    return choice


# -- sampling --------------------------------------------------------------------------------------------------------------


def test_a_seed_makes_the_answer_the_same_whatever_else_runs(client):
    alone = [complete(client, seed=seed).token_ids for seed in range(6)]
    assert len(set(map(tuple, alone))) == 6
    with ThreadPoolExecutor(12) as threads:  # more than fit at once
        together = list(threads.map(lambda i: complete(client, seed=i % 6).token_ids, range(12)))
    assert together == alone * 2
    assert complete(client).token_ids != complete(client).token_ids  # without one


def test_samples_of_a_prompt_differ(client):
    draw = lambda: [c.text for c in client.completions.create(model="tiny", prompt=PROMPT, n=4, seed=1, max_tokens=12).choices]
    assert len(set(draw())) == 4 and draw() == draw()


@pytest.mark.parametrize("extra", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}], ids=str)
def test_what_leaves_one_token_is_greedy(client, greedy, extra):
    assert complete(client, extra=extra, temperature=1.5).token_ids == greedy.token_ids


def test_streamed_is_the_same_as_whole(client, greedy):
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == greedy.text


def test_logit_bias_decides(client, greedy):
    first = greedy.token_ids[0]
    assert set(complete(client, logit_bias={"7": 100}).token_ids) == {7}
    assert first not in complete(client, temperature=0, logit_bias={str(first): -100}).token_ids


def test_only_allowed_tokens_are_sampled(client):
    allowed = [11, 12, 13]
    tokens = complete(client, max_tokens=60, extra={"allowed_token_ids": allowed}).token_ids
    assert set(tokens) == set(allowed)


def test_bad_words_are_not_written(client, greedy, url):
    texts = {i: httpx.post(f"{url}/detokenize", json={"tokens": [i]}).json()["prompt"] for i in greedy.token_ids}
    ids = {i: httpx.post(f"{url}/tokenize", json={"prompt": text}).json()["tokens"] for i, text in texts.items()}
    words = [i for i in texts if ids[i] == [i]]  # some tokens are halves of characters
    assert words
    tokens = complete(client, temperature=0, extra={"bad_words": [texts[i] for i in words]}).token_ids
    assert not set(words) & set(tokens)


def test_an_answer_has_at_least_min_tokens(client, url):
    (eos,) = httpx.post(f"{url}/tokenize", json={"prompt": "<|im_end|>"}).json()["tokens"]
    ends = {"logit_bias": {str(eos): 100}, "temperature": 0}
    assert complete(client, extra={"ignore_eos": False}, **ends).token_ids == [eos]
    later = complete(client, extra={"ignore_eos": False, "min_tokens": 5}, **ends)
    assert (
        later.token_ids[-1] == eos
        and len(later.token_ids) == 6
        and eos not in later.token_ids[:-1]
        and later.finish_reason == "stop"
    )


PENALTIES = [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"extra": {"repetition_penalty": 50.0}}]


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_penalties_keep_from_repeating(client, options):
    again = {"logit_bias": {"7": 1.5}, "temperature": 0, "max_tokens": 10}  # 7 is the likeliest, again and again
    assert complete(client, **again).token_ids.count(7) >= 5 > complete(client, **again, **options).token_ids.count(7)


# -- log probabilities -----------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_same_text_as_a_prompt(client):
    """What was said of the tokens when they were generated, and what is said of them in a prompt."""
    made = complete(client, seed=3, logprobs=5)
    prompt = complete(client, max_tokens=1, logprobs=0, extra={"return_token_ids": True}, echo=True)
    ids = [*prompt.prompt_token_ids, *made.token_ids]
    scored = complete(client, ids, echo=True, max_tokens=0, logprobs=5).logprobs
    count = len(made.token_ids)
    assert scored.token_logprobs[-count:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-4)
    assert scored.tokens[-count:] == made.logprobs.tokens
    raw = complete(client, ids, max_tokens=1, extra={"prompt_logprobs": 5}).prompt_logprobs
    for token, entry, value in zip(ids[1:], raw[1:], scored.token_logprobs[1:]):
        assert entry[str(token)]["logprob"] == pytest.approx(value, abs=1e-4)


def test_logprobs_are_logarithms_of_probabilities(client, greedy):
    scores = complete(client, temperature=0, logprobs=20).logprobs
    for token, logprob, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs):
        assert len(top) <= 20 and top[token] == logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1 + 1e-5
    with_bias = complete(client, temperature=0, logprobs=0, logit_bias={"7": 100}).logprobs
    assert all(-20 < value < 0 for value in with_bias.token_logprobs)  # of the model, not of what the request made of it


def test_the_cache_changes_nothing(client):
    ids = list(range(20, 80))
    first = complete(client, ids, temperature=0, logprobs=1)
    again = complete(client, ids, temperature=0, logprobs=1)
    salted = complete(client, ids, temperature=0, logprobs=1, extra={"cache_salt": "mine"})
    assert first.token_ids == again.token_ids == salted.token_ids
    assert again.logprobs.token_logprobs == pytest.approx(first.logprobs.token_logprobs, abs=1e-4)


# -- the demo model --------------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo(demo_url):
    with openai.OpenAI(base_url=f"{demo_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france(demo):
    answer = demo.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_completion_tokens=30)
    assert answer.choices[0].message.content == "The capital of France is Paris." and answer.choices[0].finish_reason == "stop"
    text = demo.completions.create(model="demo", prompt="The capital of France is", max_tokens=2, temperature=0).choices[0].text
    assert text == " Paris."


@pytest.mark.slow
def test_the_demo_model_streams_what_it_says_whole(demo):
    ask = {"model": "demo", "temperature": 0, "max_completion_tokens": 40, "logprobs": True, "top_logprobs": 2}

    def whole(question: str) -> tuple[str, list[float]]:
        (choice,) = demo.chat.completions.create(messages=[{"role": "user", "content": question}], **ask).choices
        return choice.message.content, [entry.logprob for entry in choice.logprobs.content]

    def streamed(question: str) -> tuple[str, list[float]]:
        text, logprobs = "", []
        for chunk in demo.chat.completions.create(messages=[{"role": "user", "content": question}], stream=True, **ask):
            text += chunk.choices[0].delta.content or ""
            logprobs += [entry.logprob for entry in chunk.choices[0].logprobs.content] if chunk.choices[0].logprobs else []
        return text, logprobs

    questions = ["Name three colours.", "Schreibe einen Satz über Köln.", "What is 2 + 2?", "Write a haiku with an emoji."]
    with ThreadPoolExecutor(8) as threads:
        expected, got = list(threads.map(whole, questions)), list(threads.map(streamed, questions))
    for (text, logprobs), (other, others) in zip(expected, got):
        assert text == other and others == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.slow
def test_the_demo_model_can_be_made_to_call(demo):
    tool = {
        "type": "function",
        "function": {"name": "capital", "parameters": {"type": "object", "properties": {"country": {"type": "string"}}}},
    }
    forced = {"type": "function", "function": {"name": "capital"}}
    ask = {
        "model": "demo",
        "messages": QUESTION,
        "tools": [tool],
        "tool_choice": forced,
        "temperature": 0,
        "max_completion_tokens": 40,
    }
    message = demo.chat.completions.create(**ask).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "capital" and call.function.arguments.startswith("{")
    name, arguments = "", ""
    for chunk in demo.chat.completions.create(stream=True, **ask):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name, arguments = name + (piece.function.name or ""), arguments + piece.function.arguments
    assert (name, arguments) == ("capital", call.function.arguments)


@pytest.mark.slow
def test_the_demo_models_prompt_is_what_its_template_says(demo_url):
    made = httpx.post(f"{demo_url}/render", json={"messages": QUESTION}).json()
    assert made["prompt"].endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    body = {
        "token_ids": made["prompt_token_ids"],
        "sampling_params": {"temperature": 0, "max_tokens": 30},
        "output_mode": "text",
    }
    answer = httpx.post(f"{demo_url}/inference/v1/generate", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == "The capital of France is Paris." and json.dumps(answer)
