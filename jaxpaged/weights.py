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
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxpaged.checkpoint import Checkpoint
from jaxpaged.models.standard import Name

__all__ = ["Leaves", "Name", "Put", "dummy", "from_tree", "load"]

Leaves = Mapping[str, jax.ShapeDtypeStruct]
"""Dotted path -> shape, dtype and, if it has one, sharding."""

Put = Callable[[Any], jax.Array]
"""Host array -> device array. None: `jax.device_put` with the leaf's sharding, or to the default device."""

SOURCE_DTYPES = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
SHOWN = 10  # problems of a kind that are listed by name
DUMMY_SCALE, DUMMY_CHUNK = 0.02, 1 << 20
ALIGNMENT = 64  # bytes: XLA on CPU takes such a buffer as it is, without a copy


def load(
    checkpoint: Checkpoint,
    leaves: Leaves,
    names: Sequence[Name],
    put: Put | None = None,
    progress: bool = True,
    ignore: Iterable[str] = (),
) -> dict[str, jax.Array]:
    """The leaves, filled from a checkpoint.

    names: rules; a tensor that is one of several parts of a leaf is joined with the others along axis 0.
    ignore: patterns (as in `names`) of tensors that are not used. Rules for leaves that do not exist are not used.
    Raises one ValueError with every missing, extra, misshapen or quantised tensor by name.
    """
    sources = plan(checkpoint, leaves, names, ignore)
    arrays = {}
    with _bar("Loading weights", leaves, progress) as done:
        for path, leaf in leaves.items():
            arrays[path] = _place(_filled(checkpoint, path, leaf, sources[path]), leaf, put)
            done(leaf)
    return arrays


def plan(checkpoint: Checkpoint, leaves: Leaves, names: Sequence[Name], ignore: Iterable[str] = ()) -> dict[str, list[str]]:
    """Leaf path -> the tensors it is made of, in order. Reads names, shapes and dtypes only. Raises as `load`."""
    problems = _Problems("The checkpoint")
    claims = _claims(checkpoint.names(), leaves, names, ignore, problems)
    sources = {path: _sources(path, claims.get(path, {}), names, problems) for path in leaves}
    for path, tensors in sources.items():
        if tensors:
            _check_parts(checkpoint, path, leaves[path], tensors, problems)
    problems.finish()
    return sources


def _claims(
    tensors: Iterable[str], leaves: Leaves, names: Sequence[Name], ignore: Iterable[str], problems: _Problems
) -> dict[str, dict[int, str]]:
    """Leaf path -> part -> tensor."""
    rules, ignored = [(_regex(n.pattern), n) for n in names], [_regex(p) for p in ignore]
    claims: dict[str, dict[int, str]] = {}
    for tensor in tensors:
        if any(r.fullmatch(tensor) for r in ignored):
            continue
        places = ((name.path.format(**m.groupdict()), name.part) for r, name in rules if (m := r.fullmatch(tensor)))
        path, part = next(places, ("", 0))
        if path not in leaves:
            problems.extra.append(tensor)
        elif part in claims.setdefault(path, {}):
            problems.extra.append(f"{tensor} (the same place as {claims[path][part]})")
        else:
            claims[path][part] = tensor
    return claims


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """`{i}` stands for a number, the same wherever it appears."""
    parts, seen = re.split(r"\{(\w+)\}", pattern), set()
    for k in range(1, len(parts), 2):
        name = parts[k]
        parts[k] = f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)"
        seen.add(name)
    parts[::2] = map(re.escape, parts[::2])
    return re.compile("".join(parts))


def _sources(path: str, claimed: dict[int, str], names: Sequence[Name], problems: _Problems) -> list[str]:
    """The tensors of a leaf in order; [] if one is missing, which is then on the list of problems."""
    rules = [(m, name) for name in names if (m := _regex(name.path).fullmatch(path))]
    if not rules:
        problems.missing.append(f"{path} (no rule fills it)")
        return []
    parts = rules[0][1].parts
    for part in set(range(parts)) - set(claimed):
        patterns = [name.pattern.format(**m.groupdict()) for m, name in rules if name.part == part]
        problems.missing.append(" or ".join(patterns) or f"part {part} of {path} (no rule fills it)")
    return [claimed[part] for part in range(parts)] if len(claimed) == parts else []


def _check_parts(
    checkpoint: Checkpoint, path: str, leaf: jax.ShapeDtypeStruct, tensors: list[str], problems: _Problems
) -> None:
    shapes = [tuple(checkpoint.shape(t)) for t in tensors]
    joined = shapes[0]
    if len(shapes) > 1 and all(len(s) == len(leaf.shape) and s[1:] == joined[1:] for s in shapes):
        joined = (sum(s[0] for s in shapes), *joined[1:])
    if joined != tuple(leaf.shape):
        found = " + ".join(f"{t} {list(s)}" for t, s in zip(tensors, shapes))
        problems.misshapen.append(f"{found}, expected {list(leaf.shape)} for {path}")
    for t in tensors:
        if checkpoint.dtype(t) not in SOURCE_DTYPES:
            problems.quantised.append(f"{t} ({checkpoint.dtype(t)})")


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


def _filled(checkpoint: Checkpoint, path: str, leaf: jax.ShapeDtypeStruct, tensors: list[str]) -> np.ndarray:
    """One leaf on the host, in its own dtype."""
    out, row = _empty(leaf.shape, leaf.dtype), 0
    with _no_overflow(path, leaf):
        for tensor in tensors:
            rows = checkpoint.shape(tensor)[0] if len(tensors) > 1 else None
            checkpoint.read_into(tensor, out if rows is None else out[row : row + rows])
            row += rows or 0
    return out


@contextmanager
def _no_overflow(path: str, leaf: jax.ShapeDtypeStruct) -> Iterator[None]:
    try:
        with np.errstate(over="raise", invalid="ignore"):  # a NaN is the checkpoint's own business
            yield
    except FloatingPointError:
        raise ValueError(f"{path} has values beyond {leaf.dtype}; use dtype='bfloat16' or 'float32'.") from None


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


def dummy(leaves: Leaves, seed: int = 0, put: Put | None = None, progress: bool = True) -> dict[str, jax.Array]:
    """Random weights: normal * 0.02, norms about 1. A leaf's values depend on `seed`, its path and its shape alone."""
    arrays = {}
    with _bar("Making weights", leaves, progress) as done, ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, leaf in leaves.items():
            arrays[path] = _place(_random(path, leaf, seed, threads), leaf, put)
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


def from_tree(tree: Any, leaves: Leaves, put: Put | None = None) -> dict[str, jax.Array]:
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
    return {path: _place(_own(given[path], path, leaf), leaf, put) for path, leaf in leaves.items()}


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
