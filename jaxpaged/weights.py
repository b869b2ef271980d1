"""Weights: checkpoint tensors -> the model's leaves, by name rules, one leaf at a time.

Every tensor of the checkpoint is used exactly once or is on the list of those to ignore, and every leaf is filled
exactly once: what is left over, missing or misshapen is refused, all of it in one message. The host holds one leaf at
a time (in the dtype the device will have), never the model.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxpaged.checkpoint import Checkpoint
from jaxpaged.models.quantized import NO_FORMS, Forms, quantize
from jaxpaged.models.standard import Name, View

__all__ = ["Leaves", "Name", "Put", "dummy", "from_tree", "load"]

Leaves = Mapping[str, jax.ShapeDtypeStruct]
"""Dotted path -> shape, dtype and, if it has one, sharding."""

Put = Callable[[Any], jax.Array]
"""Host array -> device array. None: `jax.device_put` with the leaf's sharding, or to the default device."""

SOURCE_DTYPES = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
SHOWN = 10  # problems of a kind that are listed by name
DUMMY_SCALE, DUMMY_CHUNK = 0.02, 1 << 20
ALIGNMENT = 64  # bytes: XLA on CPU takes such a buffer as it is, without a copy


class Part(NamedTuple):
    """Where a tensor goes: all of the leaf, or its place `index` (-1: the leaf is not made of places), there part `part`."""

    index: int
    part: int


Sources = dict[Part, tuple[str, View | None]]
"""Of one leaf: the tensor of each part, and how it is viewed."""


def load(
    checkpoint: Checkpoint,
    leaves: Leaves,
    names: Sequence[Name],
    put: Put | None = None,
    progress: bool = True,
    ignore: Iterable[str] = (),
    forms: Forms = NO_FORMS,
) -> dict[str, jax.Array]:
    """The leaves, filled from a checkpoint.

    names: rules; a tensor that is one of several parts of a leaf is joined with the others along axis 0.
    ignore: patterns (as in `names`) of tensors that are not used. Rules for leaves that do not exist are not used.
    forms: products to quantise as they are loaded; `leaves` has their floats, the result what they become.
    Raises one ValueError with every missing, extra, misshapen or quantised tensor by name.
    """
    sources = plan(checkpoint, leaves, names, ignore)
    arrays = {}
    with _bar("Loading weights", leaves, progress) as done:
        for path, leaf in leaves.items():
            arrays |= _placed(path, _filled(checkpoint, path, leaf, sources[path]), leaf, put, forms)
            done(leaf)
    return arrays


def plan(checkpoint: Checkpoint, leaves: Leaves, names: Sequence[Name], ignore: Iterable[str] = ()) -> dict[str, Sources]:
    """Leaf path -> the tensors it is made of. Reads names, shapes and dtypes only. Raises as `load`."""
    problems = _Problems("The checkpoint")
    sources = _claims(checkpoint.names(), leaves, names, ignore, problems)
    for path, leaf in leaves.items():
        if _complete(path, leaf, sources.setdefault(path, {}), names, problems):
            _check_parts(checkpoint, path, leaf, sources[path], problems)
    problems.finish()
    return sources


def _claims(
    tensors: Iterable[str], leaves: Leaves, names: Sequence[Name], ignore: Iterable[str], problems: _Problems
) -> dict[str, Sources]:
    rules, ignored = [(regex_of(n.pattern), n) for n in names], [regex_of(p) for p in ignore]
    claims: dict[str, Sources] = {}
    for tensor in tensors:
        if any(r.fullmatch(tensor) for r in ignored):
            continue
        places = (_claim(name, m.groupdict()) for r, name in rules if (m := r.fullmatch(tensor)))
        path, part, view = next((place for place in places if place[0] in leaves), ("", Part(-1, 0), None))
        if path not in leaves:
            problems.extra.append(tensor)
        elif part in claims.setdefault(path, {}):
            problems.extra.append(f"{tensor} (the same place as {claims[path][part][0]})")
        else:
            claims[path][part] = tensor, view
    return claims


def _claim(name: Name, numbers: dict[str, str]) -> tuple[str, Part, View | None]:
    path = name.path.format(**numbers)
    index = next((int(n) for key, n in numbers.items() if f"{{{key}}}" not in name.path), -1)
    return path, Part(index, name.part), name.view


@functools.cache
def regex_of(pattern: str) -> re.Pattern[str]:
    """`{i}` stands for a number, the same wherever it appears."""
    parts, seen = re.split(r"\{(\w+)\}", pattern), set()
    for k in range(1, len(parts), 2):
        name = parts[k]
        parts[k] = f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)"
        seen.add(name)
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts))


