from hub_form import published

from families import WINDOW, Row

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
SOME_DENSE = {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 4, "norm_topk_prob": True}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 128}}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
HUB_QWEN2 = {"rope_parameters": None, "rope_theta": 5000.0, "layer_types": None, "qkv_bias": None, "mlp_only_layers": None,
             "sliding_window": 32768, "max_window_layers": 21}  # fmt: skip
HUB_QWEN3 = {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": None, "num_local_experts": None, "num_experts": 6,
             "max_window_layers": 48, "sliding_window": None}  # fmt: skip
ROWS = (
    Row("qwen2_moe", "Qwen2Moe", SHARED),
    Row("qwen2_moe, some dense, some slide", "Qwen2Moe",
        {"qkv_bias": False, "max_window_layers": 2, **SHARED, **SOME_DENSE, **SLIDING}),
    Row("qwen2_moe as on the Hub", "Qwen2Moe", {**SHARED, **ROPE}, convert=published({}, HUB_QWEN2)),
    Row("qwen2_moe of few words, some slide", "Qwen2Moe", {**SHARED, **SLIDING},
        convert=published({}, {"layer_types": None, "max_window_layers": None, "decoder_sparse_step": None})),
    Row("qwen3_moe", "Qwen3Moe", EXPERTS),
    Row("qwen3_moe with biases, some dense, yarn", "Qwen3Moe", {"attention_bias": True, **EXPERTS, **SOME_DENSE, **YARN}),
    Row("qwen3_moe, sliding", "Qwen3Moe", {**EXPERTS, **SLIDING}),
    Row("qwen3_moe as on the Hub", "Qwen3Moe", {"norm_topk_prob": True, **EXPERTS, **ROPE}, convert=published({}, HUB_QWEN3)),
)  # fmt: skip
