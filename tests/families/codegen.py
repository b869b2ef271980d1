from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 512, "rotary_dim": 4}
HUB = published({}, {"n_ctx": 512, "summary_type": "cls_index", "scale_attn_weights": True, "tie_word_embeddings": None},
                buffers=("transformer.h.0.attn.causal_mask", "transformer.h.1.attn.causal_mask"))  # fmt: skip
ROWS = (
    Row("codegen", "CodeGen", {}, SIZES, (), (False, True)),
    Row("codegen, wide", "CodeGen", {"n_inner": 80, "activation_function": "relu", "rotary_dim": 8}, SIZES, ()),
    Row("codegen as on the Hub", "CodeGen", {}, SIZES, (), (False,), convert=HUB),
)
