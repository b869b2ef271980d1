"""docs/models.md, made of the doors and of the rows that prove them: `python tests/models_table.py` writes it."""

from collections.abc import Iterator
from pathlib import Path

import transformers
from families import Row, rows

from jaxpaged.hf_config import HFConfig
from jaxpaged.models import doors
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLASpec, MoESpec

FILE = Path(__file__).parent.parent / "docs" / "models.md"
INTRODUCTION = """# Models

A checkpoint's `model_type` (in its config.json) must be in this table, which is made of the doors in `jaxpaged/models/` and
of the tiny models in `tests/families/` that prove them (`python tests/models_table.py`). What a config says that a door does
not know is refused by name, as is a tensor that nobody uses.

**Tested**: every row of `tests/families/` is a random model of transformers' own class. (What transformers does not have,
InternLM 2, MiniCPM, Kimi K2, is made of a class that computes the same, with the names and keys that its files have, written
down from memory.) Its logits of whole sequences (most of 320 tokens) equal transformers' to 1e-5 in float32, its tokens and
logprobs through the engine (chunked, paged, with a shared prefix, 32 greedy tokens) too; mutated configs and checkpoints are
refused. "Real" models are published weights, greedy-equal to transformers'. Nothing in this table has run on a GPU yet.

| door | model types | what its layers may have | tested |
|---|---|---|---|
"""
REAL = {"llama": "real: SmolLM2-135M-Instruct", "gemma": "real: Gemma-3-270M-it"}


def features(config: DecoderConfig) -> Iterator[str]:
    """What is remarkable of a decoder."""
    if config.norm.kind == "layer":
        yield "LayerNorm"
    yield {"pre": "", "post": "norms after", "both": "norms before and after"}.get(config.block, "parallel residual")
    yield "learned positions" if config.learned_positions else ""
    for spec in config.layers:
        yield from _attention(spec.attention)
        yield "" if spec.rope or config.learned_positions or spec.attention.alibi else "layers without positions"
        yield "interleaved rotation" if spec.rope and spec.rope.interleaved else ""
        yield "sliding window" if spec.window else ""
        yield "chunked attention" if spec.chunk else ""
        yield "MoE" if isinstance(spec.mlp, MoESpec) else "" if spec.mlp.gated else "plain MLP"
        yield "shared experts" if isinstance(spec.mlp, MoESpec) and spec.mlp.shared else ""
    yield "logit soft cap" if config.logit_soft_cap else ""


def _attention(spec: AttentionSpec | MLASpec) -> Iterator[str]:
    if isinstance(spec, MLASpec):
        yield "MLA"
        return
    yield "q/k norms" if spec.qk_norm else ""
    yield "ALiBi" if spec.alibi else ""
    yield "attention sinks" if spec.sinks else ""
    yield "attention soft cap" if spec.soft_cap else ""


def decoder_of(row: Row) -> DecoderConfig | None:
    """None for a family that transformers does not have."""
    if row.convert is not None:
        return None
    config = getattr(transformers, f"{row.config}Config")(**row.settings())
    hf = HFConfig(config.to_diff_dict() | {"model_type": row.model_type()})
    return doors()[row.model_type()].decoder_config(hf)


def table() -> str:
    lines, types = [], {}
    for model_type, module in sorted(doors().items()):
        types.setdefault(module.__name__.rpartition(".")[2], []).append(model_type)
    for name, door_rows in sorted(rows().items()):
        found = [f for row in door_rows if (config := decoder_of(row)) for f in features(config) if f]
        real = f", {REAL[name]}" if name in REAL else ""
        listed = ", ".join(f"`{t}`" for t in types[name])
        lines.append(f"| {name} | {listed} | {', '.join(dict.fromkeys(found)) or '-'} | {len(door_rows)} rows{real} |")
    return INTRODUCTION + "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(table())
