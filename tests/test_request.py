"""The values at the engine's edge: ranges, vLLM's normal forms, errors that say what to do; the forms of a prompt."""

import dataclasses
import math
import pickle
import re

import numpy as np
import pytest

from jaxpaged.prompts import parse_prompt, parse_prompts
from jaxpaged.request import (
    BeamSearchParams,
    FinishReason,
    Request,
    RequestError,
    RequestOutputKind,
    SamplingParams,
    refuse_unknown,
)

# -- ranges ----------------------------------------------------------------------------------------------------------------

NO_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, [1.0]]
NO_INTEGERS = [1.5, math.nan, True, "1", [1]]
REFUSED = {
    "n": [0, -1, 16385, None, *NO_INTEGERS],
    "presence_penalty": [-2.01, 2.01, *NO_NUMBERS],
    "frequency_penalty": [-2.01, 2.01, *NO_NUMBERS],
    "repetition_penalty": [0, -1.0, *NO_NUMBERS],
    "temperature": [-0.1, 2.01, False, *NO_NUMBERS],
    "top_p": [0, 1.01, -0.5, *NO_NUMBERS],
    "top_k": [-2, 2**64, None, *NO_INTEGERS],
    "min_p": [-0.1, 1.01, *NO_NUMBERS],
    "seed": [2**64, -(2**63) - 1, *NO_INTEGERS],
    "max_tokens": [0, -1, 2**64, *NO_INTEGERS],
    "min_tokens": [-1, 2**64, None, *NO_INTEGERS],
    "logprobs": [-2, False, 1.5, "1", [1]],
    "prompt_logprobs": [-2, *NO_INTEGERS],
    "stop": ["", ["a", ""], [1], 5, {"a": 1}],
    "stop_token_ids": [[-1], [2**64], ["1"], [1.0], [True], "12", 5, b"ab"],
    "allowed_token_ids": [[], [-1], ["1"], "12", 5],
    "ignore_eos": ["false", 1, None],
    "detokenize": [0],
    "output_kind": ["DELTA", 1],
    "bad_words": ["word", [""], [1], 5, ["word"] * 129],
    "logit_bias": [[1, 2], "5", {i: 1.0 for i in range(1025)}],
}
ACCEPTED = {
    "n": [1, 16384],
    "presence_penalty": [-2, 2, 0.5],
    "frequency_penalty": [-2, 2, 0.5],
    "repetition_penalty": [1e-3, 1, 20.0],
    "temperature": [0.01, 1, 2],
    "top_p": [1e-9, 0.5, 1],
    "top_k": [0, 1, 10**9],
    "min_p": [0, 0.5, 1],
    "seed": [0, 2**64 - 1, -(2**63), None],
    "max_tokens": [1, 10**6, None],
    "min_tokens": [0, 16],
    "logprobs": [0, -1, 20, None],
    "prompt_logprobs": [0, -1, 20, None],
}
each = lambda table: [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize("name, value", each(REFUSED), ids=lambda x: str(x)[:20])
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"^{name} must be ") as error:
        SamplingParams(**{name: value})
    assert error.value.param == name and error.value.status == 400


