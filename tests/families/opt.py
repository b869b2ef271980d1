from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 512}  # fmt: skip
BARE = {"enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True,
        "activation_function": "gelu"}  # fmt: skip
HUB = published({"model.": ""}, {"prefix": "</s>", "word_embed_proj_dim": None, "activation_dropout": 0.1})
ROWS = (
    Row("opt", "OPT", sizes=SIZES, heads=(), ties=(True, False)),
    Row("opt with the least", "OPT", BARE, SIZES, (), (True, False)),
    Row("opt as on the Hub", "OPT", sizes=SIZES, heads=(), ties=(True,), convert=HUB),
)
