"""Compiling for NVIDIA GPUs that are not here.

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version and a `ptxas` (packages nvidia-cuda-nvcc and nvidia-nvvm). They
live in a folder of their own, which `environment()` puts on the path of a child process: beside JAX, its CUDA plugin would look
for a GPU at every start. No tuning happens, as there is no device: never ship such an executable, and read no times from it.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

from jaxpaged.devices import Device

FOLDER = Path(sys.prefix) / "compile-target"  # where `install()` says to put them
PARTS = ("nvidia-cuda-nvcc>=13,<14", "nvidia-nvvm>=13,<14", "nvidia-cuda-crt>=13,<14", "nvidia-cuda-runtime>=13,<14")


def missing() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    places = [str(FOLDER), *sys.path]
    if not any(Path(p, "jax_plugins", "xla_cuda13").is_dir() for p in places):
        return "jax-cuda13-plugin is not installed"
    return None if ptxas() else "there is no ptxas"


def install() -> str:
    """The command that installs what is missing."""
    version = importlib.metadata.version("jax")
    ours = [f"jax-cuda13-{part}=={version}" for part in ("plugin", "pjrt")]
    return f"{sys.executable} -m pip install --no-deps --target {FOLDER} {' '.join(f'{p!r}' for p in (*ours, *PARTS))}"


def ptxas() -> Path | None:
    places = [Path(p, "nvidia", "cu13", "bin") for p in (FOLDER, *sys.path)]
    places += [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    return next((p / "ptxas" for p in places if (p / "ptxas").exists()), None)


def environment() -> dict[str, str]:
    """The environment of a child process that compiles: it must be set before JAX starts."""
    found = ptxas()
    assert found is not None, missing()
    path = lambda name, first: os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))
    return {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_ENABLE_COMPILATION_CACHE": "0",
        "PATH": path("PATH", found.parent), "PYTHONPATH": path("PYTHONPATH", FOLDER),
    }  # fmt: skip


def paper_devices(device: Device, count: int = 1):
    """`count` JAX devices of a kind that exist on paper only. In a process that was started with `environment()`."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", topology_name=device.name, target_config=device.target_config, topology=f"1x1x{count}"
    ).devices
