"""Arrays on the devices that share each layer, and programs that run on all of them.

Several devices are a mesh of one axis, and a program is one `shard_map` over it: what goes between devices is what the program
says. One device is what it always was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxpaged.axis import NAME

WHOLE = PartitionSpec()


class Placement:
    """devices: those that share each layer. Arrays are either whole on each of them or cut along an axis."""

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = tuple(devices)
        self.mesh = Mesh(np.array(self.devices), (NAME,))
        self.own = tuple(d for d in self.devices if d.process_index == jax.process_index())
        self._shardings: dict[int | None, jax.sharding.Sharding] = {}  # JAX is quick with those that it has seen before
        self._whole = self.sharding(None)

    def spec(self, axis: int | None) -> PartitionSpec:
        """Of an array that is cut along `axis`; None: whole."""
        return WHOLE if axis is None or len(self.devices) == 1 else PartitionSpec(*[None] * axis, NAME)

    def sharding(self, axis: int | None) -> jax.sharding.Sharding:
        if axis not in self._shardings:
            one = len(self.devices) == 1
            made = SingleDeviceSharding(self.devices[0]) if one else NamedSharding(self.mesh, self.spec(axis))
            self._shardings[axis] = made
        return self._shardings[axis]

    # -- arrays ----------------------------------------------------------------------------------------------------------

    def put(self, array: Any) -> Array:
        """A host array, whole on each device."""
        if len(self.own) == len(self.devices):
            return jax.device_put(array, self._whole)
        parts = [jax.device_put(array, device) for device in self.own]
        return jax.make_array_from_single_device_arrays(np.shape(array), self._whole, parts)

    def join(self, parts: Sequence[Array], axis: int | None) -> Array:
        """parts: of each of this process's devices in their order, along `axis`."""
        shape = list(parts[0].shape)
        if axis is not None:
            shape[axis] *= len(self.devices)
        return jax.make_array_from_single_device_arrays(tuple(shape), self.sharding(axis), list(parts))

    def zeros(self, abstract: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
        """Of `struct`s, one after the other: never more than one is there twice."""
        found = []
        for spec in abstract:
            assert spec.sharding is not None
            parts = []
            for device in self.own:
                with jax.default_device(device):
                    parts.append(jax.device_put(jnp.zeros(spec.sharding.shard_shape(spec.shape), spec.dtype), device))
            found.append(jax.make_array_from_single_device_arrays(spec.shape, spec.sharding, parts))
        return found

    # -- programs --------------------------------------------------------------------------------------------------------

    def struct(self, shape: Sequence[int], dtype: Any, axis: int | None = None) -> jax.ShapeDtypeStruct:
        """An array to compile for. shape: of what each device has."""
        full = tuple(n * len(self.devices) if i == axis else n for i, n in enumerate(shape))
        return jax.ShapeDtypeStruct(full, dtype, sharding=self.sharding(axis))

    def jit(self, function: Callable, inputs: Any, outputs: Any, donate: Sequence[int] = ()) -> Any:
        """function: what each device runs on its parts. inputs, outputs: pytrees of `spec`s, prefixes of its arguments and of
        its result. donate: which arguments are given away."""
        if len(self.devices) > 1:
            function = jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
        return jax.jit(function, donate_argnums=tuple(donate))


def specs_of(arrays: Any) -> Any:
    """The `spec`s of arrays, or structs, in any pytree."""
    return jax.tree.map(lambda x: x.sharding.spec if isinstance(x.sharding, NamedSharding) else WHOLE, arrays)


def shard_bytes(array: Any) -> int:
    """Of an array, or struct, on each device."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
