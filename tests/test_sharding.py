"""A model that several devices share is the same model: every family, read part by part, against one device."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import rows
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from tiny_hf import errors, forward, make, opened, prompts

from jaxpaged import home, loading, weights
from jaxpaged.axis import Axis
from jaxpaged.config import EngineConfig
from jaxpaged.models.decoder import Decoder, WholeSequence, head_leaves, head_logits
from jaxpaged.models.quantized import QuantizedLinear, all_products, quantize
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLPSpec, MoESpec
from jaxpaged.parallel import Parallel
from jaxpaged.placement import WHOLE, specs_of
from jaxpaged.quantization import ON_THE_FLY
from jaxpaged.request import RequestError
from jaxpaged.sharding import Cut, Sharding, check, stages
from jaxpaged.stage import abstract_decoder

ROWS = [row for door_rows in rows().values() for row in door_rows]
FAMILIES = {row.model_type(): row for row in reversed(ROWS)}  # the first of each
TOKENS = 72


def logits(folder, tokens: np.ndarray, size: int, experts: bool = False, **axis: bool) -> np.ndarray:
    """Of whole sequences, [B, T, V], by `size` devices that share each layer."""
    checkpoint, config, names, ignored = opened(folder)
    config = config.for_length(tokens.shape[1])
    parallel = Parallel.over(jax.devices(), config, size, experts=experts)
    _, _, whole = abstract_decoder(config, "float32")
    arrays = weights.load(checkpoint, whole, names, parallel, progress=False, ignore=ignored)
    checkpoint.close()
    graph, treedef, local = abstract_decoder(parallel.local, "float32")
    place, leaves = parallel.placements[0], tuple(arrays[path] for path in local)
    for path, array in arrays.items():
        assert array.sharding.shard_shape(array.shape) == local[path].shape, path

    def run(leaves, tokens):
        step = WholeSequence(parallel.local, Axis(size, **axis))
        at = dict(zip(local, leaves))
        hidden = nnx.merge(graph, jax.tree.unflatten(treedef, leaves)).hidden(
            tokens, jnp.arange(len(tokens), dtype=jnp.int32), step
        )
        return head_logits([at[path] for path in head_leaves(config)], hidden, parallel.local)

    program = place.jit(run, (specs_of(leaves), WHOLE), PartitionSpec(None, "tp"))
    found = [np.asarray(program(leaves, place.put(row.astype(np.int32)))) for row in tokens]
    return np.stack(found)[:, :, : config.vocab_size]


QUICK = ("llama", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "olmo2", "bloom")
CASES = [pytest.param(row, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, row in FAMILIES.items()]


@pytest.mark.parametrize("row", CASES)
def test_every_family_is_the_same_on_two_devices(tmp_path, row):
    make(tmp_path, row, row.heads[0] if row.heads else None, row.ties[0])
    tokens = prompts(2, TOKENS)
    assert errors(logits(tmp_path, tokens, 2), forward(tmp_path, tokens)).max() < 1e-4


EXPERTS = ("llama4_text", "mixtral", "qwen3_moe", "deepseek_v3", "phimoe", "granitemoeshared", "qwen2_moe", "ernie4_5_moe")
EXPERT_CASES = [pytest.param(FAMILIES[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPERTS]
EVEN = {"llama4_text": 4, "mixtral": 6}  # experts, where the family's own row has a number that two devices cannot share


@pytest.mark.parametrize("row", EXPERT_CASES)
def test_experts_on_devices_of_their_own(tmp_path, row):
    """Shares of sums; or between layers each device has some of the tokens; or it sends them to their experts."""
    if row.model_type() in EVEN:
        row = replace(row, changes=row.changes | {"num_local_experts": EVEN[row.model_type()]})
    make(tmp_path, row, row.heads[0] if row.heads else None, row.ties[0])
    tokens = prompts(1, TOKENS)
    expected = forward(tmp_path, tokens)
    for axis in ({}, {"sequence": True}, {"sequence": True, "ragged": True}):
        assert errors(logits(tmp_path, tokens, 2, experts=True, **axis), expected).max() < 1e-4, axis


# -- the table ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), min_size=1, max_size=3), st.sampled_from((1, 2, 3, 4, 8)))
def test_a_cut_loses_nothing(parts, size):
    """Every number is somebody's; where units divide, exactly one's; all hold as many."""
    cut = Cut(0, tuple(parts), size)
    total = sum(units * width for units, width in parts)
    held = [sum((list(range(*pair)) for pair in cut.ranges(device)), []) for device in range(size)]
    assert sorted(set(sum(held, []))) == list(range(total))
    assert all(len(numbers) <= cut.length for numbers in held)
    if all(units % size == 0 for units, _ in parts):
        assert sum(map(len, held)) == total and all(len(numbers) == cut.length for numbers in held)


LLAMA = DecoderConfig(
    vocab_size=101, embed_dim=64, max_positions=64,
    layers=(LayerSpec(AttentionSpec(8, 2, 16), MLPSpec(128)), LayerSpec(AttentionSpec(8, 2, 16), MoESpec(6, 2, 32))),
)  # fmt: skip


@pytest.mark.parametrize("path, shape, device, ranges", [
    ("layers.0.attention.qkv.weight", (192, 64), 3, [(96, 128), (144, 160), (176, 192)]),  # a group is two devices'
    ("layers.0.attention.qkv.bias", (192,), 0, [(0, 32), (128, 144), (160, 176)]),
    ("layers.0.attention.out.weight", (64, 128), 1, [(32, 64)]),
    ("layers.0.mlp.gate_up.weight", (256, 64), 1, [(32, 64), (160, 192)]),
    ("layers.0.mlp.gate_up.adapters.b", (3, 256, 16), 1, [(32, 64), (160, 192)]),
    ("layers.0.mlp.down.scales", (64, 8), 3, [(6, 8)]),
    ("layers.1.mlp.down.weight", (6, 64, 32), 2, [(16, 24)]),
    ("embed.weight", (101, 64), 3, [(78, 101)]),
])  # fmt: skip
def test_what_a_device_holds(path, shape, device, ranges):
    cut = Sharding(LLAMA, 4).cut(path, shape)
    assert cut is not None and cut.ranges(device) == ranges


@pytest.mark.parametrize("path, shape", [
    ("norm.weight", (64,)), ("layers.0.attention_norm.weight", (64,)), ("layers.0.attention.out.bias", (64,)),
    ("layers.0.mlp.down.scales", (64, 1)), ("layers.0.attention.qkv.adapters.a", (3, 48, 64)),
    ("layers.1.mlp.router.weight", (6, 64)), ("layers.0.attention.q_norm.weight", (16,)),
])  # fmt: skip
def test_what_all_devices_hold(path, shape):
    assert Sharding(LLAMA, 4).cut(path, shape) is None


def test_experts_are_cut_by_expert_if_that_is_asked_for():
    cut = Sharding(LLAMA, 2, experts=True).cut("layers.1.mlp.gate_up.bias", (6, 64))
    assert cut is not None and cut.axis == 0 and cut.ranges(1) == [(3, 6)]


@pytest.mark.parametrize("size, experts, message", [
    (3, False, "8 query heads, 2 key and value heads, an MLP of width 128, .*sizes that work: 1, 2, 4, 8"),
    (4, True, "6 experts.*sizes that work: 1, 2$|6 experts.*sizes that work: 1, 2[.]"),
    (16, False, "8 query heads"),
])  # fmt: skip
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(size, experts, message):
    with pytest.raises(RequestError, match=message):
        check(LLAMA, size, experts)


def test_experts_are_for_models_that_have_some():
    with pytest.raises(RequestError, match="enable_expert_parallel is for models with experts"):
        check(replace(LLAMA, layers=LLAMA.layers[:1]), 1, experts=True)


def test_stages():
    assert stages(7, 3) == [range(0, 3), range(3, 5), range(5, 7)]
    with pytest.raises(RequestError, match="has 7 layers; use 7 or less"):
        stages(7, 8)


def test_more_devices_than_there_are():
    with pytest.raises(RequestError, match="takes 16 devices, but there are 8"):
        Parallel.over(jax.devices(), LLAMA, 8, 2)


def test_a_host_holds_a_part_of_a_leaf_at_a_time(tmp_path, monkeypatch):
    """Whatever is read is one device's, of the leaf that has most."""
    held = []
    empty = home.empty
    monkeypatch.setattr(home, "empty", lambda shape, dtype: held.append(math.prod(shape)) or empty(shape, dtype))
    make(tmp_path, FAMILIES["llama"], "MHA", False)
    checkpoint, config, names, ignored = opened(tmp_path)
    parallel = Parallel.over(jax.devices(), config, 4)
    _, _, whole = abstract_decoder(config, "float32")
    _, _, local = abstract_decoder(parallel.local, "float32")
    arrays = weights.load(checkpoint, whole, names, parallel, progress=False, ignore=ignored)
    assert max(held) == max(math.prod(leaf.shape) for leaf in local.values()) < max(a.size for a in arrays.values()) / 3
    assert len(held) == sum(4 if leaf.shape != local[path].shape else 1 for path, leaf in whole.items()), "each is read once"


