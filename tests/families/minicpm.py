from hub_form import published

from families import SIZES as ALL
from families import Row

SIZES, LAYERS = {key: ALL[key] for key in ALL if key != "head_dim"}, 3
DEPTH, BASE = 1.4, 16  # scale_depth, dim_model_base
# the same numbers as Granite has them
FACTORS = {"num_hidden_layers": LAYERS, "embedding_multiplier": 12.0, "residual_multiplier": DEPTH / LAYERS**0.5,
           "attention_multiplier": 12**-0.5, "logits_scaling": 48 / BASE}  # fmt: skip
OWN = {"model_type": "minicpm", **dict.fromkeys(key for key in FACTORS if key != "num_hidden_layers"), "mlp_bias": None,
       "scale_emb": 12, "scale_depth": DEPTH, "dim_model_base": BASE, "rope_parameters": None, "head_dim": None,
       "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}}  # fmt: skip
# as in families/phi3.py: numbers that transformers does not round
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0, 1.0, 1.25, 1.5, 1.75, 2.0],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]}  # fmt: skip
FOURTH = {**FACTORS, "rope_parameters": {**LONGROPE, "rope_theta": 46656.0}}
PLAIN = {"embedding_multiplier": 1.0, "residual_multiplier": 2**-0.5, "attention_multiplier": 12**-0.5, "logits_scaling": 48.0}
UNSAID = dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base", "tie_word_embeddings"))


def row(name: str, changes: dict, own: dict, **more) -> Row:
    return Row(name, "Granite", changes, SIZES, saved_as="minicpm", convert=published({}, {**OWN, **own}), **more)


ROWS = (
    row("minicpm", FACTORS, {}, ties=(True, False)),
    row("minicpm with biases", {**FACTORS, "attention_bias": True}, {}, ties=(True, False)),
    row("minicpm4", FOURTH, {"rope_scaling": LONGROPE, "rope_theta": 46656.0, "mup_denominator": 32}, ties=(True, False)),
    row("minicpm of few words", PLAIN, UNSAID, heads=("GQA",), ties=(True,)),
)
