"""Who holds what of a model: one table, from a leaf's path to how it is cut for the devices that share each layer.

Products that make heads, or the MLP's width, are cut by their outputs ("rows" of W [out, in]); products that take them, by
their inputs ("columns"): what such a one gives is a share of a sum. Embedding and head are cut by words; experts by their
width, or, expert-parallel, by expert. Everything else is the same everywhere. Heads of keys and values are repeated where there
are fewer of them than devices.

A device runs an ordinary decoder, of a smaller config: `local`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from jaxpaged.models.spec import AttentionSpec, DecoderConfig, LayerSpec, MLASpec, MLPSpec, MoESpec
from jaxpaged.request import RequestError

Parts = tuple[tuple[int, int], ...]
"""What lies one behind the other along an axis: (how many units, numbers of a unit). Each part is shared out by itself."""

MOST = 128  # sizes up to this are looked at, to say which would work


@dataclass(frozen=True)
class Cut:
    """How a leaf is cut along an axis, for `size` devices."""

    axis: int
    parts: Parts
    size: int

    def ranges(self, device: int) -> list[tuple[int, int]]:
        """[begin, end) along the axis: what a device holds, in this order."""
        found, at = [], 0
        for units, width in self.parts:
            first, last = _share(units, self.size, device)
            found.append((at + first * width, at + last * width))
            at += units * width
        return found

    @property
    def length(self) -> int:
        """Of the axis on each device; where a vocabulary does not divide, the last devices' is padded."""
        return sum(_most(units, self.size) * width for units, width in self.parts)


