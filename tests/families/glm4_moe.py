from hub_form import published

from families import Row

EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "num_hidden_layers": 3}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
HUB = {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None, "n_group": 1,
       "num_nextn_predict_layers": 1, "rms_norm_eps": None, "topk_group": None}  # fmt: skip
FEW = dict.fromkeys(["rope_parameters", "partial_rotary_factor", "first_k_dense_replace", "n_shared_experts", "norm_topk_prob",
                     "n_group", "topk_group", "routed_scaling_factor", "use_qk_norm", "attention_bias"])  # fmt: skip
NEXT = ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight", "model.layers.3.enorm.weight")
ROWS = (
    Row("glm4_moe", "Glm4Moe", EXPERTS),
    Row("glm4_moe with biases, norms of q and k, groups", "Glm4Moe", {
        **EXPERTS, **GROUPS, "attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 2, "n_shared_experts": 2,
        "norm_topk_prob": False, "partial_rotary_factor": 0.25}),
    Row("glm4_moe as on the Hub", "Glm4Moe", {**EXPERTS, "use_qk_norm": True}, convert=published({}, HUB, buffers=NEXT)),
    Row("glm4_moe of few words", "Glm4Moe", EXPERTS, convert=published({}, FEW)),
)  # fmt: skip
