"""Quantised weights: each checkpoint format, written here by its own description, computes what its dequantised twin does."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from families import Row
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import write_gguf
from tiny_hf import edit, errors, logits_of, make, prompts

from jaxpaged import LLM, SamplingParams
from jaxpaged.gguf_blocks import KEPT, in_form, unpack
from jaxpaged.models.decoder import WholeSequence
from jaxpaged.models.quantized import Form, QuantizedLinear, quantize
from jaxpaged.models.spec import DecoderConfig

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LLAMA = Row("", "Llama", SIZES)
MIXTRAL = Row("", "Qwen3Moe", {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32})
GROUP = 32
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
ENGINE = {"skip_tokenizer_init": True, "enforce_eager": True, "use_tqdm": False, "block_size": 16, "max_model_len": 64,
          "max_num_batched_tokens": 32, "max_num_seqs": 2}  # fmt: skip


def words(numbers: np.ndarray, order=range(8)) -> np.ndarray:
    """Numbers 0..15 [..., 8 n] -> int32 [..., n]; number i of a word has bits 4 p and on, p where order has i."""
    parts = numbers.reshape(*numbers.shape[:-1], -1, 8).astype(np.uint32)
    found = np.zeros(parts.shape[:-1], np.uint32)
    for place, i in enumerate(order):
        found |= parts[..., i] << np.uint32(4 * place)
    return found.view(np.int32)


def numbers_of(w: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Some 4-bit numbers [out, in], scales and zeros [out, groups]: any will do, they need not be good ones."""
    parts = w.reshape(len(w), -1, GROUP)
    scales = (np.abs(parts).max(-1) / 7).astype(np.float16)
    zeros = np.full(scales.shape, 8) if symmetric else 6 + np.arange(scales.size).reshape(scales.shape) % 5
    numbers = np.clip(np.round(parts / scales[..., None].astype(np.float32)) + zeros[..., None], 0, 15).astype(np.uint8)
    return numbers.reshape(w.shape), scales, zeros


def dequantized(numbers, scales, zeros) -> np.ndarray:
    scales = scales.astype(np.float32)
    parts = numbers.reshape(*scales.shape, -1).astype(np.float32) - zeros[..., None]
    return (parts * scales[..., None]).reshape(numbers.shape)


