"""GGUF files: parsed, dequantised, renamed and refused as they should be; the same tensors as transformers reads."""

import gguf
import numpy as np
import pytest
from tiny_checkpoints import gguf_tensors, llama_metadata, random, write_gguf

from jaxpaged import gguf_config
from jaxpaged.checkpoint import open_checkpoint
from jaxpaged.gguf_file import GGUFCheckpoint, hf_name, read_header, unpermute
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import door


@pytest.fixture
def make(tmp_path):
    """make(arch, more metadata, more tensors) -> the path of a tiny GGUF."""

    def make(arch="llama", metadata=(), tensors=(), biases=False):
        return write_gguf(tmp_path / "tiny.gguf", {**llama_metadata(arch), **dict(metadata)},
                          {**gguf_tensors(biases), **dict(tensors)}, arch)  # fmt: skip

    return make


def permute(weights, heads):
    """llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute)."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def test_the_header_is_what_the_gguf_package_reads(make):
    more = {"a.bool": True, "a.text": "äß", "a.texts": ["x", "", "é"], "a.ints": [3, -4], "a.floats": [0.5, 2.0]}
    path = make(metadata=more)
    header, reader = read_header(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert np.array_equal(header.metadata[key], field.contents()), key
    assert len(header.tensors) == len(reader.tensors) == 20
    for theirs in reader.tensors:
        ours = header.tensors[theirs.name]
        assert (ours.offset, ours.nbytes, ours.type.name) == (
            theirs.data_offset, theirs.n_bytes, theirs.tensor_type.name)  # fmt: skip
        assert ours.shape == tuple(theirs.shape.tolist())[::-1]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_tensors(make, kind):
    kind, x = gguf.GGMLQuantizationType[kind], random(32, 64)
    raw = gguf.quants.quantize(x, kind)
    checkpoint = GGUFCheckpoint(make(tensors={"blk.0.ffn_down.weight": (raw, kind)}))
    y = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    assert y.dtype == np.float32 and np.array_equal(y, gguf.quants.dequantize(raw, kind))
    assert np.abs(x - y).max() < 0.4


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_in_pieces(make, kind, monkeypatch):
    """Rows are dequantised some at a time, whatever their number."""
    monkeypatch.setattr("jaxpaged.gguf_file.BLOCK_ELEMENTS", 3 * 512)
    kind = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (32, 512 // block * nbytes), np.uint8)  # < 60: no NaN as a scale
    metadata = {"llama.feed_forward_length": 512}
    checkpoint = GGUFCheckpoint(make(metadata=metadata, tensors={"blk.0.ffn_down.weight": (raw, kind)}))
    assert checkpoint.shape("model.layers.0.mlp.down_proj.weight") == (32, 512)
    y = checkpoint.read("model.layers.0.mlp.down_proj.weight")
    assert np.isfinite(y).all() and np.array_equal(y, gguf.quants.dequantize(raw, kind))


def test_read_into_casts(make):
    import ml_dtypes

    checkpoint = GGUFCheckpoint(make())
    out = np.empty((48, 32), ml_dtypes.bfloat16)
    checkpoint.read_into("model.embed_tokens.weight", out)
    assert np.array_equal(out, gguf_tensors()["token_embd.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_llama_rows_are_put_back(make, kind):
    kind = gguf.GGMLQuantizationType[kind]
    q, k, bias = random(32, 32), random(16, 32), random(32)
    pack = (lambda x: x) if kind.name == "F32" else (lambda x: (gguf.quants.quantize(x, kind), kind))
    tensors = {"blk.0.attn_q.weight": pack(permute(q, 4)), "blk.0.attn_k.weight": pack(permute(k, 2)),
               "blk.0.attn_q.bias": permute(bias[:, None], 4)[:, 0]}  # fmt: skip
    checkpoint = GGUFCheckpoint(make(tensors=tensors, biases=True))
    stored = lambda x: x if kind.name == "F32" else gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert np.array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.weight"), stored(q))
    assert np.array_equal(checkpoint.read("model.layers.0.self_attn.k_proj.weight"), stored(k))
    assert np.array_equal(checkpoint.read("model.layers.0.self_attn.q_proj.bias"), bias)


def test_other_architectures_rows_stay(make):
    path = make("qwen2", biases=True)
    assert np.array_equal(GGUFCheckpoint(path).read("model.layers.1.self_attn.q_proj.weight"),
                          gguf_tensors(True)["blk.1.attn_q.weight"])  # fmt: skip


def test_unpermute_inverts_the_converter():
    x = random(24, 5)
    assert np.array_equal(unpermute(permute(x, 3), 3), x)


def accepted(config):
    """The family's door reads the config, and nothing of it is left over."""
    hf = HFConfig(config)
    made = door(hf["model_type"]).decoder_config(hf)
    hf.finish()
    return made


