"""Which tiny models of transformers prove a door: a file here for each door of `jaxpaged/models/`, with its `ROWS`.

Every row is compared with transformers in float32: whole sequences past position 256, and through the engine (chunks, pages,
a shared prefix, 32 greedy tokens), and by mutation (an unknown key, a tensor left over, one that is missing).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

LENGTH, WINDOW = 320, 20  # past position 256, where bfloat16 positions would be told apart no more
SIZES = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


@dataclass(frozen=True)
class Row:
    """A tiny random model.

    config: transformers' config class without "Config". changes: what its config gets beyond `sizes`. sizes: None for SIZES
    (names of its own, as GPT-2's n_embd, need sizes of their own). heads: the kinds of HEADS that the family has; each is set
    by the key `num_key_value_heads`. ties: values of tie_word_embeddings that it has. (The first of each is in the fast suite,
    the other combinations are slow tests.) length: of the sequences, tokens. saved_as, convert: for a family that
    transformers does not have: its model_type, and what makes a folder that transformers has saved (of `config`'s class) one
    of this family's. attention: which of transformers' implementations is the reference.
    """

    name: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] | None = None
    heads: tuple[str, ...] = ("GQA", "MHA", "MQA")
    ties: tuple[bool, ...] = (False, True)
    length: int = LENGTH
    saved_as: str | None = None
    convert: Callable[[Path], None] | None = None
    attention: str = "eager"

    def settings(self, heads: str | None = None, tie: bool | None = None) -> dict[str, Any]:
        """Keyword arguments of the config class."""
        heads = heads or (self.heads[0] if self.heads else None)
        sizes = dict(SIZES if self.sizes is None else self.sizes)
        if heads is not None:
            sizes["num_key_value_heads"] = HEADS[heads]
        tie = self.ties[0] if tie is None else tie
        return {**sizes, "tie_word_embeddings": tie, **self.changes}

    def model_type(self) -> str:
        return self.saved_as or getattr(transformers, f"{self.config}Config").model_type


def rows() -> dict[str, tuple[Row, ...]]:
    """Door -> its rows."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").ROWS for name in names}
