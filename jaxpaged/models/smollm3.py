"""SmolLM3 (Bakouch et al. 2025): Llama, of whose layers each fourth does not rotate."""

from jaxpaged.models import standard
from jaxpaged.models.spec import DecoderConfig, LayerSpec
from jaxpaged.models.standard import HF, Name

MODEL_TYPES = ("smollm3",)
IGNORED = standard.IGNORED
THETA, KV_HEADS = 2_000_000.0, 4  # of a config that does not say, as transformers has it


def decoder_config(hf: HF) -> DecoderConfig:
    standard.pass_over(hf, "max_window_layers", "pretraining_tp")  # transformers reads neither
    bias = bool(hf.get("attention_bias", False))
    groups = hf.get("num_key_value_heads", KV_HEADS) or hf["num_attention_heads"]
    attention = standard.attention(hf, num_kv_heads=groups, bias=bias, out_bias=bias)
    mlp = standard.mlp(hf, bias=bool(hf.get("mlp_bias", False)))
    rope, rotates = standard.rope(hf, theta=THETA), _rotates(hf)
    layers = [LayerSpec(attention, mlp, rope if r else None, window) for r, window in zip(rotates, _windows(hf, rotates))]
    return standard.decoder(hf, tuple(layers), tie=bool(hf.get("tie_word_embeddings", True)))


def _rotates(hf: HF) -> list[bool]:
    """One truth a layer: `no_rope_layers` has a 1 for a layer that does rotate."""
    said, every, num = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4), hf["num_hidden_layers"]
    if said is None:
        return [(i + 1) % every != 0 for i in range(num)]
    if len(said) < num:
        raise ValueError(f"no_rope_layers has {len(said)} entries for {num} layers; it must have one for each.")
    return [bool(rotates) for rotates in said[:num]]


def _windows(hf: HF, rotates: list[bool]) -> tuple[int | None, ...]:
    """From `layer_types`; without that key the layers that do not rotate slide, if any does."""
    window, some = hf.get("sliding_window"), hf.get("use_sliding_window", False)
    if hf.get("layer_types") is not None:
        return standard.windows(hf, window)
    return tuple(window if some and not r else None for r in rotates)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    return standard.NAMES + standard.PRE_NORM
