from families import WINDOW, Row

ROWS = (
    Row("starcoder2", "Starcoder2"),
    Row("starcoder2 without biases, sliding", "Starcoder2",
        {"use_bias": False, "sliding_window": WINDOW, "hidden_act": "relu"}),
)  # fmt: skip
