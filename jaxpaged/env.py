"""What a bug report needs: versions, devices, memory, settings. Secrets are not shown."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

PACKAGES = ("jaxpaged", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy", "ml_dtypes",
            "safetensors", "gguf", "tokenizers", "huggingface_hub", "jinja2", "typer", "transformers", "torch")  # fmt: skip
PREFIXES = ("JAX", "XLA", "HF_", "CUDA", "NVIDIA", "TF_GPU", "OMP", "OPENBLAS", "PYTHON")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def report() -> str:
    """Lines of "name: value", in groups."""
    groups = {"system": _system(), "packages": _packages(), "devices": _devices(), "environment": _variables()}
    return "\n".join(f"{title}\n" + "\n".join(f"  {k}: {v}" for k, v in lines.items()) for title, lines in groups.items())


def _system() -> dict[str, str]:
    from jaxpaged import hub

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"platform": platform.platform(), "python": f"{platform.python_version()} ({sys.executable})", "cpu": cpu(),
            "cores": str(os.cpu_count()), "memory": f"{memory:.1f} GiB", "cache folder": str(hub.cache_dir())}  # fmt: skip


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name") and ": " in line]
    return names[0] if names else platform.processor() or platform.machine()


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, str]:
    try:
        import jax

        return {str(device): device.device_kind for device in jax.devices()}
    except Exception as error:  # a broken installation is just what a report is for
        return {"error": f"{type(error).__name__}: {error}"}


def _variables() -> dict[str, str]:
    shown = {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
    return {name: "(set)" if any(s in name for s in SECRET) else value for name, value in shown.items()} or {"(none set)": ""}
