from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TIES = (True, False)
NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
ONE_NORM = {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80, "bias": True, "rope_parameters": LINEAR}
RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
RW_PARALLEL = {**RW, "parallel_attn": True, "multi_query": True}
OLD_KEYS = {"rope_parameters": None, "max_position_embeddings": None, "ffn_hidden_size": None, "num_kv_heads": None,
            "activation": None, "apply_residual_connection_post_layernorm": False}  # fmt: skip
HUB = published({}, OLD_KEYS, ("transformer.h.1.self_attention.rotary_emb.inv_freq",))
ROWS = (
    Row("falcon-7b", "Falcon", {"bias": True}, SIZES, (), TIES),
    Row("falcon-7b as on the Hub", "Falcon", {}, SIZES, (), (True,), convert=HUB),
    Row("falcon-40b", "Falcon", NEW, SIZES, (), TIES),
    Row("falcon-11b", "Falcon", {**NEW, **ONE_NORM}, SIZES, (), TIES),
    # transformers rounds slope * position to bfloat16: whole numbers up to 256 stay what they are; its eager attention (5.24)
    # adds them twice
    Row("falcon-rw", "Falcon", RW, SIZES, (), TIES, length=224, attention="sdpa"),
    Row("falcon-rw, parallel", "Falcon", RW_PARALLEL, SIZES, (), TIES, length=224, attention="sdpa"),
)
