"""`build_replicas(config)`: as many engines as `data_parallel_size` says, each on devices of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxpaged import memory
from jaxpaged.build import Built, build_engine
from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError

AT_ONCE = 4  # engines that are built at the same time: each may hold a part of the weights in host memory


def build_replicas(config: EngineConfig, model: dict[str, Any] | None = None, params: Any = None,
                   progress: bool = True, devices: Sequence[jax.Device] | None = None) -> list[Built]:  # fmt: skip
    """As `build_engine`, `data_parallel_size` times. The first one is built alone: it says what is wrong, finds the model and
    shows its progress; then the others, at the same time. RequestError if there are too few devices; nothing is left behind
    if one cannot be built."""
    if config.data_parallel_size == 1:
        return [build_engine(config, model, params, progress, devices)]
    slices = _slices(config, list(devices or memory.devices(config.gpu_memory_utilization)))
    built = [build_engine(config, model, params, progress, slices[0])]
    config = config.replace(max_model_len=built[0].config.max_model_len)  # "auto" is what the first one has room for
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="jaxpaged-build") as pool:
        coming = [pool.submit(build_engine, config, model, params, False, one) for one in slices[1:]]
    failed = next((one.exception() for one in coming if one.exception() is not None), None)
    built += [one.result() for one in coming if one.exception() is None]
    if failed is not None:
        for one in built:
            one.engine.close()
        raise failed
    return built


def _slices(config: EngineConfig, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each engine."""
    size, wanted = config.tensor_parallel_size * config.pipeline_parallel_size, config.data_parallel_size
    if size * wanted > len(devices):
        of_each = f" of {size} devices each (tensor_parallel_size x pipeline_parallel_size)" if size > 1 else ""
        fit = len(devices) // size
        remedy = f"at most {fit} fit" if fit else f"not even one fits: lower the size of an engine to {len(devices)} or less"
        raise RequestError(f"data_parallel_size={wanted}: {wanted} engines{of_each} need {size * wanted} devices and there are "
                           f"{len(devices)}; {remedy}.", "data_parallel_size")  # fmt: skip
    return [devices[i * size : (i + 1) * size] for i in range(wanted)]
