from families import WINDOW, Row

ROWS = (
    Row("llama", "Llama", {"hidden_act": "gelu_pytorch_tanh"}),
    Row("llama with biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Row("mistral", "Mistral", {"sliding_window": None}),
    Row("mistral, sliding", "Mistral", {"sliding_window": WINDOW}),
)