def gptq(w):
    numbers, scales, zeros = numbers_of(w, symmetric=False)
    tensors = {"qweight": words(numbers.reshape(len(w), -1)).T, "qzeros": words((zeros - 1).T), "scales": scales.T,
               "g_idx": np.arange(w.shape[1], dtype=np.int32) // GROUP}  # fmt: skip
    return tensors, dequantized(numbers, scales, zeros)


def awq(w):
    numbers, scales, zeros = numbers_of(w, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": words(numbers.T, order), "qzeros": words(zeros.T, order), "scales": scales.T}
    return tensors, dequantized(numbers, scales, zeros)


def compressed_int4(w, symmetric=True):
    numbers, scales, zeros = numbers_of(w, symmetric)
    tensors = {"weight_packed": words(numbers), "weight_scale": scales, "weight_shape": np.array(w.shape)}
    if not symmetric:
        tensors["weight_zero_point"] = words(zeros.T).T
    return tensors, dequantized(numbers, scales, zeros)


def compressed_int8(w):
    scales = (np.abs(w).max(1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    numbers = np.clip(np.round(w / scales.astype(np.float32)), -127, 127).astype(np.int8)
    return {"weight": numbers, "weight_scale": scales}, numbers * scales.astype(np.float32)


def fp8_tensor(w):
    scale = np.float32(np.abs(w).max() / 448)
    numbers = (w / scale).astype(ml_dtypes.float8_e4m3fn)
    tensors = {"weight": numbers, "weight_scale": np.array([scale]), "input_scale": np.array([1], np.float32)}
    return tensors, numbers.astype(np.float32) * scale


def fp8_block(w, rows=24, columns=32):
    """Blocks of 24 rows: of 64 rows the last block has 16."""
    padded = np.zeros((-(-len(w) // rows) * rows, w.shape[1]), np.float32)
    padded[: len(w)] = w
    blocks = padded.reshape(len(padded) // rows, rows, -1, columns)
    scales = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
    wide = np.repeat(np.repeat(scales, rows, 0), columns, 1)[: len(w)]
    numbers = (w / wide).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scales}, numbers.astype(np.float32) * wide


def weights_of(kind: str, bits: int, **more) -> dict:
    group = {"weights": {"num_bits": bits, "type": kind, "symmetric": True, **more}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


FORMATS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "compressed int4": (compressed_int4, weights_of("int", 4, strategy="group", group_size=GROUP)),
    "compressed int4, zeros": (lambda w: compressed_int4(w, symmetric=False),
                               weights_of("int", 4, strategy="group", group_size=GROUP, symmetric=False)),
    "compressed int8": (compressed_int8, weights_of("int", 8, strategy="channel")),
    "fp8": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 blocks": (fp8_block, {"quant_method": "fp8", "weight_block_size": [24, 32], "activation_scheme": "dynamic"}),
}  # fmt: skip


def write(folder, twin, row, write_product, config, skip=("lm_head", "embed", "norm", "layers.1.mlp.down_proj")) -> None:
    """A quantised checkpoint of a random model in `folder`, and the floats that it stands for in `twin`. Some products are
    floats in both."""
    make(folder, row)
    make(twin, row)
    tensors = load_file(folder / "model.safetensors")
    quantised, floats = {}, dict(tensors)
    for name, w in tensors.items():
        if w.ndim != 2 or any(part in name for part in skip) or name.endswith("mlp.gate.weight"):
            quantised[name] = w
            continue
        parts, floats[name] = write_product(w)
        quantised |= {name.removesuffix("weight") + suffix: np.ascontiguousarray(part) for suffix, part in parts.items()}
    save_file(quantised, folder / "model.safetensors")
    save_file(floats, twin / "model.safetensors")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


@pytest.fixture(params=FORMATS)
def checkpoint(request, tmp_path):
    write(tmp_path / "q", tmp_path / "twin", LLAMA, *FORMATS[request.param])
    return tmp_path


def generate(folder, prompt, **changes):
    with LLM(str(folder), **{**ENGINE, **changes}) as llm:
        (output,) = llm.generate([prompt], PARAMS, use_tqdm=False)
        leaves = llm._built.runner.leaves
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(leaves))
    completion = output.outputs[0]
    logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids)]
    return completion.token_ids, np.array(logprobs), num_bytes


def test_a_quantised_checkpoint_is_its_dequantised_twin(checkpoint):
    prompt = prompts(40).tolist()
    tokens, logprobs, num_bytes = generate(checkpoint / "q", prompt)
    expected, wanted, float_bytes = generate(checkpoint / "twin", prompt)
    assert tokens == expected and errors(logprobs, wanted) < 1e-4
    assert num_bytes < 0.6 * float_bytes  # kept small


DEEPSEEK = Row("", "DeepseekV3", {
    **SIZES, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1})  # fmt: skip


def test_latent_attention_and_experts_in_fp8_blocks(tmp_path):
    """As DeepSeek V3 is published: the products of latent attention too, of which one is used as two matrices."""
    write(tmp_path / "q", tmp_path / "twin", DEEPSEEK, *FORMATS["fp8 blocks"], skip=("lm_head", "embed", "norm"))
    prompt = prompts(40).tolist()
    tokens, logprobs, num_bytes = generate(tmp_path / "q", prompt)
    expected, wanted, float_bytes = generate(tmp_path / "twin", prompt)
    assert tokens == expected and errors(logprobs, wanted) < 1e-4
    assert num_bytes < 0.6 * float_bytes


# -- MXFP4 -------------------------------------------------------------------------------------------------------------

GPT_OSS = Row("", "GptOss", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20})
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.layers.1.mlp.experts.down_proj", "lm_head"]


def mxfp4(w: np.ndarray) -> tuple[dict, np.ndarray]:
    """Blocks and scales of matrices [X, in, out], and the floats that they stand for: any numbers will do."""
    rows = np.swapaxes(w, 1, 2).reshape(len(w), w.shape[2], -1, 32)
    rng = np.random.default_rng(rows.size)
    codes, scales = rng.integers(0, 16, rows.shape), rng.integers(121, 125, rows.shape[:3])
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    floats = (E2M1[codes] * 2.0 ** (scales[..., None] - 127)).astype(np.float32).reshape(*rows.shape[:2], -1)
    return {"blocks": blocks, "scales": scales.astype(np.uint8)}, np.ascontiguousarray(np.swapaxes(floats, 1, 2))


def write_mxfp4(folder, twin) -> None:
    """gpt-oss as it is published; one product of a layer's experts is left in floats."""
    make(folder, GPT_OSS)
    make(twin, GPT_OSS)
    tensors = load_file(folder / "model.safetensors")
    floats = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj")) and name not in NOT_CONVERTED]:
        parts, floats[name] = mxfp4(tensors.pop(name))
        tensors |= {f"{name}_{suffix}": part for suffix, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    save_file(floats, twin / "model.safetensors", metadata={"format": "pt"})
    config = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    edit(folder, lambda hf: {**hf, "quantization_config": config})


def test_mxfp4_is_its_dequantised_twin_and_transformers(tmp_path):
    write_mxfp4(tmp_path / "q", tmp_path / "twin")
    prompt = prompts(40).tolist()
    tokens, logprobs, num_bytes = generate(tmp_path / "q", prompt)
    expected, wanted, float_bytes = generate(tmp_path / "twin", prompt)
    assert tokens == expected and errors(logprobs, wanted) < 1e-5
    kept = 4 * (2 * 64 * 192 + 96 * 64)  # numbers of four experts' matrices, one of the four kinds is left in floats
    assert float_bytes - num_bytes == 4 * kept - kept * 17 // 32  # a nibble a number, and a byte for 32
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twin", attn_implementation="eager").eval()
    theirs = jax.nn.log_softmax(logits_of(model, [prompt + tokens])[0])[len(prompt) - 1 : -1]
    assert tokens == theirs.argmax(-1).tolist()
    assert errors(logprobs, np.asarray(theirs)[np.arange(len(tokens)), tokens]) < 1e-5


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("row", [LLAMA, MIXTRAL], ids=["dense", "experts"])
def test_on_the_fly(tmp_path, name, row):
    """Close to the floats, and exactly what the small numbers stand for."""
    make(tmp_path, row)
    prompt = prompts(40).tolist()
    tokens, logprobs, num_bytes = generate(tmp_path, prompt, quantization=name)
    _, floats, float_bytes = generate(tmp_path, prompt)
    assert num_bytes < 0.6 * float_bytes and len(tokens) == 8
    assert np.isfinite(logprobs).all() and not np.array_equal(logprobs, floats)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: rounded(k, w, name) for k, w in tensors.items()}, tmp_path / "model.safetensors")
    again, wanted, _ = generate(tmp_path, prompt)
    assert tokens == again and errors(logprobs, wanted) < 1e-4


def rounded(name: str, w: np.ndarray, kind: str) -> np.ndarray:
    if w.ndim < 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.weight", "norm")):
        return w
    group = next(g for g in (128, 64, 32) if w.shape[-1] % g == 0)  # the largest that fits
    form = Form("int4", group, zeros=True) if kind == "int4" else Form(kind)
    return floats_of(quantize(w, form), form, w.shape)


def floats_of(arrays: dict, form: Form, shape) -> np.ndarray:
    module = QuantizedLinear(shape, form, None)
    for key, array in arrays.items():
        getattr(module, key)[...] = jnp.asarray(array)
    return np.asarray(module.dense(jnp.dtype(jnp.float32)))


@pytest.mark.parametrize("form, most", [(Form("int8"), 0.01), (Form("int8", 16), 0.006), (Form("fp8"), 0.04),
                                        (Form("int4", 32), 0.11), (Form("int4", 32, zeros=True), 0.1),
                                        (Form("mxfp4", 32), 0.14)])  # fmt: skip
def test_the_numbers_are_the_nearest(form, most):
    """Root mean square of what is lost, as a share of the numbers."""
    w = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    w[3] = 0
    found = floats_of(quantize(w, form), form, w.shape)
    assert np.linalg.norm(found - w) < most * np.linalg.norm(w) and (found[3] == 0).all()
    if form.kind not in ("fp8", "mxfp4"):
        scales = quantize(w, form)["scales"]
        assert (np.abs(found - w).reshape(*scales.shape, -1).max(-1) <= 0.5001 * scales).all()


def test_gradients_flow_through_what_is_not_quantised():
    x, form = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)), jnp.float32), Form("int8")
    module = QuantizedLinear((8, 64), form, nnx.Param(jnp.zeros(8)))
    module.weight[...] = jnp.ones((8, 64), jnp.int8)
    step = WholeSequence(DecoderConfig(vocab_size=8, embed_dim=64, layers=(), max_positions=8))
    gradient = jax.grad(lambda x: module(x, step).sum())(x)
    assert gradient.shape == x.shape


