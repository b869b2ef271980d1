from hub_form import published

from families import Row

FACTORS = {"embedding_multiplier": 10.0, "residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 0.125}
OTHERS = {"use_post_norm": False, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}
UNSAID = dict.fromkeys((*FACTORS, "use_post_norm", "rope_parameters", "rms_norm_eps"))
HUB = published({}, {"rope_parameters": None, "rope_theta": 1e8, "auto_map": {"AutoConfig": "configuration.C"}})
ROWS = (
    Row("hyperclovax", "HyperCLOVAX", FACTORS),
    Row("hyperclovax with biases, no norms after", "HyperCLOVAX", {**FACTORS, **OTHERS}),
    Row("hyperclovax as on the Hub", "HyperCLOVAX", {**FACTORS, "rope_parameters": {"rope_theta": 1e8}}, None, ("GQA",),
        (False,), convert=HUB),
    Row("hyperclovax of few words", "HyperCLOVAX", {}, None, ("GQA",), (False,), convert=published({}, UNSAID)),
)  # fmt: skip
