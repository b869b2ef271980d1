"""A Hugging Face config that records which keys were read, so that a key we do not know is refused, not ignored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Keys that never change what an inference step computes. Anything else must be read by the family's door.
HARMLESS = frozenset({
    "model_type",  # chose the door
    "architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash",
    "_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "tokenizer_class", "is_llama_config",
    # the tokenizer's and the sampler's business
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "temperature", "top_k", "top_p", "do_sample", "max_length", "max_new_tokens",
    # training only
    "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "dropout", "gradient_checkpointing", "keys_to_ignore_at_inference",
    # how transformers returns or caches things
    "use_cache", "cache_implementation", "return_dict", "use_return_dict", "output_attentions", "output_hidden_states",
    "torchscript", "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task",
    "chunk_size_feed_forward",
    # marks that tools leave behind
    "unsloth_version", "unsloth_fixed", "transformers.js_config", "mlx_version",
})  # fmt: skip
# Keys that say again what another key says, and so are harmless once that one was read.
REPEATED = {"_sliding_window_pattern": "layer_types", "sliding_window_pattern": "layer_types"}
# Kinds of what shapes or structure are made of. (Numbers of experts are not here: some families write 0 for none.)
KINDS = {
    "model_type": str,
    **dict.fromkeys(("text_config", "attn_config", "rope_scaling", "rope_parameters", "quantization_config"), Mapping),
    **dict.fromkeys((
        "vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_attention_heads",
        "n_head", "n_heads", "num_key_value_heads", "head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
        "kv_lora_rank", "intermediate_size", "moe_intermediate_size", "max_position_embeddings", "n_positions",
    ), int),
}  # fmt: skip
_NAMES = {str: "a text", Mapping: "an object", int: "a positive integer"}
_NOTHING = (None, "", (), [], {})


class HFConfig(Mapping[str, Any]):
    """Reads like a dict and remembers which keys were read.

    config: the keys. overrides: replace them (a value of None switches a key off). source: the file, for messages.
    """

    def __init__(self, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, source: Any = "the config"):
        self.values_by_key = {**config, **(overrides or {})}
        self.source, self.read = source, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        if self.values_by_key.get(key) is None:
            raise ValueError(f"{self.source} lacks the key {key!r}; give it with hf_overrides={{{key!r}: ...}}.")
        return self._checked(key, self.values_by_key[key])

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`; a key that is null counts as null, not as absent (families differ in what null means)."""
        self.read.add(key)
        value = self.values_by_key.get(key, default)
        return self._checked(key, value) if value else value

    def _checked(self, key: str, value: Any) -> Any:
        """ValueError if it is not of the key's kind; some files write sizes as 4096.0."""
        kind = KINDS.get(key)
        if kind is int and isinstance(value, float) and value % 1 == 0:
            value = int(value)
        if kind and (not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 1)):
            raise ValueError(f"{self.source}: {key} must be {_NAMES[kind]}, got {_short(value)}.")
        return value

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return key in self.values_by_key

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)

    def unknown(self, harmless: Iterable[str] = ()) -> dict[str, Any]:
        """Keys that were not read, are not harmless, and say something (not null, false or empty)."""
        known = self.read | HARMLESS | set(harmless)
        known |= {key for key, other in REPEATED.items() if other in self.read and self.values_by_key.get(other)}
        says = lambda value: value is not False and value not in _NOTHING
        return {k: v for k, v in self.values_by_key.items() if k not in known and says(v)}

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """ValueError names every key that nobody read: it may change the model in a way we would miss."""
        unknown = self.unknown(harmless)
        if not unknown:
            return
        listed = ", ".join(f"{key}={_short(value)}" for key, value in unknown.items())
        off = ", ".join(f"{key!r}: None" for key in unknown)
        raise ValueError(
            f"{self.source} has keys that the family {self.values_by_key.get('model_type')!r} does not know here: "
            f"{listed}. They may change what the model computes. If they do not, switch them off with "
            f"hf_overrides={{{off}}}."
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
