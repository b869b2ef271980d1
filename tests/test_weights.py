"""Weights: every tensor used once, every leaf filled once, one leaf at a time; anything else is refused by name."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import CONFIG, gguf_tensors, llama_metadata, random, write_folder, write_gguf

from jaxpaged import weights
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.hf_config import HFConfig
from jaxpaged.home import empty
from jaxpaged.models import door
from jaxpaged.models.decoder import Decoder
from jaxpaged.weights import Name

NAMES = [
    Name("embed.weight", "embed.weight"),
    Name("l.{i}.q", "layers.{i}.qkv", 0, 3),
    Name("l.{i}.k", "layers.{i}.qkv", 1, 3),
    Name("l.{i}.v", "layers.{i}.qkv", 2, 3),
    Name("l.{i}.norm.weight", "layers.{i}.norm.weight"),
    Name("l.{i}.bias", "layers.{i}.bias"),
]


def leaf(*shape, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


LEAVES = {
    "embed.weight": leaf(10, 4),
    **{f"layers.{i}.qkv": leaf(8, 4) for i in range(2)},
    **{f"layers.{i}.norm.weight": leaf(4) for i in range(2)},
}


def tensors():
    x = {"embed.weight": random(10, 4)}
    for i in range(2):
        x |= {f"l.{i}.q": random(4, 4, seed=i), f"l.{i}.k": random(2, 4, seed=i), f"l.{i}.v": random(2, 4, seed=9 + i)}
        x |= {f"l.{i}.norm.weight": random(4, seed=i)}
    return x


def load(tmp_path, given, leaves=None, names=NAMES, ignore=()):
    return weights.load(open_checkpoint(write_folder(tmp_path, given)), leaves or LEAVES, names, progress=False, ignore=ignore)


def refused(tmp_path, given, *messages, **kwargs):
    with pytest.raises(ValueError) as error:
        load(tmp_path, given, **kwargs)
    for message in messages:
        assert message in str(error.value)
    return str(error.value)


def test_parts_are_joined_in_order(tmp_path):
    x = tensors()
    made = load(tmp_path, x)
    assert list(made) == list(LEAVES) and all(isinstance(a, jax.Array) for a in made.values())
    for i in range(2):
        assert np.array_equal(made[f"layers.{i}.qkv"], np.concatenate([x[f"l.{i}.{p}"] for p in "qkv"]))
        assert np.array_equal(made[f"layers.{i}.norm.weight"], x[f"l.{i}.norm.weight"])


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_casts(tmp_path, source, target):
    source, target = (np.dtype(getattr(ml_dtypes, t, t)) for t in (source, target))
    x = {name: a.astype(source) for name, a in tensors().items()}
    made = load(tmp_path, x, {p: leaf(*a.shape, dtype=target) for p, a in LEAVES.items()})
    assert {a.dtype for a in made.values()} == {target}
    assert np.array_equal(made["embed.weight"], x["embed.weight"].astype(target))


def test_everything_wrong_is_told_at_once(tmp_path):
    x = tensors()
    del x["l.0.k"], x["l.1.norm.weight"]
    x |= {"surprise": random(1), "l.0.bias": random(4), "l.7.q": random(4, 4), "embed.weight": random(11, 4)}
    x["l.1.v"] = random(3, 4)
    text = refused(
        tmp_path, x,
        "2 missing: l.0.k; l.1.norm.weight",
        "embed.weight [11, 4], expected [10, 4] for embed.weight",
        "l.1.q [4, 4] + l.1.k [2, 4] + l.1.v [3, 4], expected [8, 4] for layers.1.qkv",
        "2 of another shape",
    )  # fmt: skip
    extra = next(line for line in text.splitlines() if "extra" in line)
    assert extra.startswith("  3 extra: ") and all(name in extra for name in ("surprise", "l.0.bias", "l.7.q"))


def test_long_lists_are_counted(tmp_path):
    text = refused(tmp_path, {**tensors(), **{f"x{i}": random(1) for i in range(25)}}, "25 extra", "and 15 more")
    assert text.count("; x") == 9


def test_nothing_is_read_before_all_is_checked(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, {**tensors(), "x": random(1)}))
    checkpoint.read = checkpoint.read_into = None
    with pytest.raises(ValueError, match="1 extra: x"):
        weights.load(checkpoint, LEAVES, NAMES, progress=False)


def test_ignored_tensors(tmp_path):
    x = {**tensors(), "l.0.rotary.inv_freq": random(2), "l.11.rotary.inv_freq": random(2)}
    assert load(tmp_path, x, ignore=["l.{i}.rotary.inv_freq"])
    refused(tmp_path, {**x, "l.a.rotary.inv_freq": random(2)}, "1 extra: l.a.rotary", ignore=["l.{i}.rotary.inv_freq"])


def test_two_tensors_for_one_place(tmp_path):
    names = [*NAMES, Name("other.weight", "embed.weight")]
    refused(tmp_path, {**tensors(), "other.weight": random(10, 4)}, "the same place as", names=names)


def test_a_leaf_without_a_rule(tmp_path):
    refused(tmp_path, tensors(), "1 missing: lost (no rule fills it)", leaves={**LEAVES, "lost": leaf(3)})


def test_patterns_are_not_regular_expressions(tmp_path):
    x = tensors()
    x["lX0Xq"] = x.pop("l.0.q")
    refused(tmp_path, x, "1 missing: l.0.q", "1 extra: lX0Xq")


def test_quantised_sources_are_refused(tmp_path):
    x = {**tensors(), "embed.weight": np.zeros((10, 4), np.uint8)}
    x["l.0.q"] = x["l.0.q"].astype(ml_dtypes.float8_e4m3fn)
    refused(tmp_path, x, "2 in a quantised or integer dtype", "embed.weight (uint8)", "l.0.q (float8_e4m3fn)")


def test_values_beyond_float16_are_refused(tmp_path):
    x = {**tensors(), "l.0.norm.weight": np.full(4, 1e6, np.float32)}
    leaves = {p: leaf(*a.shape, dtype=np.float16) for p, a in LEAVES.items()}
    refused(tmp_path, x, "layers.0.norm.weight has values beyond float16; use dtype=", leaves=leaves)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_one_leaf_at_a_time(tmp_path, dtype, far_device):
    """16 leaves of 1 MiB on disk: the peak is one of them, in its own dtype."""
    x = {f"l.{i}.norm.weight": random(512, 512, seed=i) for i in range(16)}
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    leaves = {f"layers.{i}.norm.weight": leaf(512, 512, dtype=dtype) for i in range(16)}
    checkpoint = open_checkpoint(write_folder(tmp_path, x))
    peak, held = traced(lambda: weights.load(checkpoint, leaves, NAMES, progress=False))
    size = 512 * 512 * dtype.itemsize
    assert size <= peak < 1.3 * size and held < 0.3 * size


def test_a_quantised_tensor_is_never_whole_in_float32_beside_its_leaf(tmp_path, monkeypatch, far_device):
    import gguf

    monkeypatch.setattr("jaxpaged.gguf_file.BLOCK_ELEMENTS", 1 << 14)
    q8 = gguf.GGMLQuantizationType.Q8_0
    embed = (gguf.quants.quantize(random(4096, 256), q8), q8)
    metadata = {**llama_metadata(), "llama.embedding_length": 256}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", metadata, {"token_embd.weight": embed}))
    leaves, names = {"e": leaf(4096, 256, dtype=ml_dtypes.bfloat16)}, [Name("model.embed_tokens.weight", "e")]
    peak, _ = traced(lambda: weights.load(checkpoint, leaves, names, progress=False))
    assert peak < 1.5 * 4096 * 256 * 2


@pytest.fixture
def far_device(monkeypatch):
    """A device with memory of its own, of which a number of each leaf comes back: JAX on CPU lives on in the host's arrays."""
    monkeypatch.setattr("jaxpaged.home._there", lambda array, device: jnp.float32(array[0, 0]))


