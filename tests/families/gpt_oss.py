from hub_form import published

from families import WINDOW, Row

EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}
YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 64}  # fmt: skip
WORDS = {"rope_parameters": None, "rope_theta": 150000, "experts_per_token": 2, "initial_context_length": 64,
         "layer_types": None, "swiglu_alpha": None, "router_aux_loss_coef": 0.9}  # fmt: skip
hub = published({}, {**WORDS, "rope_scaling": YARN})
few_words = published({}, {**WORDS, "head_dim": None, "attention_bias": None, "rms_norm_eps": None})
ROWS = (
    Row("gpt_oss", "GptOss", EXPERTS),
    Row("gpt_oss as on the Hub", "GptOss", {**EXPERTS, "rope_parameters": {**YARN, "rope_theta": 150000.0}}, convert=hub),
    Row("gpt_oss, few words", "GptOss", {**EXPERTS, "head_dim": 64}, convert=few_words),
    Row("gpt_oss, no biases, no yarn, all slide", "GptOss", {
        **EXPERTS, "attention_bias": False, "layer_types": ["sliding_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
)  # fmt: skip
