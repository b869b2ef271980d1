from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}
THREE = {"n_heads": 3, "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.2}, "layer_norm_epsilon": 1e-4}
SAID = {
    "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
}  # fmt: skip
HUB = published({}, {"attn_config": SAID, "expansion_ratio": 4, "no_bias": True, "init_device": "cpu", "emb_pdrop": 0,
                     "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "tie_word_embeddings": None})  # fmt: skip
ROWS = (
    Row("mpt", "Mpt", {}, SIZES, (), (True, False)),
    Row("mpt, three heads, clipped", "Mpt", THREE, SIZES, (), (True, False)),
    Row("mpt as on the Hub", "Mpt", {}, SIZES, (), (True,), convert=HUB),
)
