from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}
SCALES = {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "scale_attn_weights": False}
HUB = published({"transformer.": ""}, {"n_ctx": 512, "summary_type": "cls_index"}, ("h.0.attn.bias", "h.1.attn.bias"))
ROWS = (
    Row("gpt2", "GPT2", sizes=SIZES, heads=(), ties=(True, False)),
    Row("gpt2 with all choices", "GPT2", {"n_inner": 80, "activation_function": "relu", **SCALES}, SIZES, (), (True, False)),
    Row("gpt2 as on the Hub", "GPT2", sizes=SIZES, heads=(), ties=(True,), convert=HUB),
)