def test_llama_config(make):
    checkpoint = open_checkpoint(make(metadata={"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}))
    wanted = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 128, "vocab_size": 48, "tie_word_embeddings": True, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    assert checkpoint.config == wanted
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2]}
    assert accepted(checkpoint.config).tie


def test_untied(make):
    checkpoint = GGUFCheckpoint(make(tensors={"output.weight": random(48, 32)}))
    assert checkpoint.config["tie_word_embeddings"] is False and "lm_head.weight" in checkpoint.names()


def test_llama3_frequency_factors_are_config_not_a_tensor(make):
    factors = np.array([1, 1, 4, 8], np.float32)
    checkpoint = GGUFCheckpoint(make(tensors={"rope_freqs.weight": factors}))
    assert checkpoint.config["rope_scaling"] == {"rope_type": "freq_factors", "factors": [1.0, 1.0, 4.0, 8.0]}
    assert not [n for n in checkpoint.names() if "rope" in n] and len(checkpoint.names()) == 20
    frequencies = np.array(accepted(checkpoint.config).layers[0].rope.frequencies)
    assert np.allclose(frequencies, 10000.0 ** -(np.arange(0, 8, 2) / 8) / factors)


def test_linear_and_yarn(make):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert GGUFCheckpoint(make(metadata=scaling)).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    scaling = {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.factor": 4.0,
               "qwen3.rope.scaling.original_context_length": 32}  # fmt: skip
    config = GGUFCheckpoint(make("qwen3", scaling)).config
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    accepted(config)


def test_qwen2_has_biases_without_a_key_for_them(make):
    checkpoint = GGUFCheckpoint(make("qwen2", biases=True))
    assert checkpoint.config["model_type"] == "qwen2" and "attention_bias" not in checkpoint.config
    assert "model.layers.0.self_attn.k_proj.bias" in checkpoint.names()
    assert accepted(checkpoint.config).layers[0].attention.bias


def test_qwen3_head_dim_and_norms(make):
    metadata = {"qwen3.attention.key_length": 16, "qwen3.attention.value_length": 16}
    checkpoint = GGUFCheckpoint(make("qwen3", metadata, {"blk.0.attn_q_norm.weight": random(16)}))
    assert checkpoint.config["head_dim"] == 16 and checkpoint.config["model_type"] == "qwen3"
    assert "model.layers.0.self_attn.q_norm.weight" in checkpoint.names()
    assert accepted(checkpoint.config).layers[0].attention.qk_norm


def test_gemma3(make):
    metadata = {"gemma3.block_count": 8, "gemma3.attention.sliding_window": 16, "gemma3.attention.key_length": 16,
                "gemma3.attention.value_length": 16}  # fmt: skip
    norm = random(32)
    checkpoint = GGUFCheckpoint(make("gemma3", metadata, {"blk.0.post_ffw_norm.weight": norm}))
    config = checkpoint.config
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    assert (config["query_pre_attn_scalar"], config["sliding_window"], config["head_dim"]) == (16, 16, 16)
    assert (config["rope_local_base_freq"], config["hidden_activation"]) == (10000.0, "gelu_pytorch_tanh")
    assert np.array_equal(checkpoint.read("model.layers.0.post_feedforward_layernorm.weight"), norm - 1)
    assert "model.layers.0.pre_feedforward_layernorm.weight" in checkpoint.names()
    assert [layer.window for layer in accepted(config).layers] == [16] * 5 + [None] + [16] * 2


def test_gemma3_27b_scales_its_queries_by_168():
    metadata = {"general.architecture": "gemma3", **llama_metadata("gemma3"), "gemma3.block_count": 62,
                "gemma3.attention.head_count": 32, "gemma3.embedding_length": 5376, "gemma3.attention.key_length": 128,
                "gemma3.attention.value_length": 128, "gemma3.attention.sliding_window": 1024}  # fmt: skip
    config = gguf_config.config("x", metadata, {"token_embd.weight": (48, 5376)}, None)
    assert config["query_pre_attn_scalar"] == 168


def test_turn_ends_are_found_by_their_text():
    metadata = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 3,
                "tokenizer.ggml.tokens": ["<pad>", "</s>", "<end_of_turn>", "x", "<end_of_turn>"],
                "tokenizer.ggml.token_type": np.array([3, 3, 3, 1, 1])}  # fmt: skip
    assert gguf_config.generation_config(metadata) == {"eos_token_id": [1, 3, 2]}


