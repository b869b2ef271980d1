from hub_form import published

from families import SIZES as ALL
from families import WINDOW, Row

SIZES = {**{key: ALL[key] for key in ALL if key != "head_dim"}, "hidden_size": 64, "pad_token_id": None}  # heads of 16
# transformers rounds frequencies to float32 at each step: with these numbers none of its roundings loses anything
SHORT, LONG = [1.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5], [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
THETA = 65536.0  # 4 ** 8
SCALING = {"short_factor": SHORT, "long_factor": LONG}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": THETA, **SCALING}}
PARTIAL = {"rope_type": "longrope", "rope_theta": 46656.0, "partial_rotary_factor": 0.75,  # 6 ** 6
           "short_factor": SHORT[:6], "long_factor": LONG[:6]}  # fmt: skip
# as the files on the Hub: keys of old, and those of code that lies beside
HUB_KEYS = {
    "rope_parameters": None, "rope_scaling": {"type": "su", **SCALING}, "rope_theta": THETA, "num_key_value_heads": None,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "tie_word_embeddings": None,
}  # fmt: skip
MINI_SCALING = {**PARTIAL, "partial_rotary_factor": None, "rope_theta": None}
MINI_KEYS = {"rope_parameters": None, "rope_scaling": MINI_SCALING, "partial_rotary_factor": 0.75, "rope_theta": 46656.0,
             "full_attn_mod": 1, "interpolate_factor": 1, "sliding_window": 262144, "mlp_bias": False}  # fmt: skip
ROWS = (
    Row("phi3", "Phi3", sizes=SIZES),
    Row("phi3, sliding", "Phi3", {"sliding_window": WINDOW, "resid_pdrop": 0.1, "embd_pdrop": 0.1}, SIZES),
    Row("phi3, longer than in training, sliding", "Phi3",
        {"original_max_position_embeddings": 64, "sliding_window": WINDOW, **LONGROPE}, SIZES),
    # 352 at most: the engine's row asks for no more
    Row("phi3, not longer than in training", "Phi3", {"original_max_position_embeddings": 352, **LONGROPE}, SIZES),
    Row("phi3 as on the Hub", "Phi3", {"original_max_position_embeddings": 64, **LONGROPE}, SIZES, ("MHA",), (False,),
        convert=published({}, HUB_KEYS)),
    Row("phi-4-mini", "Phi3", {"original_max_position_embeddings": 64, "rope_parameters": PARTIAL}, SIZES),
    Row("phi-4-mini as on the Hub", "Phi3", {"original_max_position_embeddings": 64, "rope_parameters": PARTIAL}, SIZES,
        ("GQA",), (True,), convert=published({}, MINI_KEYS)),
)  # fmt: skip
