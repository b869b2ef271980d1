"""JAX's interpreter of Mosaic GPU kernels, by its name in each version of JAX."""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu


def interpreter(**options: Any) -> Any:
    """Parameters of JAX's interpreter of Mosaic GPU kernels, public since 0.11."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(**options)  # pyright: ignore[reportAttributeAccessIssue]
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)
