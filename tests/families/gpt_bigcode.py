from hub_form import published

from families import Row

SIZES = {"vocab_size": 101, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
OTHERS = {"multi_query": False, "n_inner": 80, "activation_function": "relu", "scale_attn_weights": False,
          "attention_softmax_in_fp32": False, "layer_norm_epsilon": 1e-4}  # fmt: skip
UNSAID = dict.fromkeys(
    ("multi_query", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings")
)
HUB = published({}, {**UNSAID, "summary_type": "cls_index", "inference_runner": 0, "num_key_value_heads": None,
                     "validate_runner_input": True, "pad_key_length": True})  # fmt: skip
ROWS = (
    Row("gpt_bigcode", "GPTBigCode", {}, SIZES, (), (True, False)),
    Row("gpt_bigcode, a key for each head", "GPTBigCode", OTHERS, SIZES, (), (True, False)),
    Row("gpt_bigcode as on the Hub", "GPTBigCode", {}, SIZES, (), (True,), convert=HUB),
)
