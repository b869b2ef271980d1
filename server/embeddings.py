"""/v1/embeddings: a body becomes inputs and PoolingParams, vectors become OpenAI's response. Pure functions and small records.

Between them stand, for each input: its token ids (`Service.encode` for a text), `fitted`, and the engine.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np

from jaxpaged.request import EmbeddingRequestOutput, PoolingParams, RequestError
from jaxpaged_server.errors import failed_request
from jaxpaged_server.fields import Body
from jaxpaged_server.params import truncated

MAX_INPUTS = 2048  # of one request, as at OpenAI
ENCODING_FORMATS = ("float", "base64")


class EmbeddingRequest(Body, kw_only=True):
    """OpenAI's body with vLLM's further fields; `pooling` is ours. `normalize` is an older name of `use_activation`."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: str = "float"
    dimensions: int | None = None
    pooling: str = "last"
    use_activation: bool | None = None
    normalize: bool | None = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "right"
    priority: int = 0
    request_id: str | None = None
    cache_salt: str = ""
    REFUSED: ClassVar = {
        "messages": (), "embed_dtype": ("float32",), "endianness": ("native", "little"), "mm_processor_kwargs": ({},),
    }  # fmt: skip
    IGNORED: ClassVar = frozenset(("user",))


class Embedding(msgspec.Struct, kw_only=True):
    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def split_inputs(body: EmbeddingRequest) -> list[str | list[int]]:
    """The inputs of a body, each a text or token ids: `input` is a string, token ids, or a list of either."""
    inputs: list[Any] = [body.input] if isinstance(body.input, str) else body.input
    kinds = {type(one) for one in inputs}
    if len(kinds) > 1:
        raise RequestError("input must be a string, a list of token ids, or a list of strings or of lists of token ids, not a "
                           "mixture.", "input")  # fmt: skip
    if kinds == {int}:
        inputs = [inputs]
    if len(inputs) > MAX_INPUTS:
        raise RequestError(f"input may have at most {MAX_INPUTS} inputs, got {len(inputs)}; send several requests.", "input")
    if not inputs:
        raise RequestError("input is an empty list; give at least one text or token id.", "input")
    for index, one in enumerate(inputs):
        if not one:
            raise RequestError(f"input number {index} is empty; give at least one token of text.", "input")
    return inputs


def pooling_params(body: EmbeddingRequest) -> PoolingParams:
    """How to make the vectors. RequestError names the field at fault."""
    if body.encoding_format not in ENCODING_FORMATS:
        allowed = " or ".join(ENCODING_FORMATS)
        raise RequestError(f"encoding_format must be {allowed}, got {body.encoding_format!r:.80}.", "encoding_format")
    scaled = {given for given in (body.use_activation, body.normalize) if given is not None}
    if len(scaled) > 1:
        raise RequestError("normalize and use_activation are two names of one thing; give one of them.", "normalize")
    return PoolingParams(body.pooling, use_activation=scaled != {False}, dimensions=body.dimensions)


def fitted(ids: list[int], body: EmbeddingRequest, index: int, max_model_len: int) -> list[int]:
    """The token ids of input number `index`, cut to truncate_prompt_tokens. RequestError if they are still too many, in
    OpenAI's words. A prompt may have max_model_len tokens: none is generated."""
    ids = truncated(ids, body.truncate_prompt_tokens, body.truncation_side, max_model_len + 1)
    if len(ids) > max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, input number {index} has {len(ids):,}; "
            "shorten it, or set truncate_prompt_tokens to -1.", "input",
        )  # fmt: skip
    return ids


def embedding_response(body: EmbeddingRequest, model: str, outputs: Sequence[EmbeddingRequestOutput]) -> EmbeddingResponse:
    """The response; outputs in the order of the inputs. RequestError (500) if one of them failed."""
    data = [Embedding(index=i, embedding=_encoded(output, body.encoding_format)) for i, output in enumerate(outputs)]
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return EmbeddingResponse(data=data, model=model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))


def _encoded(output: EmbeddingRequestOutput, encoding_format: str) -> list[float] | str:
    """base64: of little-endian float32."""
    if output.outputs is None:
        raise failed_request(str(output.error))
    vector = output.outputs.embedding
    return vector if encoding_format == "float" else base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