@pytest.mark.parametrize("name, value", each(ACCEPTED), ids=str)
def test_values_at_the_edges_are_taken_as_they_are(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_errors_say_what_was_given_and_what_is_allowed():
    with pytest.raises(RequestError, match=re.escape("temperature must be a number in [0, 2], got 2.5.")):
        SamplingParams(temperature=2.5)
    with pytest.raises(RequestError, match=re.escape("top_p must be a number in (0, 1], got nan.")):
        SamplingParams(top_p=math.nan)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_tokens": 20, "max_tokens": 10}, r"min_tokens \(20\) must not be larger than max_tokens \(10\)"),
        ({"min_tokens": 17}, r"max_tokens \(16\)"),
        ({"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2; set temperature > 0"),
        ({"n": 2, "temperature": 1e-6}, "n must be 1 when using greedy sampling"),
        ({"stop": "x", "detokenize": False}, "stop strings need detokenize=True; use stop_token_ids"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**changes)


@pytest.mark.parametrize("changes", [{"top_p": 5}, {"top_k": "many"}, {"min_p": math.nan}, {"top_k": -7}], ids=str)
def test_greedy_does_not_hide_mistakes(changes):
    with pytest.raises(RequestError, match=next(iter(changes))):
        SamplingParams(temperature=0, **changes)


def test_unknown_parameters():
    with pytest.raises(RequestError) as error:
        SamplingParams(temprature=0.5)
    text = str(error.value)
    assert text.startswith(
        "SamplingParams has no parameter 'temprature'; did you mean 'temperature'? It takes: allowed_token_ids, "
    )
    assert text.endswith(", top_p.") and error.value.param == "temprature"
    with pytest.raises(RequestError, match="^a box has no parameter 'xyz'. It takes: a, b.$"):
        refuse_unknown("a box", {"a": 1, "xyz": 2}, ["b", "a"])
    refuse_unknown("a box", {"a": 1}, ["b", "a"])
    with pytest.raises(RequestError, match="did you mean 'min_tokens'"):
        SamplingParams().clone(min_token=1)


# -- normal forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, becomes", [(0, 0), (1e-6, 0), (9e-6, 0), (1e-5, 0.01), (0.009, 0.01), (0.01, 0.01), (0.5, 0.5)]
)
def test_small_temperatures(given, becomes):
    params = SamplingParams(temperature=given)
    assert params.temperature == becomes and params.greedy == (becomes == 0)


def test_greedy_switches_truncation_off():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=7, min_p=0.2)
    assert (params.top_p, params.top_k, params.min_p) == (1, 0, 0) and params == SamplingParams(temperature=0)
    params = SamplingParams(temperature=0.001, top_p=0.5, top_k=7, min_p=0.2)
    assert (params.top_p, params.top_k, params.min_p) == (0.5, 7, 0.2)


def test_vllms_other_words_for_off():
    assert SamplingParams(seed=-1).seed is None and SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(logprobs=True).logprobs == 1


@pytest.mark.parametrize("stop, becomes", [
    (None, ()), ("\n", ("\n",)), ("end", ("end",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()),
])  # fmt: skip
def test_forms_of_stop_strings(stop, becomes):
    assert SamplingParams(stop=stop).stop == becomes


def test_lists_become_tuples():
    params = SamplingParams(stop_token_ids=[1, 2], bad_words=["a"], allowed_token_ids={7})
    assert (params.stop_token_ids, params.bad_words, params.allowed_token_ids) == ((1, 2), ("a",), (7,))
    params = SamplingParams()
    assert (params.stop, params.stop_token_ids, params.bad_words, params.allowed_token_ids) == ((), (), (), None)


def test_logit_bias_has_integer_keys_and_bounded_values():
    params = SamplingParams(logit_bias={"50256": -1000, 7: 2, "8": 100.5})
    assert params.logit_bias == {50256: -100.0, 7: 2.0, 8: 100.0}
    assert all(isinstance(value, float) for value in params.logit_bias.values())


@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {-1: 1}, {1.0: 1}, {True: 1}, {"²": 1}, {"": 1}], ids=str)
def test_logit_bias_keys_are_token_ids(bias):
    with pytest.raises(RequestError, match="logit_bias keys must be token ids") as error:
        SamplingParams(logit_bias=bias)
    assert error.value.param == "logit_bias"


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
def test_logit_bias_values_are_finite(value):
    with pytest.raises(RequestError, match="logit_bias values must be finite numbers"):
        SamplingParams(logit_bias={1: value})


def test_prompt_logprobs_need_the_whole_prompt_computed():
    assert SamplingParams(prompt_logprobs=0).skip_reading_prefix_cache is True
    assert SamplingParams().skip_reading_prefix_cache is False
    assert SamplingParams().clone(prompt_logprobs=1).skip_reading_prefix_cache is True
    assert SamplingParams(prompt_logprobs=1).clone(prompt_logprobs=None).skip_reading_prefix_cache is False
    assert SamplingParams(skip_reading_prefix_cache=True).clone(seed=1).skip_reading_prefix_cache is True
    assert SamplingParams(prompt_logprobs=1, skip_reading_prefix_cache=False).clone(seed=1).skip_reading_prefix_cache is False


# -- values ----------------------------------------------------------------------------------------------------------------

