"""Kernels in Pallas-Triton, for Ampere and later: one source for every NVIDIA GPU.

JAX has deprecated its Triton backend (0.11) and still ships it (0.12): nothing outside this folder depends on it.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

from pallas_kernels.ops import Ops


def supported(device: Any) -> str | None:
    """NVIDIA GPUs from compute capability 8.0, with a JAX that has the Triton backend."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this JAX has no Pallas-Triton backend any more"
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"it needs an NVIDIA GPU, this is {device.device_kind}"
    return (
        None
        if _capability(device) >= (8, 0)
        else f"it needs compute capability 8.0 (Ampere), this has {device.compute_capability}"
    )


def make(device: Any, interpret: bool) -> Ops:
    # Imported late: loading Triton's dialect takes a while, and a JAX without it must still import this package.
    from pallas_kernels.triton.attention import paged_attention
    from pallas_kernels.triton.cache import write_kv
    from pallas_kernels.triton.matmul import grouped_matmul, quantized_matmul
    from pallas_kernels.triton.sampling import sample

    capability = None if interpret else _capability(device)
    bound = partial(partial, interpret=interpret)
    return Ops("triton", bound(paged_attention, capability=capability), bound(write_kv, capability=capability),
               bound(sample), bound(grouped_matmul), bound(quantized_matmul))  # fmt: skip


def _capability(device: Any) -> tuple[int, int]:
    major, minor = map(int, device.compute_capability.split("."))
    return major, minor
