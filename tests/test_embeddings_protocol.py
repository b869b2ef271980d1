"""/v1/embeddings without HTTP: bodies in, inputs and parameters out; vectors in, OpenAI's response out."""

import json
import struct
from base64 import b64decode

import msgspec
import pytest
from fakes import paper_vector
from openai.types import CreateEmbeddingResponse
from test_engine import drain, engine

from jaxpaged.request import EmbeddingOutput, EmbeddingRequestOutput, PoolingParams, RequestError
from jaxpaged_server.embeddings import (
    MAX_INPUTS,
    EmbeddingRequest,
    embedding_response,
    fitted,
    pooling_params,
    split_inputs,
)
from jaxpaged_server.fields import Decoder


def decode(**fields) -> EmbeddingRequest:
    return Decoder()(json.dumps({"input": "text", **fields}).encode(), EmbeddingRequest)


def output(embedding, tokens=1) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput("a", EmbeddingOutput(embedding), [0] * tokens)


# -- inputs ----------------------------------------------------------------------------------------------------------------

FORMS = {
    "a text": ("a b", ["a b"]),
    "texts": (["a", "b"], ["a", "b"]),
    "token ids": ([1, 2], [[1, 2]]),
    "lists of token ids": ([[1, 2], [3]], [[1, 2], [3]]),
    "as many as are allowed": (["a"] * MAX_INPUTS, ["a"] * MAX_INPUTS),
    "more token ids than inputs are allowed": ([7] * 3000, [[7] * 3000]),
}
BAD_INPUTS = {
    "nothing": ([], "empty list"),
    "an empty text": ("", "input number 0 is empty"),
    "an empty text among others": (["a", ""], "input number 1 is empty"),
    "an empty list among others": ([[1], []], "input number 1 is empty"),
    "texts and ids": (["a", 1], "not a mixture"),
    "ids and lists of ids": ([1, [1]], "not a mixture"),
    "too many": (["a"] * (MAX_INPUTS + 1), "at most 2048 inputs, got 2049"),
    "a number": (1, "Expected"),
    "true": ([True], "Expected"),
    "numbers with a point": ([[1.5]], "Expected"),
    "objects": ([{}], "Expected"),
}


@pytest.mark.parametrize("given, expected", FORMS.values(), ids=FORMS)
def test_input_has_openais_four_forms(given, expected):
    assert split_inputs(decode(input=given)) == expected


