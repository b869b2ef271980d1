from families import SIZES as ALL
from families import Row

SIZES = {**{key: ALL[key] for key in ALL if key != "head_dim"}, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.5}  # fmt: skip
TWELVE = {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}
ROWS = (
    Row("stablelm", "StableLm", sizes=SIZES),
    Row("stablelm-12b", "StableLm", TWELVE, SIZES),
    Row("stablelm, all rotated", "StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 1.0, "hidden_act": "gelu"}, SIZES),
)
