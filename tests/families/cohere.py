from hub_form import published

from families import WINDOW, Row

TIES = (True, False)
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
PLUS = {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5, "layer_norm_eps": 1e-4, "hidden_act": "gelu"}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 8e6}}
HUB_KEYS = {"logit_scale": None, "rope_parameters": None, "tie_word_embeddings": None, "layer_norm_eps": None,
            "pretraining_tp": 1, "model_max_length": 131072, "num_key_value_heads": None, "use_qk_norm": None}  # fmt: skip
HUB_KEYS_2 = {
    "layer_types": None, "rope_parameters": None, "rope_theta": 50000, "tie_word_embeddings": None, "sliding_window_pattern": 3,
    "layer_switch": 3, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
    "use_parallel_embedding": True, "use_qk_norm": False, "cache_implementation": "hybrid",
}  # fmt: skip
THIRD = {
    "sliding_window": WINDOW,
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_theta": 50000.0},
    "sliding_window_pattern": 3,
}
ROWS = (
    Row("cohere", "Cohere", ties=TIES),
    Row("cohere with norms of q and k, biases", "Cohere", {**PLUS, **LINEAR}),  # tied it says the same again and again
    Row("cohere as on the Hub", "Cohere", heads=("MHA",), ties=(True,), convert=published({}, HUB_KEYS)),
    Row("cohere2", "Cohere2", LAYERS, ties=TIES),
    Row("cohere2 with biases", "Cohere2", {"attention_bias": True, "logit_scale": 0.25, **LAYERS}, ties=TIES),
    Row("cohere2 as on the Hub", "Cohere2", THIRD, ties=(True,), convert=published({}, HUB_KEYS_2)),
    Row("cohere2 of few words", "Cohere2", {"sliding_window": WINDOW, "num_hidden_layers": 5}, ties=(True,),
        convert=published({}, {"layer_types": None, "rope_parameters": None, "logit_scale": None})),
)  # fmt: skip