def traced(f):
    f()  # imports and compilations
    tracemalloc.start()
    f()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, held


def test_leaves_go_where_they_say(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    leaves = {p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for p, a in LEAVES.items()}
    assert all(a.sharding == sharding for a in load(tmp_path, tensors(), leaves).values())


def test_the_bar_counts_bytes(tmp_path, capsys):
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors()))
    weights.load(checkpoint, LEAVES, NAMES)
    assert "Loading weights: 100%" in capsys.readouterr().err
    weights.load(checkpoint, LEAVES, NAMES, progress=False)
    assert capsys.readouterr().err == ""


def test_dummy_is_repeatable_and_about_right():
    leaves = {"a.weight": leaf(300, 300), "b.weight": leaf(300, 300, dtype=ml_dtypes.bfloat16)}
    leaves["x_norm.weight"] = leaf(2000)
    one, two, other = (weights.dummy(leaves, seed, progress=False) for seed in (0, 0, 1))
    assert all(np.array_equal(one[p], two[p]) and not np.array_equal(one[p], other[p]) for p in leaves)
    assert not np.array_equal(one["a.weight"], one["b.weight"].astype(jnp.float32))
    assert abs(float(one["a.weight"].std()) - 0.02) < 1e-3 and abs(float(one["a.weight"].mean())) < 1e-3
    assert abs(float(one["x_norm.weight"].mean()) - 1) < 1e-2 and one["b.weight"].dtype == ml_dtypes.bfloat16
    alone = weights.dummy({"b.weight": leaves["b.weight"]}, 0, progress=False)
    assert np.array_equal(alone["b.weight"], one["b.weight"])


