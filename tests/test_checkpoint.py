"""Safetensors folders and configs: what is whole is read as it is, what is damaged or unknown is refused by name."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoints import CONFIG, random, write_folder

from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.hf_config import HARMLESS, HFConfig

TENSORS = {f"t{i}": random(4, i + 1) for i in range(5)}


def refused(folder, *messages):
    with pytest.raises(ValueError) as error:
        open_checkpoint(folder)
    for message in messages:
        assert message in str(error.value)


def header_of(path):
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back(tmp_path, shards):
    checkpoint = open_checkpoint(write_folder(tmp_path, TENSORS, shards=shards))
    assert sorted(checkpoint.names()) == sorted(TENSORS) and checkpoint.config == CONFIG
    for name, x in TENSORS.items():
        assert checkpoint.shape(name) == x.shape and np.array_equal(checkpoint.read(name), x)
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64",
                                   "int8", "uint8", "bool"])  # fmt: skip
def test_dtypes(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = (random(3, 5) * 4).astype(dtype)
    checkpoint = open_checkpoint(write_folder(tmp_path, {"x": x}))
    assert checkpoint.dtype("x") == dtype and checkpoint.read("x").dtype == dtype
    assert np.array_equal(checkpoint.read("x"), x)


def test_scalars_and_empty_tensors(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, {"s": np.full((), 3.0), "e": random(0, 4)}))
    assert checkpoint.read("s") == 3 and checkpoint.read("e").shape == (0, 4)


def test_reading_copies_nothing_and_outlives_close(tmp_path):
    checkpoint = open_checkpoint(write_folder(tmp_path, {"big": random(1000, 1000), "small": random(3)}))
    tracemalloc.start()
    big = checkpoint.read("big")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 and not big.flags.writeable
    checkpoint.close()
    assert np.array_equal(big, random(1000, 1000))
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("small")


def test_generation_config(tmp_path):
    write_folder(tmp_path, TENSORS)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [1, 2]}


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "has no weights", "model.safetensors")


def test_a_truncated_file_names_the_tensor_and_the_bytes(tmp_path):
    file = write_folder(tmp_path, {"first": random(10, 10), "second": random(10, 10)}) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(tmp_path, "model.safetensors is cut short", "second needs 400 bytes", "has 300 of them")
    file.write_bytes(whole[:50])
    refused(tmp_path, "model.safetensors is cut short", "header should have")
    for size in range(0, len(whole) - 1, 13):
        file.write_bytes(whole[:size])
        refused(tmp_path, "model.safetensors")


def test_damaged_headers(tmp_path):
    file = write_folder(tmp_path, TENSORS) / "model.safetensors"
    header, data = header_of(file)

    def changed(change):
        new = json.loads(json.dumps(header))
        change(new)
        rewrite(file, new, data)

    changed(lambda h: h["t1"].update(shape=[4, 3]))
    refused(tmp_path, "tensor t1 float32 [4, 3] needs 48 bytes, the header gives it 32")
    changed(lambda h: h["t1"].update(data_offsets=h["t0"]["data_offsets"], shape=[4, 1]))
    refused(tmp_path, "overlaps the one before")
    changed(lambda h: h.pop("t0"))
    refused(tmp_path, "follows a gap of")
    changed(lambda h: h["t1"].update(dtype="Q4"))
    refused(tmp_path, "dtype 'Q4' is not known")
    changed(lambda h: h["t1"].update(shape=[-4, -2]))
    refused(tmp_path, "impossible shape")
    changed(lambda h: h.update(t1=7))
    refused(tmp_path, "not a readable safetensors file")
    text = '{"t0": 1, ' + json.dumps(header)[1:]
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data)
    refused(tmp_path, "a name appears twice in its header")
    rewrite(file, header, data + b"more")
    refused(tmp_path, "has 4 bytes after its last tensor")
    file.write_bytes((50).to_bytes(8, "little") + b"[" * 200)
    refused(tmp_path, "not a readable safetensors file")
    file.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refused(tmp_path, "cut short or is not")


def test_a_missing_shard(tmp_path):
    write_folder(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "lacks 1 of the 3 files its index names: model-00002-of-00003.safetensors")


def test_shards_that_do_not_match_the_index(tmp_path):
    write_folder(tmp_path, TENSORS, shards=2)
    save_file({"t0": TENSORS["t0"], "new": TENSORS["t1"]}, tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, "2 named by the index are not there: t2 (in model-00001", "1 are there and not in the index: new")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    write_folder(tmp_path / "in", TENSORS, shards=2)
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": "../out.safetensors"}}))
    refused(tmp_path / "in", "files outside its folder: ../out.safetensors")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(tmp_path / "in", "no weight_map")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "pickled weights only (pytorch_model.bin)", "may run any code")


def test_bad_paths_and_configs(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is neither a folder")
    refused(tmp_path, "has no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, "holds a JSON list")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.Q4_0.gguf").write_bytes(b"GGUF")
    refused(tmp_path, f"To load model.Q4_0.gguf, give the file itself: {tmp_path / 'model.Q4_0.gguf'}")


def test_config_remembers_what_was_read():
    more = {"logit_scale": 2.0, "use_cache": True, "nothing": None, "off": False, "empty": {}}
    hf = HFConfig({**CONFIG, **more}, source="c")
    for key in CONFIG:
        hf.get(key)
    with pytest.raises(ValueError) as error:
        hf.finish()
    text = str(error.value)
    assert "c has keys that the family 'llama' does not know here: logit_scale=2.0." in text
    assert "hf_overrides={'logit_scale': None}" in text
    hf.finish(harmless=["logit_scale"])
    assert hf.get("logit_scale") == 2.0
    hf.finish()


def test_what_is_said_twice_is_harmless_once_read():
    hf = HFConfig({"layer_types": ["full_attention"], "_sliding_window_pattern": 6})
    with pytest.raises(ValueError, match="_sliding_window_pattern=6"):
        hf.finish()
    hf.get("layer_types")
    hf.finish()
    hf = HFConfig({"_sliding_window_pattern": 6})
    hf.get("layer_types")
    with pytest.raises(ValueError, match="_sliding_window_pattern=6"):
        hf.finish()


def test_zero_says_something():
    with pytest.raises(ValueError, match="shared_experts=0"):
        HFConfig({"shared_experts": 0}).finish()


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match=r"folder/config.json lacks the key 'hidden_size'; give it with hf_overrides"):
        HFConfig({"hidden_size": None}, source="folder/config.json")["hidden_size"]


def test_overrides_come_first():
    hf = HFConfig({"a": 1, "b": 2}, {"a": 3, "b": None, "c": 4})
    assert (hf["a"], hf.get("b", 9), hf["c"], len(hf), set(hf)) == (3, None, 4, 3, {"a", "b", "c"})
    hf.finish()


def test_keys_that_change_the_mathematics_are_not_harmless():
    changes = {"rope_scaling", "rope_theta", "sliding_window", "logit_scale", "quantization_config", "layer_types",
               "tie_word_embeddings", "auto_map", "partial_rotary_factor", "mlp_bias", "final_logit_softcapping",
               "num_local_experts", "residual_multiplier", "hidden_act", "is_causal", "pretraining_tp"}  # fmt: skip
    assert not changes & HARMLESS


def test_read_into_reads_or_casts(tmp_path):
    x = random(6, 5)
    checkpoint = open_checkpoint(write_folder(tmp_path, {"a": x, "s": np.full((), 3.0, np.float32)}))
    for out in (np.empty((6, 5), np.float32), np.empty((6, 5), ml_dtypes.bfloat16), np.empty((12, 5), np.float32)[::2]):
        checkpoint.read_into("a", out)
        assert np.array_equal(out, x.astype(out.dtype))
    checkpoint.read_into("s", scalar := np.empty((), np.float32))
    assert scalar == 3


def test_a_file_that_shrinks_while_open(tmp_path):
    file = write_folder(tmp_path, {"a": random(100, 100)}) / "model.safetensors"
    checkpoint = open_checkpoint(tmp_path)
    with open(file, "r+b") as shrinking:
        shrinking.truncate(1000)
    with pytest.raises(ValueError, match="became shorter while tensor a was read"):
        checkpoint.read_into("a", np.empty((100, 100), np.float32))
