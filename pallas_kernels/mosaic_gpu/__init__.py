"""Attention kernels in Pallas Mosaic GPU, for Hopper: TMA, wgmma, warp specialisation."""

from __future__ import annotations

from functools import partial
from typing import Any

from pallas_kernels.ops import Ops
from pallas_kernels.reference.cache import write_kv


def supported(device: Any) -> str | None:
    """NVIDIA GPUs of compute capability 9.0: wgmma is Hopper's alone."""
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return f"it needs an NVIDIA Hopper GPU, this is {device.device_kind}"
    return None if device.compute_capability == "9.0" else f"it needs Hopper (9.0), this has {device.compute_capability}"


def make(device: Any, interpret: bool) -> Ops:
    # Imported late: a JAX without Mosaic GPU must still import this package.
    from pallas_kernels.mosaic_gpu.attention import paged_attention

    # XLA's scatter already writes in place, at the speed of the memory.
    attention = partial(paged_attention, device_kind=device.device_kind, interpret=interpret)
    return Ops("mosaic_gpu", attention, write_kv,
               *map(_missing, ("sample", "grouped_matmul", "quantized_matmul")))  # fmt: skip


def _missing(operation: str) -> Any:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(f"mosaic_gpu has no {operation}; the backends triton and reference have")

    return refuse
