from families import WINDOW, Row

SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
ROWS = (
    Row("qwen2", "Qwen2"),
    Row("qwen2, sliding", "Qwen2", SLIDING),
    Row("qwen3", "Qwen3"),
    Row("qwen3 with biases, sliding", "Qwen3", {"attention_bias": True, **SLIDING}),
)
