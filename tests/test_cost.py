"""Bytes, FLOPs and seconds on paper: against numbers worked out by hand, and against what the engine itself says of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import MODELS

from jaxpaged import build, devices, kv_cache
from jaxpaged.batch import Bucket
from jaxpaged.config import EngineConfig
from jaxpaged.cost import Rows, Sizes, StepCost, Work, chunk, make_stages, repeated, times, total, touched
from jaxpaged.cost_weights import cached_bytes, weight_bytes
from jaxpaged.devices import DEVICES, device
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.quantized import all_products
from jaxpaged.models.spec import MoESpec
from jaxpaged.parallel import Parallel
from jaxpaged.quantization import ON_THE_FLY
from jaxpaged.reach import Reach
from jaxpaged.request import RequestError
from jaxpaged.sharding import Sharding
from jaxpaged.stage import abstract_decoder

H200 = DEVICES["h200"]


def decoder(name: str):
    hf = HFConfig(MODELS[name])
    return door(hf["model_type"], hf).decoder_config(hf)


DECODERS = {name: decoder(name) for name in MODELS}
SHORT = {name: dataclasses.replace(config, layers=config.layers[:7]) for name, config in DECODERS.items()}  # each kind of layer
each_model = pytest.mark.parametrize("name", MODELS)


ONE = Sizes()


def stages(name: str, sizes: Sizes = ONE, cache: str = "bfloat16", forms=None):
    return make_stages(DECODERS[name], sizes, "bfloat16", cache, forms or {})


# -- weights -----------------------------------------------------------------------------------------------------------------


def test_llama_3_8b_has_as_many_numbers_as_it_says():
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert 32 * layer + 2 * 128256 * 4096 + 4096 == 8_030_261_248
    assert weight_bytes(DECODERS["Llama-3-8B"], "bfloat16") == 2 * 8_030_261_248
    assert weight_bytes(DECODERS["Llama-3-8B"], "float32") == 4 * 8_030_261_248


@pytest.mark.parametrize("name, billions", [("Llama-3-70B", 70.6), ("Qwen3-30B-A3B", 30.5), ("Gemma-3-27B", 27.0),
                                            ("DeepSeek-V2-Lite", 15.7)])  # fmt: skip
def test_other_models_are_as_large_as_they_are_called(name, billions):
    assert weight_bytes(DECODERS[name], "bfloat16") / 2e9 == pytest.approx(billions, abs=0.06)


@each_model
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_weights_are_what_the_decoder_has(name, form):
    config = SHORT[name]
    forms = {} if form is None else all_products(nnx.eval_shape(lambda: Decoder(config)), ON_THE_FLY[form])
    _, _, leaves = abstract_decoder(config, jnp.bfloat16, forms)
    assert weight_bytes(config, "bfloat16", forms) == sum(x.size * x.dtype.itemsize for x in leaves.values())


SIZES = [Sizes(2), Sizes(4), Sizes(1, 2), Sizes(2, 2), Sizes(4, experts=True), Sizes(2, 4)]
HAVE_EXPERTS = {name for name, config in DECODERS.items() if any(isinstance(spec.mlp, MoESpec) for spec in config.layers)}


@pytest.mark.parametrize("name, sizes", [(n, s) for n in MODELS for s in SIZES if n in HAVE_EXPERTS or not s.experts], ids=str)
def test_shares_are_what_the_engine_would_hold(name, sizes):
    """Of each device of each stage: weights, and a page of the cache."""
    config = EngineConfig(
        max_model_len=2048, dtype="bfloat16", block_size=32, max_num_seqs=4, max_num_batched_tokens=32,
        kernel_backend="reference", tensor_parallel_size=sizes.tensor, enable_expert_parallel=sizes.experts,
    )  # fmt: skip
    whole = SHORT[name]
    parallel = Parallel.over(jax.devices(), whole, sizes.tensor, sizes.pipeline, sizes.experts)
    blueprint = build.make_blueprint(config, parallel)
    of_stages = make_stages(whole, sizes, "bfloat16", "bfloat16")
    layout = kv_cache.layout(whole, 2048, 32)
    weights = [weight_bytes(stage.config, "bfloat16", layers=stage.layers) for stage in of_stages]
    pages = [kv_cache.page_bytes(stage.config, layout.of(stage.layers), 32, "bfloat16") for stage in of_stages]
    assert (max(weights), max(pages)) == (blueprint.weight_bytes, blueprint.page_bytes)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["Llama-3-8B", "Qwen3-30B-A3B"])
def test_a_token_leaves_what_its_page_has_room_for(name, dtype):
    config = DECODERS[name]
    page = kv_cache.page_bytes(config, kv_cache.layout(config, 8192, 32), 32, dtype)
    assert page == 32 * sum(cached_bytes(spec.attention, dtype) for spec in config.layers)


def test_llama_3_8b_leaves_128_kib_a_token():
    assert sum(cached_bytes(spec.attention, "bfloat16") for spec in DECODERS["Llama-3-8B"].layers) == 128 * 1024


# -- work --------------------------------------------------------------------------------------------------------------------


def sums(works: list[Work], field: str) -> float:
    return sum(getattr(work, field) for work in works)


def test_a_step_multiplies_each_weight_once_a_token():
    """2 FLOPs a weight and token; the head's only for rows that sample."""
    (stage,) = stages("Llama-3-8B")
    head, rest = 128256 * 4096, 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert sums(stage.dense(512, 3), "flops") == 2 * 512 * rest + 2 * 3 * head