def test_unknown_names_stay():
    assert hf_name("blk.3.attn_output.weight", "llama") == "model.layers.3.self_attn.o_proj.weight"
    assert hf_name("blk.3.ssm_a", "llama") == "blk.3.ssm_a"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported; supported: llama, qwen2, qwen3, gemma3"),
        ({"metadata": {"llama.logit_scale": 0.5}}, "llama.logit_scale=0.5"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count is 8; only 0 is supported"),
        ({"metadata": {"llama.rope.dimension_count": 4}}, "rope.dimension_count is 4; only 8"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 1]}}, r"head_count_kv differs between layers \(\[1, 2\]\)"),
        ({"metadata": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts of a split GGUF"),
        ({"tensors": {"blk.0.ffn_up.weight": (np.zeros((4, 136), np.uint8), gguf.GGMLQuantizationType.IQ4_XS)}},
         "tensor blk.0.ffn_up.weight has type IQ4_XS, which cannot be read; types that can: F32"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(make, change, message):
    path = make(**change)
    with pytest.raises(ValueError, match=message) as error:
        GGUFCheckpoint(path)
    assert "tiny.gguf" in str(error.value)


def test_a_file_cut_anywhere_is_refused(make, tmp_path):
    whole, cut = make().read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 20, *range(24, len(whole), 97), len(whole) - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf"):
            GGUFCheckpoint(cut)


def test_a_file_cut_in_half_names_the_first_tensor_that_is_not_whole(demo_gguf, tmp_path):
    size = demo_gguf.stat().st_size // 2
    with open(demo_gguf, "rb") as source:
        (tmp_path / "half.gguf").write_bytes(source.read(size))
    whole = [t for t in gguf_tensor_list(demo_gguf) if t.offset + t.nbytes <= size]
    first = gguf_tensor_list(demo_gguf)[len(whole)].name
    with pytest.raises(ValueError, match=rf"half.gguf is cut short: tensor {first} needs \d+ bytes from byte"):
        GGUFCheckpoint(tmp_path / "half.gguf")


def gguf_tensor_list(path):
    return sorted(read_header(path).tensors.values(), key=lambda t: t.offset)


def test_not_a_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match="x.gguf is not a GGUF file: it starts with"):
        GGUFCheckpoint(tmp_path / "x.gguf")


def test_noise_is_a_value_error(make, tmp_path):
    """Damaged headers give a ValueError, never another exception, a hang or a huge allocation."""
    whole, random_ = bytearray(make().read_bytes()), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in random_.integers(0, 1500, 3):
            data[at] = random_.integers(256)
        (tmp_path / "noise.gguf").write_bytes(data)
        try:
            GGUFCheckpoint(tmp_path / "noise.gguf")
        except ValueError:
            pass


def compare_with_transformers(path):
    """(Its loader of weights alone: `from_pretrained` wants accelerate as well.)"""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    ours = GGUFCheckpoint(path)
    assert set(ours.names()) == set(theirs)
    for name in ours.names():
        np.testing.assert_allclose(ours.read(name), theirs[name].float().numpy(), rtol=0, atol=1e-6, err_msg=name)
    config = config.to_dict()
    return {key: (value, config[key]) for key, value in ours.config.items() if key in config and config[key] != value}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_what_transformers_reads(demo_gguf):
    different = compare_with_transformers(demo_gguf)
    assert different.keys() <= {"rms_norm_eps", "rope_theta"}, different  # it leaves the float32 noise in
    assert all(ours == pytest.approx(theirs, rel=1e-6) for ours, theirs in different.values()), different


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_gemma3_is_what_transformers_reads(gemma_gguf):
    different = compare_with_transformers(gemma_gguf)
    assert different.keys() <= {"rms_norm_eps"}, different


def test_the_demos_are_read_quickly_and_whole(demo_gguf):
    checkpoint = GGUFCheckpoint(demo_gguf)
    accepted(checkpoint.config)
    assert len(checkpoint.names()) == 272 and checkpoint.shape("model.embed_tokens.weight") == (49152, 576)
    checkpoint.close()
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("model.norm.weight")
