import json
from pathlib import Path

import numpy as np
from hub_form import published
from safetensors.numpy import load_file, save_file

from families import SIZES as ALL
from families import Row

SIZES = {key: ALL[key] for key in ALL if key != "head_dim"}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
OF_ALL = {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": DYNAMIC, "auto_map": {"AutoConfig": "configuration.C"}}
SECOND = {"model_type": "internlm2", **dict.fromkeys(("attention_bias", "mlp_bias", "head_dim")), "pretraining_tp": 1, **OF_ALL}
OWN = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}
OWN_PARTS = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip
LAYER = {f"model.layers.{i}.{theirs}": f"model.layers.{i}.{own}" for i in range(2) for theirs, own in OWN_PARTS.items()}


def second(bias: bool | None):
    """A Llama as an InternLM 2 has it: with two queries to a key, the head's rows are q q k v q q k v."""
    rename = published({**OWN, **LAYER}, {**SECOND, "bias": bias})

    def convert(folder: Path) -> None:
        rename(folder)
        file, groups = folder / "model.safetensors", json.loads((folder / "config.json").read_text())["num_key_value_heads"]
        tensors = load_file(file)
        for name in [name for name in tensors if ".self_attn.q_proj." in name]:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            rows = [np.split(part, groups) for part in parts]
            fused = np.concatenate([rows[part][group] for group in range(groups) for part in range(3)])
            tensors[name.replace("self_attn.q_proj", "attention.wqkv")] = fused
        save_file(tensors, file)

    return convert


THIRD = {"attention_bias": None, "mlp_bias": None, **OF_ALL, "rope_theta": 5e7}
UNSAID = dict.fromkeys(("rope_parameters", "attention_bias", "mlp_bias", "head_dim", "num_key_value_heads", "rms_norm_eps"))
QWENS = dict.fromkeys(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"))
THETA, FAR = {"rope_parameters": {"rope_theta": 1e6}}, {"rope_parameters": {"rope_theta": 5e7}}
BIAS, BIASES = {"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}
STRETCHED = {"rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e6}}
ROWS = (
    Row("internlm2", "Llama", THETA, SIZES, saved_as="internlm2", convert=second(False)),
    Row("internlm2 with biases", "Llama", {**BIAS, **THETA}, SIZES, saved_as="internlm2", convert=second(True)),
    Row("internlm2 of few words", "Llama", {**BIAS, **THETA}, SIZES, ("GQA",), (False,), saved_as="internlm2",
        convert=second(None)),
    Row("internlm3", "InternLM3"),
    Row("internlm3 with biases", "InternLM3", {**BIASES, **STRETCHED}),
    Row("internlm3 as on the Hub", "InternLM3", {**BIASES, **FAR}, None, ("GQA",), (False,),
        convert=published({}, {**THIRD, "qkv_bias": True, "bias": True})),
    Row("internlm3 with biases of q, k, v alone", "Qwen2", FAR, None, ("GQA",), (False,), saved_as="internlm3",
        convert=published({}, {**THIRD, **QWENS, "model_type": "internlm3", "qkv_bias": True, "bias": False})),
    Row("internlm3 of few words", "InternLM3", {"head_dim": 128}, None, ("GQA",), (False,), convert=published({}, UNSAID)),
)  # fmt: skip