def test_a_decode_reads_its_cache_and_a_prompt_multiplies_half_a_square():
    (stage,) = stages("Llama-3-8B")
    (decode,) = stage.attention(repeated(999, 4))
    queries = 2 * 4 * 32 * 256 * 2 * 32  # read and written: 4 tokens, 32 heads of q and out, 32 layers
    assert decode.bytes == 4 * (1000 + 1) * 128 * 1024 + queries
    assert decode.flops == 4 * 1000 * 2 * 32 * 256 * 32
    (prompt,) = stage.attention(chunk(0, 1000))
    assert prompt.flops == 1000 * 1001 / 2 * 2 * 32 * 256 * 32


def seen_by_hand(start: int, count: int, reach: Reach) -> int:
    return sum(p + 1 - int(reach.first_seen(p)) for p in range(start, start + count))


@given(st.integers(0, 300), st.integers(1, 200), st.sampled_from([Reach(), Reach(64), Reach(7), Reach(chunk=50)]))
@settings(deadline=None)
def test_pairs_of_queries_and_keys(start, count, reach):
    from jaxpaged.cost import _triangle

    ends = np.array([start]), np.array([start + count])
    assert (_triangle(ends[1], reach) - _triangle(ends[0], reach))[0] == seen_by_hand(start, count, reach)


def test_layers_with_a_window_read_no_more_than_it():
    far, near = (sums(stages("Gemma-3-27B")[0].attention(repeated(at, 1)), "bytes") for at in (100_000, 1_024))
    token = 2 * 16 * 128 * 2  # of one layer
    assert far - near == pytest.approx(10 * token * (100_000 - 1_024))  # ten of 62 layers see it all


def test_few_tokens_touch_few_experts():
    assert touched(128, 128, 8, 1) == pytest.approx(8)
    assert touched(128, 128, 8, 10_000) == pytest.approx(128)
    (stage,) = stages("Qwen3-30B-A3B")
    expert = 3 * 2048 * 768 * 2 * 48  # bytes, over all layers
    works = [work for work in stage.products(1) if work.name.startswith("experts")]
    assert sums(works, "bytes") == pytest.approx(8 * expert, rel=0.01)
    assert sums(works, "flops") == 8 * expert


def test_collectives_of_llama_3_70b_on_8():
    (stage,) = stages("Llama-3-70B", Sizes(8))
    sum_, logits = stage.collectives(256, 256)
    assert (sum_.name, sum_.messages, sum_.payload) == ("all-reduce", 161, 161 * 8192 * 256 * 2)
    assert sum_.sent == pytest.approx(sum_.payload * 2 * 7 / 8)
    assert logits.payload == 256 * 128256 // 8 * 4  # each has an eighth of the words of all rows
    scatter, gather, _ = stage.collectives(8192, 256)
    assert (scatter.name, scatter.messages, gather.name, gather.messages) == ("reduce-scatter", 161, "all-gather", 161)
    assert stages("Llama-3-70B")[0].collectives(256, 256) == []


@given(st.sampled_from(["Llama-3-8B", "Qwen3-30B-A3B", "Gemma-3-27B", "DeepSeek-V2-Lite"]), st.sampled_from([1, 2, 4, 8]),
       st.integers(1, 510), st.integers(1, 4000))  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_more_devices_have_less_to_do_each(name, size, tokens, context):
    """Bytes of weights, FLOPs and bytes of a step never grow with the devices that share it; nor does a step shrink when it has
    more rows, or longer ones. (From 512 tokens on devices say other things to each other, if the tokens divide.)"""
    (few,), (many,) = stages(name, Sizes(size)), stages(name, Sizes(2 * size))
    assert weight_bytes(many.config, "bfloat16") < weight_bytes(few.config, "bfloat16")
    bucket, rows = Bucket(tokens, tokens), repeated(context, tokens)
    for field in ("flops", "bytes"):
        assert sums(many.works(bucket, rows), field) <= sums(few.works(bucket, rows), field) * (1 + 1e-9)
    seconds = lambda stage, n, at: total(stage.works(Bucket(n, n), repeated(at, n)), H200, "bfloat16").total
    assert seconds(few, tokens, context) <= seconds(few, tokens + 1, context)
    assert seconds(few, tokens, context) <= seconds(few, tokens, context + 1)


def test_stages_of_a_pipeline_do_together_what_one_device_does():
    one, four = stages("Llama-3-8B"), stages("Llama-3-8B", Sizes(1, 4))
    bucket, rows = Bucket(64, 64), repeated(500, 64)
    assert sums([w for s in four for w in s.works(bucket, rows)], "flops") == sums(one[0].works(bucket, rows), "flops")
    cost, whole = StepCost(four, H200), StepCost(one, H200)
    handed = sum(times(stage.handover(64), H200, "bfloat16").total for stage in four[:-1])
    assert cost.step(bucket, rows).total == pytest.approx(whole.step(bucket, rows).total + handed)