def _most(units: int, size: int) -> int:
    return -(-units // size)


def _share(units: int, size: int, device: int) -> tuple[int, int]:
    """[first, last) of a part's units. Of fewer units than devices each is held by several."""
    if size > units and size % units == 0:
        unit = device // (size // units)
        return unit, unit + 1
    most = _most(units, size)
    return min(device * most, units), min((device + 1) * most, units)


@dataclass(frozen=True)
class Sharding:
    """config: the whole model's. size: devices that share each layer. experts: they have some of the experts each."""

    config: DecoderConfig
    size: int = 1
    experts: bool = False

    @property
    def local(self) -> DecoderConfig:
        """The decoder that each device runs."""
        if self.size == 1:
            return self.config
        layers = tuple(replace(s, attention=self._attention(s.attention), mlp=self._mlp(s.mlp)) for s in self.config.layers)
        return replace(self.config, layers=layers, vocab_size=_most(self.config.vocab_size, self.size))

    def _attention(self, spec: AttentionSpec | MLASpec) -> AttentionSpec | MLASpec:
        heads = spec.num_heads // self.size
        if isinstance(spec, MLASpec):
            return replace(spec, num_heads=heads)
        return replace(spec, num_heads=heads, num_kv_heads=_most(spec.num_kv_heads, self.size), query_scale=spec.scale)

    def _mlp(self, spec: MLPSpec | MoESpec) -> MLPSpec | MoESpec:
        if isinstance(spec, MLPSpec):
            return replace(spec, ffn_dim=spec.ffn_dim // self.size)
        shared = spec.shared and replace(spec.shared, ffn_dim=spec.shared.ffn_dim // self.size)
        if self.experts:
            return replace(spec, held=spec.num_experts // self.size, shared=shared)
        return replace(spec, ffn_dim=spec.ffn_dim // self.size, shared=shared)

    def cut(self, path: str, shape: tuple[int, ...]) -> Cut | None:
        """How a leaf of the whole model, [*shape], is cut; None: each device has all of it."""
        if self.size == 1:
            return None
        if path.split(".")[0] in ("embed", "head", "head_bias"):
            return Cut(0, ((self.config.vocab_size, 1),), self.size)
        head, _, rest = path.partition(".")
        number, _, rest = rest.partition(".")
        if head != "layers":
            return None
        spec = self.config.layers[int(number)]
        product, kind = _product(rest)
        if isinstance(spec.mlp, MoESpec) and product in ("mlp.gate_up", "mlp.down"):
            return self._expert_cut(spec.mlp, product, kind, shape)
        found = TABLE.get(product)
        parts = found and found[1](spec)
        if not found or not parts:
            return None
        return self._cut(found[0], parts, KINDS[kind][found[0] == "columns"], shape)

    def _expert_cut(self, spec: MoESpec, product: str, kind: str, shape: tuple[int, ...]) -> Cut | None:
        """Leaves [X, out, in], biases [X, out]."""
        if self.experts:
            return Cut(0, ((spec.num_experts, 1),), self.size)
        way, parts = ("columns", ((spec.ffn_dim, 1),)) if product == "mlp.down" else ("rows", ((spec.ffn_dim, 1),) * 2)
        axis = KINDS[kind][way == "columns"]
        return self._cut(way, parts, None if axis is None else axis + 1, shape)

    def _cut(self, way: str, parts: Parts, axis: int | None, shape: tuple[int, ...]) -> Cut | None:
        if axis is None or shape[axis] == 1:  # one scale for all inputs: every device's
            return None
        if way == "columns":  # several numbers may share a byte or a scale: the axis is as many times shorter
            parts = ((self.size, shape[axis] // self.size),)
        return Cut(axis, parts, self.size)


def _product(path: str) -> tuple[str, str]:
    """What is behind layers.{i} -> (product or other module, which of its leaves)."""
    if path.endswith((".adapters.a", ".adapters.b")):
        product, _, half = path.rpartition(".adapters.")
        return product, "adapters." + half
    product, _, kind = path.rpartition(".")
    return (path, "weight") if path == "attention.sinks" else (product, kind)


KINDS: dict[str, tuple[int | None, int | None]] = {  # leaf of a product W [out, in] -> its axis of outputs, of inputs
    "weight": (0, 1), "scales": (0, 1), "zeros": (0, 1), "bias": (0, None), "adapters.a": (None, 2), "adapters.b": (1, None),
}  # fmt: skip


def _qkv(spec: LayerSpec) -> Parts:
    s = spec.attention
    assert isinstance(s, AttentionSpec)
    return (s.num_heads, s.head_dim), (s.num_kv_heads, s.head_dim), (s.num_kv_heads, s.head_dim)


def _heads(width: Callable[[MLASpec], int]) -> Callable[[LayerSpec], Parts]:
    def of(spec: LayerSpec) -> Parts:
        s = spec.attention
        return ((s.num_heads, s.head_dim if isinstance(s, AttentionSpec) else width(s)),)

    return of


def _head_norm(heads: Callable[[AttentionSpec], int]) -> Callable[[LayerSpec], Parts]:
    def of(spec: LayerSpec) -> Parts:
        s = spec.attention
        if isinstance(s, MLASpec) or s.qk_norm is None or s.qk_norm.over == "head":
            return ()
        return ((heads(s), s.head_dim if s.qk_norm.over == "all" else 1),)

    return of


def _width(times: int) -> Callable[[LayerSpec], Parts]:
    def of(spec: LayerSpec) -> Parts:
        mlp = spec.mlp.shared if isinstance(spec.mlp, MoESpec) else spec.mlp
        assert mlp is not None
        return ((mlp.ffn_dim, 1),) * times

    return of


TABLE: dict[str, tuple[str, Callable[[LayerSpec], Parts]]] = {  # module of a layer -> cut by outputs or inputs, into what
    "attention.qkv": ("rows", _qkv),
    "attention.q": ("rows", _heads(lambda s: s.nope_dim + s.rope_dim)),
    "attention.kv_up": ("rows", _heads(lambda s: s.nope_dim + s.value_dim)),
    "attention.out": ("columns", _heads(lambda s: s.value_dim)),
    "attention.sinks": ("rows", lambda spec: ((spec.attention.num_heads, 1),)),
    "attention.q_norm": ("rows", _head_norm(lambda s: s.num_heads)),
    "attention.k_norm": ("rows", _head_norm(lambda s: s.num_kv_heads)),
    "mlp.gate_up": ("rows", _width(2)),
    "mlp.up": ("rows", _width(1)),
    "mlp.down": ("columns", _width(1)),
    "mlp.shared.gate_up": ("rows", _width(2)),
    "mlp.shared.up": ("rows", _width(1)),
    "mlp.shared.down": ("columns", _width(1)),
}


# -- what fits ---------------------------------------------------------------------------------------------------------------


def check(config: DecoderConfig, size: int, experts: bool = False) -> None:
    """RequestError, with the sizes that would work, if a model cannot be shared by so many devices."""
    if experts and not any(isinstance(spec.mlp, MoESpec) for spec in config.layers):
        raise RequestError("enable_expert_parallel is for models with experts, and this one has none; leave it out.",
                           "enable_expert_parallel")  # fmt: skip
    problems = list(dict.fromkeys(_problems(config, size, experts)))
    if not problems:
        return
    works = [str(n) for n in range(1, MOST + 1) if next(_problems(config, n, experts), None) is None]
    raise RequestError(f"tensor_parallel_size={size} does not divide the model: it has {', '.join(problems)}; sizes that work: "
                       f"{', '.join(works)}.", "tensor_parallel_size")  # fmt: skip


def _problems(config: DecoderConfig, size: int, experts: bool) -> Iterator[str]:
    for spec in config.layers:
        a, mlp = spec.attention, spec.mlp
        if a.num_heads % size:
            yield f"{a.num_heads} query heads"
        groups = a.num_kv_heads if isinstance(a, AttentionSpec) else 1
        if math.gcd(groups, size) not in (groups, size):
            yield f"{groups} key and value heads"
        widths = [mlp.ffn_dim] if isinstance(mlp, MLPSpec) or not experts else []
        if isinstance(mlp, MoESpec):
            widths += [mlp.shared.ffn_dim] if mlp.shared else []
            if experts and mlp.num_experts % size:
                yield f"{mlp.num_experts} experts"
        yield from (f"an MLP of width {width}" for width in widths if width % size)


def stages(num_layers: int, count: int) -> list[range]:
    """The layers of each pipeline stage: as many, or one more in the first ones. RequestError if there are more stages than
    layers."""
    if count > num_layers:
        raise RequestError(f"pipeline_parallel_size={count}, but the model has {num_layers} layers; use {num_layers} or less.",
                           "pipeline_parallel_size")  # fmt: skip
    each, more = divmod(num_layers, count)
    ends = [i * each + min(i, more) for i in range(count + 1)]
    return [range(*pair) for pair in zip(ends, ends[1:])]