def _complete(path: str, leaf: jax.ShapeDtypeStruct, found: Sources, names: Sequence[Name], problems: _Problems) -> bool:
    """Has the leaf all its parts? What is missing goes on the list of problems."""
    rules = [(m.groupdict(), name) for name in names if (m := regex_of(name.path).fullmatch(path))]
    if not rules:
        problems.missing.append(f"{path} (no rule fills it)")
        return False
    numbers, name = _followed(rules, found)
    indexed = set(re.findall(r"{(\w+)}", name.pattern)) - set(re.findall(r"{(\w+)}", name.path))
    places = range(leaf.shape[0]) if indexed else (-1,)
    missing = [Part(index, part) for index in places for part in range(name.parts) if Part(index, part) not in found]
    for index, part in missing:
        at = dict.fromkeys(indexed, index)
        patterns = [
            n.pattern.format(**numbers, **at) for numbers, n in rules if n.part == part and _indexed(n) == bool(indexed)
        ]
        problems.missing.append(" or ".join(patterns) or f"part {part} of {path} (no rule fills it)")
    return not missing


def _followed(rules: list[tuple[dict[str, str], Name]], found: Sources) -> tuple[dict[str, str], Name]:
    """Of several ways to fill a leaf (an expert at a time, or all at once; in parts or whole) the one the tensors follow."""
    kinds = {(part.index >= 0, view) for part, (_, view) in found.items()}
    most = max((part.part for part in found), default=0)
    for numbers, name in rules:
        if (_indexed(name), name.view) in kinds and most < name.parts:
            return numbers, name
    return rules[0]


def _indexed(name: Name) -> bool:
    """Is the tensor one place of the leaf's first axis?"""
    return not set(re.findall(r"{(\w+)}", name.pattern)) <= set(re.findall(r"{(\w+)}", name.path))


def _check_parts(checkpoint: Checkpoint, path: str, leaf: jax.ShapeDtypeStruct, sources: Sources, problems: _Problems) -> None:
    try:
        viewed = {part: _viewed(checkpoint, t, view) for part, (t, view) in sources.items()}
    except (ValueError, IndexError, TypeError):  # a view that such a tensor cannot have
        viewed = {}
    shapes = {part: shape for part, (shape, _) in viewed.items()}
    rest = tuple(leaf.shape)[(next(iter(sources)).index >= 0) :]
    rows: dict[int, int] = {}
    for part, shape in shapes.items():
        rows[part.index] = rows.get(part.index, 0) + (shape[0] if shape else 0)
    fits = shapes and all(s[1:] == rest[1:] and len(s) == len(rest) for s in shapes.values())
    if not fits or (rest and set(rows.values()) != {rest[0]}) or max(part.index for part in sources) >= leaf.shape[0]:
        found = " + ".join(f"{t} {list(checkpoint.shape(t))}" for _, (t, _) in sorted(sources.items())[:SHOWN])
        problems.misshapen.append(f"{found}, expected {list(leaf.shape)} for {path}")
    for part, (_, dtype) in viewed.items():
        if dtype != leaf.dtype and (dtype not in SOURCE_DTYPES or np.dtype(leaf.dtype) not in SOURCE_DTYPES):
            problems.quantised.append(f"{sources[part][0]} ({dtype})")


def _viewed(checkpoint: Checkpoint, tensor: str, view: View | None) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype, without reading it: of the view of an array that is one number, however often."""
    shape, dtype = tuple(checkpoint.shape(tensor)), np.dtype(checkpoint.dtype(tensor))
    if view is None:
        return shape, dtype
    viewed = view.to_ours(np.broadcast_to(np.zeros((), dtype), shape))
    return viewed.shape, viewed.dtype


class _Problems:
    """Everything wrong with a set of weights, told at once."""

    def __init__(self, what: str):
        self.what = what
        self.missing: list[str] = []
        self.extra: list[str] = []
        self.misshapen: list[str] = []
        self.quantised: list[str] = []

    def finish(self) -> None:
        kinds = {"missing": self.missing, "extra": self.extra, "of another shape": self.misshapen,
                 "in a quantised or integer dtype that cannot be loaded": self.quantised}  # fmt: skip
        lines = [_listed(kind, found) for kind, found in kinds.items() if found]
        if lines:
            raise ValueError("\n  ".join([f"{self.what} does not fit the model:", *lines]))


def _listed(kind: str, found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{len(found)} {kind}: {'; '.join(found[:SHOWN])}{more}"


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As np.empty, aligned so that a CPU device takes it over without a copy."""
    dtype = np.dtype(dtype)
    raw = np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + len(raw) - ALIGNMENT].view(dtype).reshape(shape)


def _filled(checkpoint: Checkpoint, path: str, leaf: jax.ShapeDtypeStruct, sources: Sources) -> np.ndarray:
    """One leaf on the host, in its own dtype."""
    out, at = _empty(leaf.shape, leaf.dtype), dict.fromkeys((part.index for part in sources), 0)
    with _no_overflow(path, leaf):
        for part, (tensor, view) in sorted(sources.items()):
            place = out if part.index < 0 else out[part.index]
            rows = _viewed(checkpoint, tensor, view)[0][0] if place.ndim else 0
            target = place[at[part.index] : at[part.index] + rows] if place.ndim else place
            if view is None:
                checkpoint.read_into(tensor, target)
            else:
                target[...] = view.to_ours(checkpoint.read(tensor))
            at[part.index] += rows
    return out


