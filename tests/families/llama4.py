import json

import numpy as np
from safetensors.numpy import load_file, save_file

from families import Row

SMALL = {"num_local_experts": 3, "intermediate_size": 32, "intermediate_size_mlp": 80, "attention_chunk_size": 48,
         "no_rope_layer_interval": 2, "interleave_moe_layer_step": 2, "floor_scale": 24}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
          "original_max_position_embeddings": 64}  # fmt: skip
WORDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_hidden_layers",
         "head_dim", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "num_local_experts",
         "attention_chunk_size", "floor_scale", "no_rope_layers", "interleave_moe_layer_step")  # fmt: skip
IMAGES = ("vision_model.patch_embedding.linear.weight", "vision_model.model.layers.0.mlp.fc1.bias",
          "vision_model.class_embedding", "multi_modal_projector.linear_1.weight")  # fmt: skip


def whole(folder) -> None:
    """With the part for images, which is not looked at, and a text_config of few words."""
    file = folder / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, **{name: np.ones((2, 2), np.float32) for name in IMAGES}}, file)
    said = json.loads((folder / "config.json").read_text())
    text = {key: said[key] for key in WORDS} | {"attn_temperature_tuning": 4, "for_llm_compressor": False}
    config = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 2}, "image_token_index": 99,
              "boi_token_index": 97, "eoi_token_index": 98, "tie_word_embeddings": False}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


ROWS = (
    Row("llama4_text", "Llama4Text", SMALL),
    Row("llama4_text, two of all experts, llama3, biases", "Llama4Text", {
        **SMALL, "interleave_moe_layer_step": 1, "num_experts_per_tok": 2, "rope_parameters": LLAMA3, "attention_bias": True}),
    Row("llama4_text, chunks that pages straddle, no norms", "Llama4Text", {
        **SMALL, "attention_chunk_size": 40, "use_qk_norm": False, "attn_temperature_tuning": False, "moe_layers": [0]}),
    Row("llama4_text, all in chunks", "Llama4Text", {**SMALL, "no_rope_layers": [1, 1]}),
    Row("llama4", "Llama4Text", SMALL, ties=(False,), saved_as="llama4", convert=whole),
)  # fmt: skip
