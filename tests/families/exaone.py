from hub_form import published

from families import WINDOW, Row

LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e6,
          "original_max_position_embeddings": 64}  # fmt: skip
FOUR = {"num_hidden_layers": 4, "sliding_window": WINDOW, "rope_parameters": LLAMA3}
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LETTERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]}
HUB = published({}, {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 1e6, "sliding_window_pattern": "LLLG"})
BY_LETTERS = published({}, {"layer_types": None, "sliding_window_pattern": "LG", "rope_parameters": None})
BY_NUMBER = published({}, dict.fromkeys(("layer_types", "rope_parameters", "sliding_window_pattern", "rms_norm_eps")))
UNSAID = {"rope_parameters": None, "head_dim": None, "num_key_value_heads": None, "rms_norm_eps": None}
ROWS = (
    Row("exaone", "Exaone"),
    Row("exaone with biases", "Exaone",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rope_parameters": LLAMA3}),
    Row("exaone4", "Exaone4", KINDS),
    Row("exaone4, all full", "Exaone4", {"sliding_window": None, "sliding_window_pattern": None,
        "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3}),
    Row("exaone4 as on the Hub", "Exaone4", FOUR, convert=HUB),
    Row("exaone4 by letters", "Exaone4", {"num_hidden_layers": 5, "sliding_window": WINDOW, **LETTERS}, convert=BY_LETTERS),
    Row("exaone4 by number", "Exaone4", {"num_hidden_layers": 5, "sliding_window": WINDOW}, None, ("GQA",), convert=BY_NUMBER),
)  # fmt: skip
