from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "hidden_size": 48, "n_layer": 2, "n_head": 4}
OLD_KEYS = {"hidden_size": None, "n_embed": 48, "n_head": None, "num_attention_heads": 6, "n_layer": None,
            "num_hidden_layers": 3, "seq_length": 2048, "offset_alibi": 100, "masked_softmax_fusion": True}  # fmt: skip
ROWS = (
    Row("bloom", "Bloom", sizes=SIZES, heads=(), ties=(True, False)),
    Row("bloom as on the Hub, heads no power of two", "Bloom", {"n_head": 6, "n_layer": 3}, SIZES, (), (True,),
        convert=published({"transformer.": ""}, OLD_KEYS)),
)  # fmt: skip
