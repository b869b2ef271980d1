"""EngineConfig: what it takes, what it refuses and how it says so, and what "auto" becomes."""

import dataclasses
import pickle

import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError


@pytest.mark.parametrize("value, tokens", [
    (4096, 4096), ("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5K", 1536), ("1m", 10**6), ("1M", 2**20),
    ("auto", "auto"), (-1, "auto"), (None, "auto"),
])  # fmt: skip
def test_lengths_have_vllms_forms(value, tokens):
    assert EngineConfig(max_model_len=value).max_model_len == tokens


NUMBERS = [0, -2, 1.5, True, "many"]
REFUSED = [
    *(("max_model_len", value) for value in ["4x", "k", "", "nan", "infk", "1e999K", 0, -2, 4096.0, True]),
    *((name, value) for name in ("block_size", "max_num_seqs", "max_num_batched_tokens") for value in [*NUMBERS, -1, None]),
    *((name, value) for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override") for value in [*NUMBERS, -1, "auto"]),
    *(("gpu_memory_utilization", value) for value in [0, -0.5, 1.01, float("nan"), float("inf"), "0.9", True, None]),
    *((name, value) for name in ("max_logprobs", "long_prefill_token_threshold") for value in [-1, 1.5, "5", True, None]),
    *(("dtype", value) for value in ["float64", "half", None, 32]),
    ("load_format", "pickle"),
    ("scheduling_policy", "lifo"),
    ("generation_config", "mine"),
]


@pytest.mark.parametrize("name, value", REFUSED, ids=str)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"^{name} must be .*, got |^{name} must be .*; got ") as error:
        EngineConfig(**{name: value})
    assert repr(value) in str(error.value) and error.value.param == name


@pytest.mark.parametrize("value, tokens", [("-3", "-3"), ("0K", "0"), ("0.5", "'0.5'")])
def test_lengths_in_words_have_the_same_range(value, tokens):
    with pytest.raises(RequestError, match=f"^max_model_len must be a .*, got {tokens}.$"):
        EngineConfig(max_model_len=value)


def test_allowed_words_are_listed():
    with pytest.raises(RequestError, match="dtype must be one of auto, float32, bfloat16, float16; got 'float8'"):
        EngineConfig(dtype="float8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a positive integer, got 0"),
        ({"pipeline_parallel_size": "auto"}, "pipeline_parallel_size must be a positive integer, got 'auto'"),
        ({"all2all_backend": "ragged_all_to_all"}, "add enable_expert_parallel=True"),
        ({"trust_remote_code": True}, "no code of a checkpoint is ever run"),
        ({"enable_chunked_prefill": False}, "raise max_num_batched_tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(changes, message):
    with pytest.raises(RequestError, match=message):
        EngineConfig(**changes)


def test_unknown_parameters():
    with pytest.raises(RequestError) as error:
        EngineConfig(max_num_seq=4)
    text = str(error.value)
    assert text.startswith(
        "the engine has no parameter 'max_num_seq'; did you mean 'max_num_seqs'? It takes: all2all_backend, "
    )
    assert text.endswith(", trust_remote_code.") and error.value.param == "max_num_seq"
    with pytest.raises(RequestError, match="^the engine has no parameter 'zzz'. It takes: all2all_backend, "):
        EngineConfig(zzz=1)


def test_a_config_is_a_value():
    config = EngineConfig(max_model_len="2K", max_num_seqs=3)
    assert config == EngineConfig(max_model_len=2048, max_num_seqs=3) == pickle.loads(pickle.dumps(config))
    assert config.replace(seed=7) == EngineConfig(max_model_len=2048, max_num_seqs=3, seed=7) and config.seed == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(RequestError, match="max_num_seqs"):
        config.replace(max_num_seqs=0)
    with pytest.raises(RequestError, match="did you mean 'max_num_seqs'"):
        config.replace(max_num_seq=1)


# -- resolve ---------------------------------------------------------------------------------------------------------------


def resolved(platform: str, model_max_len: int = 4096, **changes) -> dict:
    config = EngineConfig(**changes)
    names = ("dtype", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens")
    result = config.resolve(platform, model_max_len)
    rest = {f.name for f in dataclasses.fields(config)} - set(names)
    assert all(getattr(result, name) == getattr(config, name) for name in rest)
    return {name: getattr(result, name) for name in names}


def test_auto_becomes_numbers_for_the_platform():
    assert resolved("cpu") == {
        "dtype": "float32", "max_model_len": 4096, "block_size": 16, "max_num_seqs": 32, "max_num_batched_tokens": 512,
    }  # fmt: skip
    assert resolved("gpu") == {
        "dtype": "bfloat16", "max_model_len": 4096, "block_size": 32, "max_num_seqs": 256, "max_num_batched_tokens": 8192,
    }  # fmt: skip


def test_what_is_given_is_kept():
    given = {"dtype": "float16", "max_model_len": 100, "block_size": 8, "max_num_seqs": 5, "max_num_batched_tokens": 7}
    assert resolved("cpu", **given) == resolved("gpu", **given) == given
    assert resolved("cpu", max_model_len="1k")["max_model_len"] == 1000


def test_a_long_context_is_cut_on_cpu_only_and_only_where_nothing_was_said():
    assert resolved("cpu", 131072)["max_model_len"] == 8192
    assert resolved("gpu", 131072)["max_model_len"] == 131072
    assert resolved("cpu", 131072, max_model_len=20000)["max_model_len"] == 20000


def test_a_step_has_room_for_one_token_of_every_sequence():
    assert resolved("cpu", max_num_seqs=2000)["max_num_batched_tokens"] == 2000
    assert resolved("cpu", max_num_seqs=64, max_num_batched_tokens=16)["max_num_batched_tokens"] == 64


def test_a_sequence_longer_than_the_model_is_refused_with_both_numbers():
    with pytest.raises(RequestError, match="max_model_len=5000 is more than the 4096 positions of this model; .*hf_overrides="):
        resolved("cpu", 4096, max_model_len=5000)


def test_resolving_twice_changes_nothing():
    once = EngineConfig().resolve("cpu", 2048)
    assert once.resolve("cpu", 2048) == once
