from hub_form import published

from families import SIZES, Row

OWN = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}
SEQUENTIAL = {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
OLD_KEYS = {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 5000, "attention_bias": None}
BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")
HUB = published({}, OLD_KEYS, tuple(f"gpt_neox.layers.1.attention.{name}" for name in BUFFERS))
ROWS = (
    Row("gpt_neox", "GPTNeoX", {"rotary_pct": 0.5}, OWN, heads=()),
    Row("gpt_neox, sequential", "GPTNeoX", {"rope_parameters": LINEAR, **SEQUENTIAL}, OWN, heads=()),
    Row("gpt_neox as on the Hub", "GPTNeoX", {"rotary_pct": 0.5, "rotary_emb_base": 5000}, OWN, (), (False,), convert=HUB),
)
