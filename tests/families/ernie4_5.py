from hub_form import published

from families import Row

TIES = (True, False)
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}
UNSAID = dict.fromkeys(("rope_parameters", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"))
HUB_KEYS = {**UNSAID, "rope_theta": 500000.0, "rope_scaling": None, "num_key_value_heads": 2}
ROWS = (
    Row("ernie4_5", "Ernie4_5", ties=TIES),
    Row("ernie4_5 with biases", "Ernie4_5", {"use_bias": True, "hidden_act": "gelu", **LINEAR}, ties=TIES),
    Row("ernie4_5 as on the Hub", "Ernie4_5", {"head_dim": 128}, None, ("GQA",), (True,), convert=published({}, HUB_KEYS)),
    Row("ernie4_5 of few words", "Ernie4_5", {"head_dim": 128}, None, ("GQA",), (True,), convert=published({}, UNSAID)),
    # its output product is a square: four heads of 12 for 48
    Row("helium", "Helium", {"head_dim": 12}),
    Row("helium with biases", "Helium", {"head_dim": 12, "attention_bias": True, "mlp_bias": True, **LINEAR}),
    Row("helium of few words", "Helium", {"hidden_size": 512, "head_dim": 128}, heads=("GQA",), ties=(False,),
        convert=published({}, {**UNSAID, "num_key_value_heads": 2})),
)  # fmt: skip
