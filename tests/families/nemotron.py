from hub_form import published

from families import Row

BIASES = {"attention_bias": True, "mlp_bias": True}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
HUB_KEYS = {"rope_parameters": None, "rope_theta": 10000, "partial_rotary_factor": 0.5, "rope_scaling": None}
UNSAID = dict.fromkeys(("rope_parameters", "norm_eps", "hidden_act", "rms_norm_eps"))
ROWS = (
    Row("nemotron", "Nemotron"),
    Row("nemotron with biases", "Nemotron", {**BIASES, "hidden_act": "gelu", "rope_parameters": {**LINEAR,
        "partial_rotary_factor": 0.25}}),
    Row("nemotron as on the Hub", "Nemotron", heads=("GQA",), ties=(False,), convert=published({}, HUB_KEYS)),
    Row("nemotron of few words", "Nemotron", heads=("GQA",), ties=(False,), convert=published({}, UNSAID)),
    Row("arcee", "Arcee"),
    Row("arcee with biases", "Arcee", {**BIASES, "hidden_act": "silu", "rope_parameters": LINEAR}),
    Row("arcee of few words", "Arcee", heads=("GQA",), ties=(False,), convert=published({}, UNSAID)),
)  # fmt: skip
