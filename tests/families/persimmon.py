from hub_form import published

from families import SIZES as ALL
from families import Row

SIZES = {key: ALL[key] for key in ALL if key not in ("head_dim", "num_key_value_heads")} | {"hidden_size": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 1.0}
UNSAID = dict.fromkeys(("rope_parameters", "hidden_act", "qk_layernorm", "layer_norm_eps"))
ROWS = (
    Row("persimmon", "Persimmon", {"rope_parameters": {"rope_theta": 25000.0}}, SIZES, ()),
    Row("persimmon, all rotated, no norms of q and k", "Persimmon",
        {"qk_layernorm": False, "hidden_act": "gelu", "rope_parameters": LINEAR}, SIZES, ()),
    Row("persimmon of few words", "Persimmon", {}, SIZES, (), (False,), convert=published({}, UNSAID)),
)  # fmt: skip
