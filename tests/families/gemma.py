from hub_form import published

from families import WINDOW, Row

LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 24}
SAYS_LITTLE = {"layer_types": None, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": None,
               "rope_parameters": None, "query_pre_attn_scalar": None, "tie_word_embeddings": None}  # fmt: skip
ROWS = (
    Row("gemma", "Gemma", {"attention_bias": True}),
    Row("gemma as on the Hub", "Gemma", convert=published({}, {"hidden_act": "gelu", "rope_parameters": None})),
    Row("gemma2", "Gemma2", {"sliding_window": WINDOW}),
    Row("gemma2 with biases and caps", "Gemma2", {"attention_bias": True, **LAYERS, **CAPS}),
    Row("gemma2 of few words", "Gemma2", {"sliding_window": WINDOW, "head_dim": 256, "num_hidden_layers": 3}, ties=(True,),
        convert=published({}, SAYS_LITTLE)),
    Row("gemma3", "Gemma3Text", LAYERS),
    Row("gemma3 with biases and caps", "Gemma3Text", {"attention_bias": True, **LAYERS, **CAPS}),
)  # fmt: skip
