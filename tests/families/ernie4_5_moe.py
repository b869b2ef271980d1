from hub_form import published

from families import Row

EXPERTS = {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 24, "num_hidden_layers": 3}
HUB = {"rope_parameters": None, "rope_theta": 500000.0, "use_rmsnorm": True, "moe_capacity": [64, 64, 64], "moe_gate": "topk",
       "moe_use_aux_free": True, "moe_layer_end_index": None, "moe_norm_min": None, "tie_word_embeddings": None,
       "moe_layer_interval": None, "moe_layer_start_index": None, "moe_num_shared_experts": None}  # fmt: skip
NEXT = ("model.mtp_block.0.mlp.up_proj.weight", "model.mtp_linear_proj.0.weight", "model.mtp_emb_norm.0.weight")
TIES = (True, False)
ROWS = (
    Row("ernie4_5_moe", "Ernie4_5_Moe", EXPERTS, ties=TIES),
    Row("ernie4_5_moe with biases, few sparse layers", "Ernie4_5_Moe", {
        **EXPERTS, "use_bias": True, "moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 4,
        "num_hidden_layers": 6, "moe_num_shared_experts": 0}, ties=TIES),
    Row("ernie4_5_moe as on the Hub", "Ernie4_5_Moe", EXPERTS, ties=(True,), convert=published({}, HUB, buffers=NEXT)),
)  # fmt: skip
