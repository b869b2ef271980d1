"""LoRA adapters: from PEFT's files, or arrays in memory, to tables for the products of a model.

Source: Hu et al. 2021; PEFT's adapter_config.json and adapter_model.safetensors. W' = W + (alpha / r) B A, or with `use_rslora`
(alpha / sqrt(r)) B A (Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpaged.adapter import Adapter, LoRARequest, Table
from jaxpaged.checkpoint import read_json
from jaxpaged.models.adapters import PARTS, adaptable
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.spec import AttentionSpec, DecoderConfig, MLPSpec, MoESpec
from jaxpaged.models.standard import Name
from jaxpaged.request import RequestError
from jaxpaged.weights import regex_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.(default|weight))*")
SUPPORTED: dict[str, tuple[Any, ...]] = {  # what a config may say, where it may not say everything
    "peft_type": ("LORA", None), "bias": ("none", None), "use_dora": (False, None), "modules_to_save": (None, []),
    "lora_bias": (False, None), "trainable_token_indices": (None, []), "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
}  # fmt: skip
PICKLED = (" (adapter_model.bin is a pickle, which could run any code, and is never opened: load it with PEFT where you trust "
           "it, and save it with save_pretrained(..., safe_serialization=True))")  # fmt: skip
SHOWN = 5


class Place(NamedTuple):
    """Where a module of the checkpoint is: part number `part` of the product `path`, of the model's layers."""

    path: str
    part: int
    parts: int
    rule: Name


@dataclass(frozen=True)
class Target:
    """The model that adapters are made for: its rules, the shapes [out, in] of its products, the largest rank."""

    config: DecoderConfig
    rules: Sequence[Name]
    shapes: Mapping[str, tuple[int, int]]
    rank: int
    dtype: np.dtype

    def place(self, module: str) -> Place | None:
        """None for a module that this model cannot adapt."""
        for rule in self.rules:
            match = regex_of(rule.pattern).fullmatch(module + ".weight")
            path = match and rule.path.format(**match.groupdict()).removesuffix(".weight")
            if path and path in self.shapes:
                return Place(path, rule.part, rule.parts, rule)
        return None


def target(config: DecoderConfig, rules: Sequence[Name], rank: int, dtype: Any) -> Target:
    """Of a decoder and its family's rules."""
    model = nnx.eval_shape(lambda: Decoder(config))
    return Target(config, rules, {path: product.shape for path, product, _ in adaptable(model)}, rank, jnp.dtype(dtype))


# -- reading ----------------------------------------------------------------------------------------------------------------


def read(request: LoRARequest, key: str, target: Target) -> Adapter:
    """The adapter of a request. RequestError names what is wrong with it, with the numbers."""
    if request.tensors is not None:
        config, tensors, source = dict(request.config or {}), _flat(request.tensors), "<in memory>"
    else:
        config, tensors, source = *_files(request), request.lora_path
    tables = _Reader(request.lora_name, config, target).tables(tensors)
    return Adapter(request.lora_name, key, source, int(config.get("r") or 0), tables)


def _files(request: LoRARequest) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder, name = Path(request.lora_path), request.lora_name
    if not (folder / CONFIG).is_file():
        raise _refused(name, f"lora_path {request.lora_path!r} is no folder with {CONFIG}; PEFT's save_pretrained makes one")
    if not (folder / TENSORS).is_file():
        raise _refused(name, f"{folder} has no {TENSORS}{PICKLED if (folder / 'adapter_model.bin').exists() else ''}")
    try:
        return read_json(folder / CONFIG), load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _refused(name, f"{folder} cannot be read: {error}") from None


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, Mapping):
        return {prefix: np.asarray(tree)}
    return {key: x for name, sub in tree.items() for key, x in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()}


def _refused(name: str, why: str) -> RequestError:
    return RequestError(f"LoRA adapter {name!r}: {why}.", "lora_request")


