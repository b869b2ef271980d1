from hub_form import published

from families import Row

EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24, "attention_multiplier": 0.2}
FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.7, "attention_bias": True}
SHARED = {"shared_intermediate_size": 40}
ATTENTION = {"layer_types": ["full_attention"] * 2, "mamba_n_heads": 4}
HUB = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
HYBRID_HUB = {**HUB, "layer_types": ["attention"] * 2, "mlp_bias": False, "normalization_function": "rmsnorm",
              "init_method": "mup"}  # fmt: skip
ROWS = (
    Row("granitemoe", "GraniteMoe", {**EXPERTS, **FACTORS}),
    Row("granitemoe as on the Hub", "GraniteMoe", EXPERTS, convert=published({}, HUB)),
    Row("granitemoeshared", "GraniteMoeShared", {**EXPERTS, **FACTORS, **SHARED}),
    Row("granitemoeshared that shares nothing", "GraniteMoeShared", {**EXPERTS, "shared_intermediate_size": 0},
        convert=published({}, {"shared_intermediate_size": None})),
    Row("granitemoehybrid", "GraniteMoeHybrid", {**EXPERTS, **FACTORS, **SHARED, **ATTENTION}),
    Row("granitemoehybrid as on the Hub, without experts, rope", "GraniteMoeHybrid",
        {**EXPERTS, **SHARED, **ATTENTION, "num_local_experts": 0, "position_embedding_type": "rope"},
        convert=published({}, HYBRID_HUB)),
)  # fmt: skip
