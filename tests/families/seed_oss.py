from hub_form import published

from families import Row

OTHERS = {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "hidden_act": "gelu", "residual_dropout": 0.0,
          "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e7}}  # fmt: skip
HUB = published({}, {"rope_parameters": None, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0,
                     "head_dim": None, "attention_bias": None, "tie_word_embeddings": None})  # fmt: skip
ROWS = (
    Row("seed_oss", "SeedOss"),
    Row("seed_oss with other biases", "SeedOss", OTHERS),
    Row("seed_oss as on the Hub", "SeedOss", {"head_dim": 128, "rope_parameters": {"rope_theta": 1e7}}, heads=("GQA",),
        ties=(False,), convert=HUB),
)  # fmt: skip
