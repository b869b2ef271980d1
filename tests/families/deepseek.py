from hub_form import published

from families import Row

SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.9}  # fmt: skip
GROUPS = {"n_group": 3, "topk_group": 2}
LATENT = {"sizes": SIZES, "heads": ("MHA",)}
WORDS = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}, "moe_layer_freq": 1, "ep_size": 1,
         "aux_loss_alpha": 0.001, "seq_aux": True}  # fmt: skip
ON_THE_HUB = {
    **WORDS, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_theta": 10000, "rope_parameters": None,
    "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}},
    "rope_interleave": None, "head_dim": None, "qk_head_dim": None,
}  # fmt: skip
GUESSES = ("eh_proj.weight", "enorm.weight", "mlp.experts.0.gate_proj.weight", "mlp.gate.weight", "shared_head.head.weight",
           "self_attn.kv_b_proj.weight_scale_inv")  # fmt: skip
hub = published({}, ON_THE_HUB, tuple(f"model.layers.3.{name}" for name in GUESSES))
kimi = published({}, {**ON_THE_HUB, "model_type": "kimi_k2", "rope_scaling": None, "num_nextn_predict_layers": 0})
ROWS = (
    Row("deepseek_v2", "DeepseekV2", {"topk_method": "greedy"}, **LATENT),
    Row("deepseek_v2, groups, yarn", "DeepseekV2", {
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, "rope_parameters": YARN, **GROUPS}, **LATENT),
    Row("deepseek_v2, queries at once, biases", "DeepseekV2", {
        "q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "n_shared_experts": 1}, **LATENT),
    Row("deepseek_v3", "DeepseekV3", GROUPS, **LATENT),
    Row("deepseek_v3 as on the Hub", "DeepseekV3", {"rope_parameters": YARN, **GROUPS}, convert=hub, **LATENT),
    Row("deepseek_v3, one group, halves, not normalised", "DeepseekV3", {
        "n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False, "q_lora_rank": None,
        "attention_bias": True}, **LATENT),
    Row("kimi_k2", "DeepseekV3", {"n_group": 1, "topk_group": 1}, saved_as="kimi_k2", convert=kimi, **LATENT),
)  # fmt: skip