@pytest.mark.parametrize("given, message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_refused_by_name(given, message):
    with pytest.raises(RequestError, match=message) as error:
        split_inputs(decode(input=given))
    assert error.value.status == 400 and error.value.param.startswith("input")


def test_input_is_all_that_is_needed():
    with pytest.raises(RequestError, match="missing required field `input`") as error:
        Decoder()(b"{}", EmbeddingRequest)
    assert error.value.param == "input"
    body = decode(user="me", model=None)
    assert pooling_params(body) == PoolingParams() and body.add_special_tokens and body.priority == 0


# -- parameters ------------------------------------------------------------------------------------------------------------


def test_parameters_reach_the_engine_by_its_names():
    assert pooling_params(decode(pooling="mean", dimensions=8)) == PoolingParams("mean", dimensions=8)
    for name in ("normalize", "use_activation"):
        assert pooling_params(decode(**{name: False})) == PoolingParams(use_activation=False)
        assert pooling_params(decode(**{name: True})) == PoolingParams()
    assert pooling_params(decode(normalize=False, use_activation=False)) == PoolingParams(use_activation=False)


BAD_PARAMETERS = [
    ({"encoding_format": "bytes"}, "encoding_format", "must be float or base64, got 'bytes'"),
    ({"pooling": "first"}, "pooling", "must be one of last, mean, got 'first'"),
    ({"dimensions": 0}, "dimensions", "must be None or an integer >= 1, got 0"),
    ({"dimensions": "8"}, "dimensions", "Expected `int"),
    ({"normalize": True, "use_activation": False}, "normalize", "two names of one thing"),
    ({"embed_dtype": "float16"}, "embed_dtype", "not supported"),
    ({"endianness": "big"}, "endianness", "not supported"),
    ({"messages": [{"role": "user", "content": "a"}]}, "messages", "not supported"),
]


@pytest.mark.parametrize("fields, param, message", BAD_PARAMETERS, ids=[str(bad[0]) for bad in BAD_PARAMETERS])
def test_bad_parameters_are_refused_by_name(fields, param, message):
    with pytest.raises(RequestError, match=message) as error:
        pooling_params(decode(**fields))
    assert (error.value.param, error.value.status) == (param, 400)


def test_what_asks_for_nothing_is_taken():
    assert pooling_params(decode(embed_dtype="float32", endianness="little")) == PoolingParams()


# -- lengths ---------------------------------------------------------------------------------------------------------------


def test_truncation_keeps_the_beginning_unless_told_otherwise():
    ids = list(range(10))
    assert fitted(ids, decode(), 0, 10) == ids
    assert fitted(ids, decode(truncate_prompt_tokens=4), 0, 10) == [0, 1, 2, 3]
    assert fitted(ids, decode(truncate_prompt_tokens=4, truncation_side="left"), 0, 10) == [6, 7, 8, 9]
    assert fitted(ids, decode(truncate_prompt_tokens=-1), 0, 8) == ids[:8]  # all that the model takes: nothing is generated


def test_too_long_inputs_name_the_numbers():
    with pytest.raises(RequestError, match=r"maximum context length is 9 tokens.*input number 3 has 10;.*to -1") as error:
        fitted([0] * 10, decode(), 3, 9)
    assert error.value.param == "input"
    with pytest.raises(RequestError, match="maximum context length is 9"):
        fitted([0] * 20, decode(truncate_prompt_tokens=12), 0, 9)
    with pytest.raises(RequestError) as error:
        fitted([0], decode(truncate_prompt_tokens=0), 0, 9)
    assert error.value.param == "truncate_prompt_tokens"


# -- responses -------------------------------------------------------------------------------------------------------------


def test_the_response_is_openais():
    response = embedding_response(decode(), "a model", [output([0.5, -1.0], 3), output([2.0, 0.25], 4)])
    body = json.loads(msgspec.json.encode(response))
    assert body == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, -1.0]},
            {"object": "embedding", "index": 1, "embedding": [2.0, 0.25]},
        ],
        "model": "a model",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }
    assert CreateEmbeddingResponse.model_validate(body, strict=True).data[1].embedding == [2.0, 0.25]


def test_base64_is_little_endian_float32():
    vector = [struct.unpack("<f", struct.pack("<f", x))[0] for x in (0.1, -3e-20, 7.0)]
    response = embedding_response(decode(encoding_format="base64"), "m", [output(vector)])
    assert list(struct.unpack("<3f", b64decode(response.data[0].embedding))) == vector


def test_a_failed_input_fails_the_request():
    failed = EmbeddingRequestOutput("a", None, [1], error="out of paper")
    with pytest.raises(RequestError, match="out of paper") as error:
        embedding_response(decode(), "m", [output([1.0]), failed])
    assert error.value.status == 500


def test_from_body_to_response_through_an_engine():
    body, e = decode(input=[[1, 2, 3], [4] * 9], pooling="mean", normalize=False), engine()
    for i, ids in enumerate(split_inputs(body)):
        e.submit(str(i), fitted(ids, body, i, e.limits.max_model_len), pooling_params(body), body.priority, body.cache_salt)
    outputs = drain(e)
    response = embedding_response(body, "m", [outputs[str(i)] for i in range(2)])
    assert [one.embedding for one in response.data] == [paper_vector(ids, "mean").tolist() for ids in ([1, 2, 3], [4] * 9)]
    assert response.usage.prompt_tokens == 12
