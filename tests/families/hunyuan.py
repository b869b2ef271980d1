from hub_form import published

from families import Row

ALPHA = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
SCALING = {
    "alpha": 1000.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "type": "dynamic",
}
HUB_KEYS = {"rope_parameters": None, "rope_scaling": SCALING, "rope_theta": 10000.0, "attention_head_dim": 16, "use_cla": False,
            "cla_share_factor": 2, "use_qk_norm": True, "org_vocab_size": 101, "norm_type": "rms"}  # fmt: skip
UNSAID = dict.fromkeys(("rope_parameters", "rms_norm_eps", "tie_word_embeddings"))
ROWS = (
    Row("hunyuan", "HunYuanDenseV1", {"rope_parameters": ALPHA}),
    Row("hunyuan with biases", "HunYuanDenseV1", {"attention_bias": True, "hidden_act": "gelu"}),
    Row("hunyuan as on the Hub", "HunYuanDenseV1", {"rope_parameters": ALPHA}, None, ("GQA",), (True,),
        convert=published({}, HUB_KEYS)),
    Row("hunyuan of few words", "HunYuanDenseV1", {}, None, ("GQA",), (False,), convert=published({}, UNSAID)),
)  # fmt: skip
