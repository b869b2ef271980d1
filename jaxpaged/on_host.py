"""A checkpoint's leaves on the host, one at a time: what `weights.load` does, without a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxpaged.checkpoint import Checkpoint
from jaxpaged.models.quantized import NO_FORMS, Forms, quantize
from jaxpaged.models.standard import Name
from jaxpaged.weights import Leaves, Sources, filled, form_of, plan, viewed

Spec = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype."""


class OnHost:
    """The leaves of a checkpoint, quantised where `forms` says so.

    own_dtypes: paths of leaves that stay in the checkpoint's dtype (of several in a leaf, one that holds them all) instead of
    the leaf's. Everything else, and what is raised, is as in `weights.load`.
    """

    def __init__(self, checkpoint: Checkpoint, leaves: Leaves, names: Sequence[Name], ignore: Iterable[str] = (),
                 forms: Forms = NO_FORMS, own_dtypes: Iterable[str] = ()):  # fmt: skip
        self.checkpoint, self.forms = checkpoint, forms
        self.sources = plan(checkpoint, leaves, names, ignore)
        own = {path: own_dtype(checkpoint, self.sources[path]) for path in own_dtypes}
        self.leaves = {p: jax.ShapeDtypeStruct(leaf.shape, own.get(p, leaf.dtype)) for p, leaf in leaves.items()}
        self._last: tuple[str, dict[str, np.ndarray]] = "", {}

    @property
    def specs(self) -> dict[str, Spec]:
        """{path: shape and dtype} of what `read` gives: of products in `forms`, the arrays that they become."""
        found: dict[str, Spec] = {}
        for path, leaf in self.leaves.items():
            if form := form_of(path, self.forms):
                arrays = form.shapes(leaf.shape)
                found |= {f"{path.removesuffix('weight')}{name}": spec for name, spec in arrays.items()}
            else:
                found[path] = tuple(leaf.shape), np.dtype(leaf.dtype)
        return found

    def read(self, path: str) -> np.ndarray:
        """An array of `specs`. The arrays of a quantised product come from one reading if they are asked for in a row."""
        product, _, name = path.rpartition(".")
        if path in self.leaves and form_of(path, self.forms) is None:
            self._last = "", {}
            return self._read(path)
        if self._last[0] != product:
            self._last = "", {}
            self._last = product, quantize(self._read(f"{product}.weight"), self.forms[product])
        return self._last[1][name]

    def _read(self, path: str) -> np.ndarray:
        return filled(self.checkpoint, path, self.leaves[path], self.sources[path])


def own_dtype(checkpoint: Checkpoint, sources: Sources) -> np.dtype:
    """The dtype of a leaf's tensors; if they differ, one that holds all of them."""
    kinds = {viewed(checkpoint, tensor, view)[1] for tensor, view in sources.values()}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)
