from families import WINDOW, Row

LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24}
ROWS = (
    Row("gemma3", "Gemma3Text", LAYERS),
    Row("gemma3 with biases and caps", "Gemma3Text", {"attention_bias": True, **LAYERS, **CAPS}),
)
