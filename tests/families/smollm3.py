from hub_form import published

from families import SIZES as ALL
from families import WINDOW, Row

SIZES, TIES = {**ALL, "pad_token_id": None}, (True, False)
BIASES = {"no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e6}
HUB_KEYS = {"rope_parameters": None, "rope_theta": 5e6, "max_window_layers": 28, "pretraining_tp": 2}
UNSAID = dict.fromkeys(("rope_parameters", "no_rope_layers", "no_rope_layer_interval", "layer_types", "num_key_value_heads",
                        "tie_word_embeddings"))  # fmt: skip
KINDS = {"no_rope_layers": [0, 1], "layer_types": ["full_attention", "sliding_attention"]}
FOUR, FIVE = {"num_hidden_layers": 4}, {"num_hidden_layers": 5}
FEW = published({}, UNSAID)
ROWS = (
    Row("smollm3", "SmolLM3", FOUR, SIZES, ties=TIES),
    Row("smollm3 with biases, sliding", "SmolLM3", {**BIASES, **SLIDING}, SIZES, ties=TIES),
    Row("smollm3, each second, yarn", "SmolLM3", {"no_rope_layer_interval": 2, "rope_parameters": YARN}, SIZES, ties=TIES),
    Row("smollm3, kinds of layers", "SmolLM3", {**KINDS, **SLIDING}, SIZES, ties=TIES),
    Row("smollm3 as on the Hub", "SmolLM3", {"rope_parameters": {"rope_theta": 5e6}, **FOUR}, SIZES, ties=(True,),
        convert=published({}, HUB_KEYS)),
    Row("smollm3 of few words", "SmolLM3", FIVE, SIZES, ("MHA",), (True,), convert=FEW),
    Row("smollm3 of few words, sliding", "SmolLM3", {**FIVE, **SLIDING}, SIZES, ("MHA",), (True,), convert=FEW),
)  # fmt: skip