@contextmanager
def _no_overflow(path: str, leaf: jax.ShapeDtypeStruct) -> Iterator[None]:
    try:
        with np.errstate(over="raise", invalid="ignore"):  # a NaN is the checkpoint's own business
            yield
    except FloatingPointError:
        raise ValueError(f"{path} has values beyond {leaf.dtype}; use dtype='bfloat16' or 'float32'.") from None


def _placed(path: str, array: np.ndarray, leaf: jax.ShapeDtypeStruct, put: Put | None, forms: Forms) -> dict[str, jax.Array]:
    """A leaf on the device, or the several that it becomes if it is to be quantised."""
    product, _, kind = path.rpartition(".")
    if kind != "weight" or product not in forms:
        return {path: _place(array, leaf, put)}
    return {f"{product}.{name}": _place(part, leaf, put) for name, part in quantize(array, forms[product]).items()}


def _place(array: Any, leaf: jax.ShapeDtypeStruct, put: Put | None) -> jax.Array:
    """On the device, and there: a transfer that is under way would keep the host's copy alive."""
    placed = jax.device_put(array, leaf.sharding) if put is None else put(array)
    return jax.block_until_ready(placed)


@contextmanager
def _bar(what: str, leaves: Leaves, progress: bool) -> Iterator[Callable[[jax.ShapeDtypeStruct], Any]]:
    from tqdm import tqdm

    nbytes = lambda leaf: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    total = sum(map(nbytes, leaves.values()))
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        yield lambda leaf: bar.update(nbytes(leaf))


def dummy(leaves: Leaves, seed: int = 0, put: Put | None = None, progress: bool = True,
          forms: Forms = NO_FORMS) -> dict[str, jax.Array]:  # fmt: skip
    """Random weights: normal * 0.02, norms about 1. A leaf's values depend on `seed`, its path and its shape alone."""
    arrays = {}
    with _bar("Making weights", leaves, progress) as done, ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, leaf in leaves.items():
            arrays |= _placed(path, _random(path, leaf, seed, threads), leaf, put, forms)
            done(leaf)
    return arrays


def _random(path: str, leaf: jax.ShapeDtypeStruct, seed: int, threads: ThreadPoolExecutor) -> np.ndarray:
    """Chunk by chunk, each with a generator of its own, so that the threads' number does not matter."""
    out = _empty(leaf.shape, leaf.dtype)
    flat, mean = out.reshape(-1), 1.0 if path.endswith("norm.weight") else 0.0

    def fill(chunk: int) -> None:
        digest = hashlib.sha256(f"{seed}/{path}/{chunk}".encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        part = flat[chunk * DUMMY_CHUNK : (chunk + 1) * DUMMY_CHUNK]
        values = random.standard_normal(len(part), np.float32)
        values *= np.float32(DUMMY_SCALE)
        part[...] = values + np.float32(mean)

    list(threads.map(fill, range(-(-len(flat) // DUMMY_CHUNK))))
    return out


def from_tree(tree: Any, leaves: Leaves, put: Put | None = None, forms: Forms = NO_FORMS) -> dict[str, jax.Array]:
    """The leaves, taken from memory: nested dicts and lists, a dict of dotted paths, an nnx.State or an nnx.Module.

    Arrays that are on the device already in the right dtype are not copied (do not donate them afterwards); numpy
    arrays always are. Raises one ValueError with every missing, extra, misshapen or non-float array.
    """
    given = dict(_flat(tree))
    problems = _Problems("The tree")
    problems.missing = [path for path in leaves if path not in given]
    problems.extra = [path for path in given if path not in leaves]
    for path in leaves.keys() & given.keys():
        array, leaf = given[path], leaves[path]
        if tuple(array.shape) != tuple(leaf.shape):
            problems.misshapen.append(f"{path} {list(array.shape)}, expected {list(leaf.shape)}")
        if np.dtype(array.dtype) not in SOURCE_DTYPES:
            problems.quantised.append(f"{path} ({array.dtype})")
    problems.finish()
    if not forms:
        return {path: _place(_own(given[path], path, leaf), leaf, put) for path, leaf in leaves.items()}
    arrays = {}
    for path, leaf in leaves.items():
        arrays |= _placed(path, np.asarray(_own(given[path], path, leaf)), leaf, put, forms)
    return arrays


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, array) of every array."""
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    if isinstance(tree, nnx.Variable):
        tree = tree[...]
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    elif hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield prefix, tree
        return
    elif tree is None:
        return
    else:
        raise ValueError(f"The tree has a {type(tree).__name__} at {prefix or 'its root'}; arrays are expected.")
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _own(array: Any, path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    """In the leaf's dtype. A numpy array is copied: the device could otherwise keep reading the caller's memory."""
    if isinstance(array, jax.Array):
        return array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
    out = _empty(leaf.shape, leaf.dtype)
    with _no_overflow(path, leaf):
        out[...] = array
    return out
