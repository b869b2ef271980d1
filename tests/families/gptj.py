from families import Row

SIZES = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}
ALL = {"rotary_dim": 12, "n_inner": 80, "activation_function": "relu"}
ROWS = (
    Row("gptj", "GPTJ", sizes=SIZES, heads=()),
    Row("gptj, all of a head rotated", "GPTJ", ALL, SIZES, heads=()),
)