class _Reader:
    """Turns the tensors of one adapter into tables."""

    def __init__(self, name: str, config: Mapping[str, Any], target: Target):
        self.name, self.config, self.target = name, config, target
        for key, allowed in SUPPORTED.items():
            if config.get(key) not in allowed:
                raise self.refused(f"{key}={config[key]!r} in {CONFIG} is not supported; {' or '.join(map(repr, allowed))} is")

    def refused(self, why: str) -> RequestError:
        return _refused(self.name, why)

    def tables(self, tensors: Mapping[str, np.ndarray]) -> dict[str, Table]:
        halves: dict[str, dict[str, np.ndarray]] = {}
        for tensor, array in tensors.items():
            match = TENSOR.fullmatch(tensor.removeprefix(PREFIX))
            if match is None:
                raise self.refused(f"the tensor {tensor!r} is not supported; lora_A and lora_B of linear layers are")
            halves.setdefault(match["module"], {})[match["half"]] = array
        if not halves:
            raise self.refused("it has no tensors")
        self._check_modules(halves)
        tables: dict[str, Table] = {}
        for module, pair in sorted(halves.items()):
            place = self.target.place(module)
            assert place is not None
            if place.path not in tables:
                tables[place.path] = self._empty(place.path)
            self._fill(tables[place.path], module, place, pair)
        return tables

    def _check_modules(self, halves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        unknown = [module for module in halves if self.target.place(module) is None]
        if unknown:
            known = sorted({path.rpartition(".")[2] for path in self.target.shapes})
            raise self.refused(f"{len(unknown)} modules cannot be adapted: {', '.join(unknown[:SHOWN])}; linear layers of "
                               f"attention and MLPs can (here: {', '.join(known)}), embeddings, head, routers and experts "
                               "cannot")  # fmt: skip
        alone = [f"{module}.lora_{half}" for module, pair in halves.items() for half in "AB" if half not in pair]
        if alone:
            raise self.refused(f"{len(alone)} tensors are missing: {', '.join(alone[:SHOWN])}")

    def _empty(self, path: str) -> Table:
        (n_out, n_in), R = self.target.shapes[path], PARTS[path.rpartition(".")[2]] * self.target.rank
        return Table(np.zeros((R, n_in), self.target.dtype), np.zeros((n_out, R), self.target.dtype))

    def _fill(self, table: Table, module: str, place: Place, pair: Mapping[str, np.ndarray]) -> None:
        """Part p of a product has the rows from p R of A and, of its own rows of B, the columns from p R."""
        a, b = (pair[half].astype(np.float32) for half in "AB")
        rows, most = self._rows(place), self.target.rank
        rank = self._check_shapes(module, a.shape, b.shape, (rows.stop - rows.start, table.a.shape[1]))
        if rank > most:
            raise self.refused(f"{module} has rank {rank}, max_lora_rank is {most}; start with max_lora_rank={rank}")
        if place.rule.view is not None:
            b = place.rule.view.to_ours(b.T if self.config.get("fan_in_fan_out") else b)
        first = place.part * most
        table.a[first : first + rank] = a
        table.b[rows, first : first + rank] = b * self._scale(module, rank)

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...], product: tuple[int, int]) -> int:
        """The rank. product: outputs, inputs."""
        n_out, n_in = product
        rank = a[0] if a else 0
        if (a, b) != ((rank, n_in), (n_out, rank)):
            raise self.refused(f"{module} has lora_A {list(a)} and lora_B {list(b)}; this model's has {n_in} inputs and "
                               f"{n_out} outputs, so they must be [r, {n_in}] and [{n_out}, r]")  # fmt: skip
        return rank

    def _scale(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        named = [value for key, value in patterns.items() if module == key or module.endswith("." + key)]
        alpha = float(named[0] if named else self.config.get("lora_alpha", rank))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _rows(self, place: Place) -> slice:
        """The rows of the product that are a part's."""
        if place.parts == 1:
            return slice(0, self.target.shapes[place.path][0])
        sizes = _part_sizes(self.target.config, place.path)
        first = sum(sizes[: place.part])
        return slice(first, first + sizes[place.part])


def _part_sizes(config: DecoderConfig, path: str) -> tuple[int, ...]:
    """Rows of each part of a product that has several."""
    spec = config.layers[int(path.split(".")[1])]
    if path.endswith(".qkv"):
        assert isinstance(spec.attention, AttentionSpec)
        dim = spec.attention.head_dim
        return spec.attention.num_heads * dim, spec.attention.num_kv_heads * dim, spec.attention.num_kv_heads * dim
    mlp = spec.mlp.shared if isinstance(spec.mlp, MoESpec) else spec.mlp
    assert isinstance(mlp, MLPSpec)
    return mlp.ffn_dim, mlp.ffn_dim
