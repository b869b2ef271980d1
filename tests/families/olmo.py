from hub_form import published

from families import WINDOW, Row

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 1.0,
        "attention_factor": 1.2}  # fmt: skip
TWO = {
    "full_attention": {**YARN, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
}
FOUR = {"sliding_window": WINDOW, "num_hidden_layers": 4, "rope_parameters": TWO}
HUB = published({}, {"layer_types": None, "rope_parameters": None, "rope_scaling": YARN, "rope_theta": 500000})
ROWS = (
    Row("olmo", "Olmo"),
    Row("olmo with biases, clipped", "Olmo", {"attention_bias": True, "clip_qkv": 0.5}),
    Row("olmo2", "Olmo2"),
    Row("olmo2 with biases", "Olmo2", {"attention_bias": True, "rms_norm_eps": 1e-4}),
    Row("olmo3", "Olmo3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}),
    Row("olmo3 with biases, yarn", "Olmo3", {"attention_bias": True, **FOUR}),
    Row("olmo3 as on the Hub", "Olmo3", FOUR, heads=("GQA",), ties=(False,), convert=HUB),
)