def test_dummy_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(weights, "DUMMY_CHUNK", 100)
    many = weights.dummy({"a": leaf(50, 50)}, 0, progress=False)["a"]
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert np.array_equal(many, weights.dummy({"a": leaf(50, 50)}, 0, progress=False)["a"])
    assert len(np.unique(np.asarray(many).reshape(-1, 100), axis=0)) == 25


TREES = {
    "dotted": lambda x: x,
    "nested": lambda x: {"embed": {"weight": x["embed.weight"]},
                         "layers": {str(i): {"qkv": x[f"layers.{i}.qkv"],
                                             "norm": {"weight": x[f"layers.{i}.norm.weight"]}} for i in range(2)}},
    "lists": lambda x: {"embed": {"weight": x["embed.weight"], "bias": None},
                        "layers": [{"qkv": x[f"layers.{i}.qkv"], "norm.weight": x[f"layers.{i}.norm.weight"]}
                                   for i in range(2)]},
    "variables": lambda x: {p: nnx.Param(a) for p, a in x.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", TREES)
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_from_tree(form, make):
    x = {path: make(random(*a.shape)) for path, a in LEAVES.items()}
    made = weights.from_tree(TREES[form](x), LEAVES)
    assert list(made) == list(LEAVES) and all(np.array_equal(made[p], x[p]) for p in x)


def test_from_tree_does_not_copy_what_is_there_and_does_copy_numpy():
    there = {p: jnp.asarray(random(*a.shape)) for p, a in LEAVES.items()}
    made = weights.from_tree(there, LEAVES)
    assert all(made[p].unsafe_buffer_pointer() == there[p].unsafe_buffer_pointer() for p in LEAVES)
    host = empty((10, 4), np.float32)  # aligned: jax would share it
    host[...] = 1.0
    made = weights.from_tree({**there, "embed.weight": host}, LEAVES)
    host[...] = 2.0
    assert np.array_equal(made["embed.weight"], np.ones((10, 4), np.float32))


def test_from_tree_casts_and_refuses():
    x = {p: random(*a.shape).astype(np.float64) for p, a in LEAVES.items()}
    assert weights.from_tree(x, LEAVES)["layers.0.qkv"].dtype == np.float32
    half = {p: jnp.asarray(a, jnp.bfloat16) for p, a in x.items()}
    assert weights.from_tree(half, LEAVES)["layers.0.qkv"].dtype == np.float32
    del x["layers.0.qkv"]
    x |= {"more": np.zeros(3), "embed.weight": np.zeros((4, 10), int)}
    with pytest.raises(ValueError) as error:
        weights.from_tree(x, LEAVES)
    for message in ("The tree does not fit the model", "1 missing: layers.0.qkv", "1 extra: more",
                    "embed.weight [4, 10], expected [10, 4]", "embed.weight (int64)"):  # fmt: skip
        assert message in str(error.value)
    with pytest.raises(ValueError, match="has a str at layers.0"):
        weights.from_tree({"layers": ["x"]}, LEAVES)


def abstract(config, dtype=jnp.float32):
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, jnp.dtype(dtype))))
    return {".".join(map(str, p)): jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in nnx.to_flat_state(state)}


