from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 4}
ALL = {"rotary_dim": 12, "n_inner": 80, "activation_function": "relu"}
CODEGEN = {**SIZES, "n_embd": 64, "n_head": 8}
WIDE = {"n_inner": 80, "activation_function": "relu", "rotary_dim": 8}
HUB = published({}, {"n_ctx": 512, "summary_type": "cls_index", "scale_attn_weights": True, "tie_word_embeddings": None},
                buffers=("transformer.h.0.attn.causal_mask", "transformer.h.1.attn.causal_mask"))  # fmt: skip
ROWS = (
    Row("gptj", "GPTJ", sizes=SIZES, heads=()),
    Row("gptj, all of a head rotated", "GPTJ", ALL, SIZES, heads=()),
    Row("codegen", "CodeGen", {}, CODEGEN, (), (False, True)),
    Row("codegen, wide", "CodeGen", WIDE, CODEGEN, ()),
    Row("codegen as on the Hub", "CodeGen", {}, CODEGEN, (), (False,), convert=HUB),
)