REFUSED = [
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: fp8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "desc_act=True is not supported"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "bits=3 is not supported"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "version='gemv' is not supported"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not supported"),
    (weights_of("int", 2), "weights of 2 bits, type 'int'"),
    (weights_of("int", 4, group_size=32, actorder="group"), "actorder='group' is not supported"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "one group of modules is"),
]


@pytest.mark.parametrize("config, message", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, config, message):
    make(tmp_path, LLAMA, quantization_config=None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    with pytest.raises(ValueError, match=message):
        LLM(str(tmp_path), **ENGINE)


def test_a_format_that_the_checkpoint_has_not_is_refused(tmp_path):
    make(tmp_path, LLAMA)
    with pytest.raises(ValueError, match="quantization='awq' is a checkpoint's format, and this one is not quantised"):
        LLM(str(tmp_path), quantization="awq", **ENGINE)
    write(tmp_path, tmp_path / "twin", LLAMA, *FORMATS["awq"])
    with pytest.raises(ValueError, match="quantization='int8', but the checkpoint is quantised already"):
        LLM(str(tmp_path), quantization="int8", **ENGINE)


# -- GGUF --------------------------------------------------------------------------------------------------------------

HALVES = {"Q4_0": (18, [0]), "Q8_0": (34, [0]), "Q4_K": (144, [0, 2]), "Q6_K": (210, [208])}  # bytes, where its float16s are
GGUF_SIZE = {"embedding_length": 256, "feed_forward_length": 256, "context_length": 128, "block_count": 2,
             "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
             "rope.freq_base": 10000.0}  # fmt: skip


def raw_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Any bytes are blocks, if their float16s are no NaN; u8 [rows, bytes]."""
    rng, (size, halves) = np.random.default_rng(seed), HALVES[kind]
    elements = 256 if kind.endswith("K") else 32
    blocks = rng.integers(0, 256, (rows, columns // elements, size)).astype(np.uint8)
    spread = {"Q4_0": 5, "Q8_0": 74, "Q4_K": 300, "Q6_K": 1400}[kind] * columns**0.5  # of a number that is multiplied by it
    for at in halves:
        scales = rng.uniform(0.5, 1, blocks.shape[:2]) / spread
        blocks[..., at : at + 2] = np.ascontiguousarray(scales.astype("<f2"))[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def gguf_file(path, types: dict[str, str]):
    import gguf

    shapes = {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
              "ffn_gate": (256, 256), "ffn_up": (256, 256), "ffn_down": (256, 256)}  # fmt: skip
    tensors = {"token_embd.weight": (raw_blocks("Q8_0", 101, 256, 1), gguf.GGMLQuantizationType.Q8_0),
               "output_norm.weight": np.ones(256, np.float32)}  # fmt: skip
    for i in range(2):
        tensors |= {f"blk.{i}.{name}.weight": np.ones(256, np.float32) for name in ("attn_norm", "ffn_norm")}
        for k, (name, shape) in enumerate(shapes.items()):
            kind = types.get(f"{i}.{name}", types.get(name, "Q4_K"))
            raw = raw_blocks(kind, *shape, seed=10 * i + k)
            tensors[f"blk.{i}.{name}.weight"] = raw, gguf.GGMLQuantizationType[kind]
    return write_gguf(path, {f"llama.{key}": value for key, value in GGUF_SIZE.items()}, tensors)


@pytest.mark.parametrize("kind", KEPT)
def test_blocks_are_what_the_gguf_package_makes_of_them(kind):
    import gguf

    raw = raw_blocks(kind, 5, 512, 0)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    for form in (KEPT[kind], KEPT[kind].join(KEPT["Q6_K"]), KEPT[kind].join(KEPT["Q4_K"])):
        arrays = in_form(unpack(raw, kind), KEPT[kind], form)
        if not form.zeros:
            assert (arrays.pop("zeros") == 0).all()
        found = floats_of(arrays, Form(*form), wanted.shape)
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("types", [{}, {"attn_v": "Q6_K", "ffn_down": "Q8_0", "attn_output": "Q4_0", "1.ffn_up": "Q8_0"}],
                         ids=["one type", "mixed"])  # fmt: skip
def test_gguf_blocks_that_are_kept_compute_what_their_floats_do(tmp_path, types):
    file = gguf_file(tmp_path / "model.gguf", types)
    prompt = prompts(40).tolist()
    tokens, logprobs, num_bytes = generate(file, prompt, quantization="gguf")
    expected, wanted, float_bytes = generate(file, prompt)
    assert tokens == expected and errors(logprobs, wanted) < 1e-4
    assert num_bytes < 0.5 * float_bytes
