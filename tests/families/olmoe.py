from hub_form import published

from families import Row

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24, "hidden_size": 64}
HUB = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None, "head_dim": None, "attention_bias": None,
       "norm_topk_prob": None, "rms_norm_eps": None}  # fmt: skip
ROWS = (
    Row("olmoe", "Olmoe", EXPERTS),
    Row("olmoe with biases, clipped", "Olmoe", {**EXPERTS, "attention_bias": True, "clip_qkv": 0.8, "norm_topk_prob": True}),
    Row("olmoe of few words", "Olmoe", EXPERTS, heads=("MHA",),
        convert=published({}, {"num_key_value_heads": None, **HUB})),
)  # fmt: skip
