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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from jaxpaged import home
from jaxpaged.checkpoint import Checkpoint
from jaxpaged.home import AS_LEAVES_SAY, Home, Leaves, Region
from jaxpaged.models.quantized import NO_FORMS, Form, Forms, quantize
from jaxpaged.models.standard import Name, View

__all__ = ["Home", "Leaves", "Name", "dummy", "from_tree", "load"]

SOURCE_DTYPES = tuple(np.dtype(t) for t in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
SHOWN = 10  # problems of a kind that are listed by name
DUMMY_SCALE, DUMMY_CHUNK = 0.02, 1 << 20


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
    where: Home = AS_LEAVES_SAY,
    progress: bool = True,
    ignore: Iterable[str] = (),
    forms: Forms = NO_FORMS,
) -> dict[str, jax.Array]:
    """The leaves, filled from a checkpoint.

    names: rules; a tensor that is one of several parts of a leaf is joined with the others along axis 0.
    ignore: patterns (as in `names`) of tensors that are not used. Rules for leaves that do not exist are not used.
    forms: products to quantise as they are loaded; `leaves` has their floats, the result what they become.
    where: the devices that the leaves go to; of a leaf that is cut each part is read by itself, if the checkpoint can.
    Raises one ValueError with every missing, extra, misshapen or quantised tensor by name.
    """
    sources = plan(checkpoint, leaves, names, ignore)
    arrays = {}
    with _bar("Loading weights", leaves, progress) as done:
        for path, leaf in leaves.items():
            as_they_are = not any(view for _, view in sources[path].values())
            if as_they_are and form_of(path, forms) is None and isinstance(checkpoint, Sliced):
                read = functools.partial(fill, checkpoint, path, leaf, sources[path])
                arrays[path] = home.read(where, path, leaf, read)
            else:
                arrays |= _placed(path, filled(checkpoint, path, leaf, sources[path]), leaf, where, forms)
            done(leaf)
    return arrays


@runtime_checkable
class Sliced(Protocol):
    """A checkpoint that can read a part of a tensor."""

    def read_slice_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None: ...


def form_of(path: str, forms: Forms) -> Form | None:
    """How a leaf is to be quantised: the weight of a product that `forms` names."""
    product, _, kind = path.rpartition(".")
    return forms.get(product) if kind == "weight" else None


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
    """`{i}` stands for a number, the same wherever it appears; `**` at the end for anything."""
    if pattern.endswith("**"):
        return re.compile(regex_of(pattern.removesuffix("**")).pattern + ".*", re.DOTALL)
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
        seen = {part: viewed(checkpoint, t, view) for part, (t, view) in sources.items()}
    except (ValueError, IndexError, TypeError):  # a view that such a tensor cannot have
        seen = {}
    shapes = {part: shape for part, (shape, _) in seen.items()}
    rest = tuple(leaf.shape)[(next(iter(sources)).index >= 0) :]
    rows: dict[int, int] = {}
    for part, shape in shapes.items():
        rows[part.index] = rows.get(part.index, 0) + (shape[0] if shape else 0)
    fits = shapes and all(s[1:] == rest[1:] and len(s) == len(rest) for s in shapes.values())
    if not fits or (rest and set(rows.values()) != {rest[0]}) or max(part.index for part in sources) >= leaf.shape[0]:
        found = " + ".join(f"{t} {list(checkpoint.shape(t))}" for _, (t, _) in sorted(sources.items())[:SHOWN])
        problems.misshapen.append(f"{found}, expected {list(leaf.shape)} for {path}")
    for part, (_, dtype) in seen.items():
        if not _can_become(dtype, leaf):
            problems.quantised.append(f"{sources[part][0]} ({dtype})")


def _can_become(dtype: np.dtype, leaf: jax.ShapeDtypeStruct) -> bool:
    """Floats become other floats; everything else stays what it is."""
    return dtype == leaf.dtype or (dtype in SOURCE_DTYPES and np.dtype(leaf.dtype) in SOURCE_DTYPES)


def viewed(checkpoint: Checkpoint, tensor: str, view: View | None) -> tuple[tuple[int, ...], np.dtype]:
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


def filled(checkpoint: Checkpoint, path: str, leaf: jax.ShapeDtypeStruct, sources: Sources) -> np.ndarray:
    """One leaf on the host, in its own dtype."""
    out = home.empty(leaf.shape, leaf.dtype)
    fill(checkpoint, path, leaf, sources, home.whole(leaf.shape), out)
    return out


def fill(checkpoint: Checkpoint, path: str, leaf: jax.ShapeDtypeStruct, sources: Sources, region: Region,
         out: np.ndarray) -> None:  # fmt: skip
    """A region of a leaf on the host, in the leaf's dtype. out: of the region's shape."""
    at = dict.fromkeys((part.index for part in sources), 0)
    with _no_overflow(path, leaf):
        for part, (tensor, view) in sorted(sources.items()):
            placed = part.index >= 0
            if placed and not region[0][0] <= part.index < region[0][1]:
                continue
            target, wanted = (out[part.index - region[0][0], ...], region[1:]) if placed else (out, region)
            shape = viewed(checkpoint, tensor, view)[0]
            begin = at[part.index]
            at[part.index] += shape[0] if wanted else 0
            _fill_from(checkpoint, tensor, view, shape, wanted, begin, target)


