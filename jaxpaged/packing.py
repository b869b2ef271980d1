"""One int32 buffer a step: what the host sends goes over in one transfer and is taken apart inside the program.

Every further numpy argument of a compiled call costs about 15 us on the host; there would be sixteen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Layout = Mapping[str, tuple[tuple[int, ...], Any]]
"""Field name -> (shape, dtype), in the order of the buffer. 32-bit numbers keep their bits; bools take 32 bits."""


def size(layout: Layout) -> int:
    """Length of the buffer in int32 words."""
    return sum(math.prod(shape) for shape, _ in layout.values())


def pack(layout: Layout, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Host side: the fields of `layout`, one behind the other. ValueError if a shape is not the layout's."""
    buffer = np.empty(size(layout), np.int32)
    at = 0
    for name, (shape, dtype) in layout.items():
        field, n = fields[name], math.prod(shape)
        if field.shape != shape:
            raise ValueError(f"batch field {name} has shape {field.shape}, the bucket's program takes {shape}.")
        if dtype == np.bool_:
            buffer[at : at + n] = field.ravel()
        else:
            buffer[at : at + n] = np.ascontiguousarray(field, dtype).view(np.int32).ravel()
        at += n
    return buffer


def unpack(layout: Layout, buffer: Array) -> dict[str, Array]:
    """Inside the program: the fields again. Offsets are static."""
    fields, at = {}, 0
    for name, (shape, dtype) in layout.items():
        n = math.prod(shape)
        words = buffer[at : at + n].reshape(shape)
        if dtype == np.bool_:
            fields[name] = words != 0
        elif dtype == np.int32:
            fields[name] = words
        else:
            fields[name] = jax.lax.bitcast_convert_type(words, jnp.dtype(dtype))
        at += n
    return fields