def test_a_decoder_and_its_state_are_trees():
    config = door("llama").decoder_config(HFConfig(CONFIG))
    model = Decoder(config)
    for tree in (model, nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
        made = weights.from_tree(tree, abstract(config))
        assert np.array_equal(made["layers.1.attention.qkv.weight"], model.layers[1].attention.qkv.weight[...])


def test_a_gguf_fills_a_decoder(tmp_path):
    given = gguf_tensors()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", llama_metadata("qwen3"), {
        **given, **{f"blk.{i}.attn_{x}_norm.weight": random(8) for i in range(2) for x in "qk"}}, "qwen3"))  # fmt: skip
    family, hf = door("qwen3"), HFConfig(checkpoint.config)
    config = family.decoder_config(hf)
    hf.finish()
    made = weights.load(checkpoint, abstract(config), family.names(config), ignore=family.IGNORED, progress=False)
    qkv = np.concatenate([given[f"blk.1.attn_{x}.weight"] for x in "qkv"])
    assert np.array_equal(made["layers.1.attention.qkv.weight"], qkv)
    gate_up = np.concatenate([given[f"blk.0.ffn_{x}.weight"] for x in ("gate", "up")])
    assert np.array_equal(made["layers.0.mlp.gate_up.weight"], gate_up)


def test_the_demo_fills_a_decoder(demo_gguf):
    checkpoint = open_checkpoint(demo_gguf)
    family, hf = door("llama"), HFConfig(checkpoint.config)
    config = family.decoder_config(hf)
    hf.finish()
    made = weights.load(checkpoint, abstract(config, jnp.bfloat16), family.names(config), progress=False)
    assert sum(a.size for a in made.values()) == 134_515_008
    assert all(a.dtype == jnp.bfloat16 and bool(jnp.isfinite(a).all()) for a in made.values())


FAMILIES = {
    "Llama": {"rope_theta": 10000.0},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 16, "num_hidden_layers": 7},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_is_loaded_whole(tmp_path, family, tie):
    """Config keys, tensor names, shards and dtypes as transformers writes them today."""
    import torch
    import transformers

    sizes = {k: v for k, v in CONFIG.items() if k != "model_type"} | {"tie_word_embeddings": tie, **FAMILIES[family]}
    config = getattr(transformers, f"{family}Config")(**sizes, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = open_checkpoint(tmp_path)
    hf = HFConfig(checkpoint.config)
    decoder, config = door(hf["model_type"]), door(hf["model_type"]).decoder_config(hf)
    hf.finish()
    made = weights.load(checkpoint, abstract(config, jnp.bfloat16), decoder.names(config), progress=False)
    theirs = model.state_dict()
    assert np.array_equal(made["layers.1.attention.out.weight"].astype(jnp.float32),
                          theirs["model.layers.1.self_attn.o_proj.weight"].float().numpy())  # fmt: skip
    assert ("head.weight" in made) == (not tie)