def _fill_from(checkpoint: Checkpoint, tensor: str, view: View | None, shape: tuple[int, ...], wanted: Region, begin: int,
               target: np.ndarray) -> None:  # fmt: skip
    """What a tensor, which is the leaf's rows from `begin` on, has of what is wanted."""
    if wanted:
        first, last = max(wanted[0][0], begin), min(wanted[0][1], begin + shape[0])
        if first >= last:
            return
        target = target[first - wanted[0][0] : last - wanted[0][0]]
        wanted = ((first - begin, last - begin), *wanted[1:])
    index = tuple(slice(*pair) for pair in wanted)
    if view is not None:
        target[...] = view.to_ours(checkpoint.read(tensor))[index]
    elif wanted == home.whole(shape):
        checkpoint.read_into(tensor, target)
    elif isinstance(checkpoint, Sliced):
        checkpoint.read_slice_into(tensor, index, target)
    else:
        target[...] = checkpoint.read(tensor)[index]


@contextmanager
def _no_overflow(path: str, leaf: jax.ShapeDtypeStruct) -> Iterator[None]:
    try:
        with np.errstate(over="raise", invalid="ignore"):  # a NaN is the checkpoint's own business
            yield
    except FloatingPointError:
        raise ValueError(f"{path} has values beyond {leaf.dtype}; use dtype='bfloat16' or 'float32'.") from None


def _placed(path: str, array: np.ndarray, leaf: jax.ShapeDtypeStruct, where: Home, forms: Forms) -> dict[str, jax.Array]:
    """A leaf on its devices, or the several that it becomes if it is to be quantised."""
    form = form_of(path, forms)
    if form is None:
        return {path: home.put(where, path, array, leaf.sharding)}
    product = path.removesuffix(".weight")
    parts = {f"{product}.{name}": part for name, part in quantize(array, form).items()}
    return {path: home.put(where, path, part, leaf.sharding) for path, part in parts.items()}


@contextmanager
def _bar(what: str, leaves: Leaves, progress: bool) -> Iterator[Callable[[jax.ShapeDtypeStruct], Any]]:
    from tqdm import tqdm

    nbytes = lambda leaf: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    total = sum(map(nbytes, leaves.values()))
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        yield lambda leaf: bar.update(nbytes(leaf))


def dummy(leaves: Leaves, seed: int = 0, where: Home = AS_LEAVES_SAY, progress: bool = True,
          forms: Forms = NO_FORMS) -> dict[str, jax.Array]:  # fmt: skip
    """Random weights: normal * 0.02, norms about 1. A leaf's values depend on `seed`, its path and its shape alone."""
    arrays = {}
    with _bar("Making weights", leaves, progress) as done, ThreadPoolExecutor(os.cpu_count()) as threads:
        for path, leaf in leaves.items():
            arrays |= _placed(path, _random(path, leaf, seed, threads), leaf, where, forms)
            done(leaf)
    return arrays


def _random(path: str, leaf: jax.ShapeDtypeStruct, seed: int, threads: ThreadPoolExecutor) -> np.ndarray:
    """Chunk by chunk, each with a generator of its own, so that the threads' number does not matter."""
    out = home.empty(leaf.shape, leaf.dtype)
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


def from_tree(tree: Any, leaves: Leaves, where: Home = AS_LEAVES_SAY, forms: Forms = NO_FORMS) -> dict[str, jax.Array]:
    """The leaves, taken from memory: nested dicts and lists, a dict of dotted paths, an nnx.State or an nnx.Module.

    Arrays that are on the device already in the right dtype are not copied (do not donate them afterwards); numpy
    arrays always are. Quantised products come as they are kept (weight, scales and perhaps zeros: `forms_of`).
    Raises one ValueError with every missing, extra, misshapen array, or one of a dtype that cannot become the leaf's.
    """
    given = dict(_flat(tree))
    problems = _Problems("The tree")
    problems.missing = [path for path in leaves if path not in given]
    problems.extra = [path for path in given if path not in leaves]
    for path in leaves.keys() & given.keys():
        array, leaf = given[path], leaves[path]
        if tuple(array.shape) != tuple(leaf.shape):
            problems.misshapen.append(f"{path} {list(array.shape)}, expected {list(leaf.shape)}")
        if not _can_become(np.dtype(array.dtype), leaf):
            problems.quantised.append(f"{path} ({array.dtype})")
    problems.finish()
    if not forms:
        own = lambda path, leaf: _own(given[path], path, leaf)
        return {path: home.put(where, path, own(path, leaf), leaf.sharding) for path, leaf in leaves.items()}
    arrays = {}
    for path, leaf in leaves.items():
        arrays |= _placed(path, np.asarray(_own(given[path], path, leaf)), leaf, where, forms)
    return arrays


def forms_of(tree: Any) -> Forms:
    """The products of a tree that are quantised: those with scales beside their weight, by their dtypes and shapes."""
    given, forms = dict(_flat(tree)), {}
    kinds = {(form.dtype, _is_float(form.shapes((1, 2))["scales"][1])): form
             for form in map(Form, ("int8", "fp8", "int4", "mxfp4"))}  # fmt: skip
    for path, scales in given.items():
        product = path.removesuffix(".scales")
        weight = given.get(f"{product}.weight")
        if product == path or weight is None:
            continue
        form = kinds.get((np.dtype(weight.dtype), _is_float(scales.dtype)))
        if form is not None:
            n_in, groups = weight.shape[-1] * form.per_byte, scales.shape[-1]
            grouped = groups > 1 or form.per_byte > 1  # numbers that share a byte are of one group: it must not be cut
            forms[product] = Form(form.kind, n_in // groups if grouped else None, f"{product}.zeros" in given)
    return forms


def _is_float(dtype: Any) -> bool:
    return np.dtype(dtype) in SOURCE_DTYPES


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
    out = home.empty(leaf.shape, leaf.dtype)
    with _no_overflow(path, leaf):
        out[...] = array
    return out