FULL = SamplingParams(n=2, temperature=0.7, stop=["a"], stop_token_ids=[1], logit_bias={"3": 1}, allowed_token_ids=[1, 3],
                      bad_words=["b"], output_kind=RequestOutputKind.DELTA, extra_args={"x": [1]})  # fmt: skip
REQUEST = Request("a", (1, 2), FULL, stop_ids=frozenset({2}), bad_words_ids=((1, 2),))
VALUES = [FULL, SamplingParams(), REQUEST, BeamSearchParams(2, 5), RequestError("no", "n", 404), FinishReason.STOP]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_can_be_pickled(value):
    again = pickle.loads(pickle.dumps(value))
    assert type(again) is type(value)
    assert vars(again) == vars(value) and str(again) == str(value)


@pytest.mark.parametrize("value, name", [(FULL, "temperature"), (REQUEST, "prompt"), (BeamSearchParams(2, 5), "beam_width")])
def test_values_are_frozen(value, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 1)


def test_a_clone_is_checked_and_the_original_stays():
    clone = FULL.clone(temperature=1.5, stop=None)
    assert (clone.temperature, clone.stop, FULL.temperature, FULL.stop) == (1.5, (), 0.7, ("a",))
    assert FULL.clone() == FULL
    with pytest.raises(RequestError, match="temperature"):
        FULL.clone(temperature=9)


def test_a_request_error_is_a_value_error_with_a_status():
    error = RequestError("too long", "prompt", 413)
    assert isinstance(error, ValueError)
    assert (str(error), error.message, error.param, error.status) == ("too long", "too long", "prompt", 413)
    assert RequestError("x").status == 400 and RequestError("x").param is None


BEAMS = [("beam_width", 0), ("max_tokens", 0), ("temperature", 1.0), ("length_penalty", math.nan)]


@pytest.mark.parametrize("name, value", BEAMS)
def test_beam_search_has_ranges_too(name, value):
    with pytest.raises(RequestError, match=f"^{name} must be "):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 5, name: value})


def test_beam_search_refuses_what_it_does_not_know():
    with pytest.raises(RequestError, match="BeamSearchParams has no parameter 'widht'"):
        BeamSearchParams(2, 5, widht=3)


# -- prompts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, content, text, salt", [
    ("Hello", "Hello", "Hello", ""),
    ([1, 2], [1, 2], None, ""),
    ((1, 2), [1, 2], None, ""),
    ({"prompt": "Hello"}, "Hello", "Hello", ""),
    ({"prompt_token_ids": [1, 2]}, [1, 2], None, ""),
    ({"prompt_token_ids": [1, 2], "prompt": "Hello", "cache_salt": "me"}, [1, 2], "Hello", "me"),
    ({"prompt": "", "cache_salt": None}, "", "", ""),
])  # fmt: skip
def test_forms_of_a_prompt(prompt, content, text, salt):
    assert parse_prompt(prompt) == (content, text, salt)
    assert parse_prompts([prompt]) == [parse_prompt(prompt)]


def test_one_prompt_or_many():
    contents = lambda prompts: [prompt.content for prompt in parse_prompts(prompts)]
    assert contents("Hello") == ["Hello"] and contents({"prompt": "Hello"}) == ["Hello"]
    assert contents([1, 2, 3]) == [[1, 2, 3]] and contents(np.array([1, 2, 3])) == [[1, 2, 3]]
    assert contents([[1], [2, 3]]) == [[1], [2, 3]] and contents(["a", {"prompt": "b"}, [4]]) == ["a", "b", [4]]
    assert contents([]) == []


@pytest.mark.parametrize("prompt, message", [
    (5, "a prompt is a string, token ids or a dictionary; got int"),
    (b"bytes", "got bytes"),
    (None, "got NoneType"),
    ({}, "needs 'prompt' or 'prompt_token_ids'"),
    ({"promt": "x"}, "a prompt has no parameter 'promt'; did you mean 'prompt'[?] It takes: cache_salt, prompt, "),
    ({"prompt": "x", "multi_modal_data": {}}, "'multi_modal_data'"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused(prompt, message):
    with pytest.raises(RequestError, match=message):
        parse_prompt(prompt)
