from families import Row

ROWS = (
    Row("phi", "Phi", {"partial_rotary_factor": 0.5}),
    Row("phi with norms of q and k", "Phi",
        {"qk_layernorm": True, "head_dim": 12, "hidden_act": "gelu", "rope_parameters": {
            "rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.34}}),
)  # fmt: skip