def test_quantised_weights_are_read_as_they_are_kept():
    config = DECODERS["Llama-3-8B"]
    forms = all_products(nnx.eval_shape(lambda: Decoder(config)), ON_THE_FLY["int8"])
    plain, small = (sums(stages("Llama-3-8B", forms=f)[0].products(1), "bytes") for f in (None, forms))
    assert small == pytest.approx(plain / 2, rel=0.01)


# -- time --------------------------------------------------------------------------------------------------------------------


def test_a_roofline_is_the_slower_half():
    compute, memory = times(Work("a", flops=790e12), H200, "bfloat16"), times(Work("a", bytes=4.3e12), H200, "bfloat16")
    assert compute == pytest.approx((1, 0, 0, 0)) and memory == pytest.approx((0, 1, 0, 0))
    both = times(Work("a", flops=790e12, bytes=2 * 4.3e12, sent=0.8 * 450e9, messages=3, kernels=5), H200, "bfloat16")
    assert both == pytest.approx((0, 2, 1 + 3 * 10e-6, 5 * 2e-6)) and both.bound == "memory"


def test_batch_1_of_llama_3_8b_by_hand():
    """15.0 GB of weights that a token reads at 4.3 TB/s: 3.5 ms, before anything else."""
    (stage,) = stages("Llama-3-8B")
    spent = total(stage.works(Bucket(1, 1), repeated(100, 1)), H200, "bfloat16")
    weights = 2 * (8_030_261_248 - 128256 * 4096 - 65 * 4096) / 4.3e12
    assert spent.memory == pytest.approx(weights, rel=0.01) and spent.bound == "memory"
    assert spent.gaps == pytest.approx((32 * (4 + 10 + 2) + 12) * 2e-6)


# -- devices -----------------------------------------------------------------------------------------------------------------


def test_a_device_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "h200"\nname = "H20"\nbandwidth = 4e12\ncompute_efficiency = 0.5\n')
    mine = device(str(path))
    assert mine == dataclasses.replace(H200, name="H20", bandwidth=4e12, compute_efficiency=0.5)
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(dataclasses.asdict(mine)))
    assert device(str(whole)) == mine
    assert device("H200") is H200


@pytest.mark.parametrize("text, said", [
    ("bandwidth = 4e12", "lacks name, memory"),
    ('base = "h300"', "base must be one of h100, h200"),
    ('base = "h200"\nbandwith = 1', "did you mean 'bandwidth'"),
    ('base = "h200"\nbandwidth = -1', "bandwidth must be a number above 0"),
    ('base = "h200"\nbandwidth = "much"', "bandwidth must be a number above 0"),
    ('base = "h200"\nmemory_efficiency = 1.5', "memory_efficiency must be a number above 0 and at most 1"),
    ('base = "h200"\nname = 5', "name must be a text"),
    ('base = ["h200"]', r"base must be one of h100, .*; got \['h200'\]"),
    ('base = "h200"\nmemory = inf', "memory must be a whole number above 0 and at most 1e.30, got inf"),
    ('base = "h200"\nmemory = nan', "memory must be a whole number above 0"),
    ('base = "h200"\nmemory = 0.5', "memory must be a whole number above 0"),
    ('base = "h200"\ncores = 1.5', "cores must be a whole number above 0"),
    ('base = "h200"\nbandwidth = inf', "bandwidth must be a number above 0 and at most 1e.30, got inf"),
    ('base = "h200"\nbandwidth = 1' + "0" * 400, "bandwidth must be a number above 0"),
    ('base = "h200"\nlink_latency = inf', "link_latency must be a number above 0"),
    ("base =", "cannot be read as a device"),
])  # fmt: skip
def test_a_wrong_device_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        device(str(path))


def test_an_unknown_device_is_refused_with_those_that_are_known():
    for name in ("h2000", "no-such.toml"):
        with pytest.raises(RequestError, match="h100, h200, b200, a100, l40s|cannot be read"):
            device(name)


def test_descriptions_for_the_compiler_say_what_the_device_is():
    for name, one in DEVICES.items():
        assert f"device_memory_size: {one.memory}\n" in one.target_config and f'name: "{one.name}"' in one.target_config, name
    assert [one.architecture for one in DEVICES.values()] == ["sm_90a", "sm_90a", "sm_100a", "sm_80", "sm_89"]
    assert "major: 8 minor: 9 }" in devices.DEVICES["l40s"].target_config


def test_rows_of_one_token_come_first():
    rows = Rows(np.array([10, 0]), np.array([1, 64]))
    decode, prefill = stages("tiny")[0].attention(rows)
    assert (decode.name, prefill.name) == ("attention, decode", "attention, prefill")
    assert Sharding(DECODERS["tiny"], 2).local.layers[0].attention.num_heads == 4
