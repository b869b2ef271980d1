from hub_form import published

from families import SIZES as ALL
from families import Row

SIZES = {**ALL, "pad_token_id": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5000.0,
        "partial_rotary_factor": 0.25}  # fmt: skip
UNSAID = {"rope_parameters": None, "head_dim": None, "num_key_value_heads": None, "rms_norm_eps": None, "attention_bias": None,
          "tie_word_embeddings": None}  # fmt: skip
HUB = published({}, {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 0.5})
FEW = {"head_dim": 128}
ROWS = (
    Row("glm", "Glm", sizes=SIZES),
    Row("glm without biases, yarn", "Glm", {"attention_bias": False, "rope_parameters": YARN}, SIZES),
    Row("glm of few words", "Glm", FEW, SIZES, heads=("GQA",), ties=(False,), convert=published({}, UNSAID)),
    Row("glm4", "Glm4", sizes=SIZES),
    Row("glm4 without biases, yarn", "Glm4", {"attention_bias": False, "rope_parameters": YARN}, SIZES),
    Row("glm4 as on the Hub", "Glm4", {"attention_bias": False}, SIZES, heads=("GQA",), ties=(False,), convert=HUB),
    Row("glm4 of few words", "Glm4", FEW, SIZES, heads=("GQA",), ties=(False,), convert=published({}, UNSAID)),
)
