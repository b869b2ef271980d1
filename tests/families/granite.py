from hub_form import published

from families import WINDOW, Row

FACTORS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0}
BIASES = {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
HUB_KEYS = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
THETAS = {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
          "sliding_window": WINDOW, "layer_rope_theta": [0, 10000.0, 500.0]}  # fmt: skip
SAYS_NO_MORE = dict.fromkeys(("rope_parameters", "layer_types", "layer_rope_theta", "rms_norm_eps", "tie_word_embeddings"))
UNSAID = {"rope_parameters": None, **dict.fromkeys(FACTORS)}
ROWS = (
    Row("granite", "Granite", FACTORS),
    Row("granite with biases", "Granite", {**FACTORS, **BIASES}),
    Row("granite as on the Hub", "Granite", FACTORS, ties=(True,), convert=published({}, HUB_KEYS)),
    Row("granite of few words", "Granite", heads=("GQA",), ties=(False,), convert=published({}, UNSAID)),
    Row("granite, sliding", "GraniteSWA", {**FACTORS, **BIASES, **SLIDING}, ties=(True, False)),
    Row("granite, sliding, three bases", "GraniteSWA", {**FACTORS, **THETAS}, ties=(True, False)),
    Row("granite, sliding, of few words", "GraniteSWA",
        {"num_hidden_layers": 5, "sliding_window": WINDOW, "attention_multiplier": 0.25}, None, ("GQA",), (True,),
        convert=published({}, SAYS_NO_MORE)),
)  # fmt: skip
