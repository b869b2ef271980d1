"""Small checkpoints on disk for the tests: safetensors folders and GGUF files."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 48, "tie_word_embeddings": False,
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def write_folder(folder: Path, tensors: dict[str, np.ndarray], config: dict | None = None, shards: int = 1) -> Path:
    """config.json and model.safetensors, or that many shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map, names = {}, list(tensors)
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n] for n in names[k::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[k::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def llama_metadata(arch: str = "llama") -> dict:
    return {
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 32,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 64,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
    }


def gguf_tensors(biases: bool = False) -> dict[str, np.ndarray]:
    """Under llama.cpp's names, for `llama_metadata`."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (48, 32), "output_norm.weight": (32,)}
    for i in range(2):
        layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
                 "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"blk.{i}.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")}
        if biases:
            shapes |= {f"blk.{i}.attn_{x}.bias": (n,) for x, n in (("q", 32), ("k", 16), ("v", 16))}
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def write_gguf(path: Path, metadata: dict, tensors: dict, arch: str = "llama") -> Path:
    """metadata values: int, float, bool, str or list. tensors: float32 arrays, or (bytes u8 [rows, n], type)."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