# -- small weights -----------------------------------------------------------------------------------------------------------

ODD = DecoderConfig(vocab_size=101, embed_dim=64, max_positions=64, layers=(LayerSpec(AttentionSpec(8, 8, 16), MLPSpec(96)),))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_groups_of_small_weights_are_not_shared(size):
    """Whoever has some columns has their scales too, however few columns that are (48, 24, 12)."""
    path, shape = "layers.0.mlp.down", (64, 96)
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    local = Sharding(ODD, size).local
    form = all_products(nnx.eval_shape(lambda: Decoder(local)), ON_THE_FLY["int4"])[path]
    whole, parts = quantize(w, form), []
    for device in range(size):
        part = QuantizedLinear((64, 96 // size), form, None)
        for name, array in whole.items():
            cut = Sharding(ODD, size).cut(f"{path}.{name}", array.shape)
            ((start, end),) = cut.ranges(device)
            getattr(part, name)[...] = jnp.asarray(array[:, start:end])
        parts.append(np.asarray(part.dense(jnp.float32)))
    assert np.abs(np.concatenate(parts, 1) - w).max() <= whole["scales"].max()  # a step of the widest group


def test_a_tree_whose_groups_would_be_cut_is_refused_before_it_is_placed(monkeypatch):
    _, _, leaves = abstract_decoder(ODD, "float32")
    forms = {path: replace(form, group=96 if path.endswith("down") else 64)
             for path, form in all_products(nnx.eval_shape(lambda: Decoder(ODD)), ON_THE_FLY["int4"]).items()}  # fmt: skip
    _, _, small = abstract_decoder(ODD, "float32", forms)
    tree = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in small.items()}
    assert leaves.keys() != small.keys() and weights.forms_of(tree) == forms
    monkeypatch.setattr(weights, "from_tree", None)
    with pytest.raises(RequestError, match="tensor_parallel_size=2 does not divide the quantised weights"):
        loading.load(EngineConfig(dtype="float32"), None, Parallel.over(jax.devices(), ODD, 2), None, None, tree, False)
