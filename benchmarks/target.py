"""Compiling for NVIDIA GPUs that are not here, and reading what the compiler made of it.

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version and a `ptxas` (packages nvidia-cuda-nvcc and nvidia-nvvm):
`make compile-target` installs them into a folder of their own, which `environment()` puts on the path of a child process.
No tuning happens, as there is no device: never ship such an executable, and read no times from it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(sys.prefix) / "compile-target"  # where `make compile-target` installs

_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {smem_core} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {smem_block} cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {version}" device_address_bits: 64
  ecc_enabled: true name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""
_GB = 10**9
_PARTS = {  # of the data sheets
    "h200": dict(name="NVIDIA H200", version="9.0a", capability="major: 9 feature_extension: ACCELERATED_FEATURES", cores=132,
                 smem_core=233472, smem_block=232448, threads=2048, bandwidth=4800 * _GB, l2=52428800, clock=1.98,
                 memory=141 * _GB),
    "a100": dict(name="NVIDIA A100-SXM4-80GB", version="8.0", capability="major: 8", cores=108, smem_core=167936,
                 smem_block=166912, threads=2048, bandwidth=2039 * _GB, l2=41943040, clock=1.41, memory=80 * _GB),
    "l40s": dict(name="NVIDIA L40S", version="8.9", capability="major: 8 minor: 9", cores=142, smem_core=102400,
                 smem_block=101376, threads=1536, bandwidth=864 * _GB, l2=100663296, clock=2.52, memory=48 * _GB),
}  # fmt: skip
ARCHITECTURES = {"h200": "sm_90a", "a100": "sm_80", "l40s": "sm_89"}
SHARED_MEMORY = {name: part["smem_block"] for name, part in _PARTS.items()}  # bytes a block


class Kernel(NamedTuple):
    """What ptxas says of one kernel, and counts of its PTX instructions."""

    name: str
    registers: int
    spills: int  # bytes stored
    shared: int  # bytes of shared memory a block; 0: not known
    wgmma: int
    mma: int
    tma: int
    cp_async: int
    instructions: int


class Report(NamedTuple):
    kernels: tuple[Kernel, ...]
    arguments: int  # bytes
    aliased: int
    temporaries: int
    text: str  # the optimised HLO


def missing() -> str | None:
    """Why nothing can be compiled here; None: it can."""
    places = [str(FOLDER), *sys.path]
    if not any(Path(p, "jax_plugins", "xla_cuda13").is_dir() for p in places):
        return "jax-cuda13-plugin is not installed (make compile-target)"
    return None if _ptxas() else "there is no ptxas (make compile-target)"


def _ptxas() -> Path | None:
    places = [Path(p, "nvidia", "cu13", "bin") for p in (FOLDER, *sys.path)]
    places += [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    return next((p / "ptxas" for p in places if (p / "ptxas").exists()), None)


def environment() -> dict[str, str]:
    """The environment of a child process that compiles: it must be set before JAX starts."""
    ptxas = _ptxas()
    assert ptxas is not None, missing()
    path = lambda name, first: os.pathsep.join(filter(None, [str(first), os.environ.get(name)]))
    return {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "0", "PATH": path("PATH", ptxas.parent),
        "PYTHONPATH": path("PYTHONPATH", FOLDER), "XLA_FLAGS": f"--xla_dump_to={tempfile.mkdtemp(prefix='jaxpaged-dump-')}",
    }  # fmt: skip


def devices(target: str, count: int = 1):
    """`count` GPUs of a kind in `ARCHITECTURES` that exist on paper only."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda", topology_name=target, target_config=_DESCRIPTION.format(**_PARTS[target]), topology=f"1x1x{count}"
    ).devices


def compile_for(target: str, function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Report:
    """Compiles function(*arguments) for one GPU. arguments: pytrees of anything with a shape and a dtype.

    Only in a process that was started with `environment()`.
    """
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(devices(target), ("x",)), PartitionSpec())
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    dump = Path(os.environ["XLA_FLAGS"].split("--xla_dump_to=")[1].split()[0])
    before = set(dump.glob("*")) if dump.exists() else set()
    with _mosaic_shared_memory() as shared, _captured_stdout() as printed:
        lowered = jax.jit(function, donate_argnums=donate).lower(*specs)
        compiled = lowered.compile()
    new = sorted(set(dump.glob("*")) - before)
    ours = set(re.findall(r'name = "(\w+)"', lowered.as_text()))  # of Pallas calls; XLA makes kernels of its own
    kernels = [*_triton_kernels(target, new, ours), *_mosaic_kernels(printed[0], shared)]
    memory = compiled.memory_analysis()
    for path in new:
        path.unlink()
    return Report(tuple(kernels), memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes,
                  compiled.as_text())  # fmt: skip


# -- reading what the compilers leave behind ---------------------------------------------------------------------------------


def _kernel(name: str, ptxas: str, ptx: str, shared: int) -> Kernel:
    body = [line for line in ptx.splitlines() if re.match(r"\t.*[;}]\s*$", line)]
    count = lambda pattern: sum(pattern in line for line in body)
    registers = re.search(r"Used (\d+) registers", ptxas)
    spills = re.search(r"(\d+) bytes spill stores", ptxas)
    assert registers and spills, f"ptxas said nothing of {name}: {ptxas}"
    return Kernel(name, int(registers[1]), int(spills[1]), shared, count("wgmma.mma_async"), count("mma.sync"),
                  count("cp.async.bulk.tensor"), count("cp.async.c"), len(body))  # fmt: skip


def _triton_kernels(target: str, dumped: list[Path], ours: set[str]) -> Iterator[Kernel]:
    thunks = "".join(p.read_text() for p in dumped if p.name.endswith("thunk_sequence.txt"))
    custom = dict(re.findall(r"kCustomKernel \S* ?.*?\] (\S+) grid.*shared_memory: (\d+)", thunks))
    for path in dumped:
        if path.suffix == ".ptx":
            ptx = path.read_text()
            for name in re.findall(r"\.entry (\w+)\(", ptx):
                if name in custom and name in ours:
                    yield _kernel(name, _run_ptxas(target, path), ptx, int(custom[name]))


def _run_ptxas(target: str, path: Path) -> str:
    command = [str(_ptxas()), "-v", "-arch", ARCHITECTURES[target], str(path), "-o", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def _mosaic_kernels(printed: str, shared: dict[str, int]) -> Iterator[Kernel]:
    """Mosaic prints, a kernel, its PTX and then what ptxas says."""
    parts = re.split(r"(?=//\n// Generated by)", printed)[1:]
    for part in parts:
        name = re.search(r"\.entry (\w+?)(_mosaic_gpu_kernel)?\(", part)
        assert name, part[:500]
        yield _kernel(name[1], part, part, shared.get(name[1], 0))


@contextlib.contextmanager
def _captured_stdout() -> Iterator[list[str]]:
    """File descriptor 1, to which C++ prints: its text, once left."""
    printed = [""]
    sys.stdout.flush()
    keep = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            sys.stdout.flush()
            os.dup2(keep, 1)
            os.close(keep)
            file.seek(0)
            printed[0] = file.read().decode(errors="replace")


@contextlib.contextmanager
def _mosaic_shared_memory() -> Iterator[dict[str, int]]:
    """Kernel's name -> what Mosaic asks for. It tells nobody: this looks over its shoulder, at two private functions."""
    from jax.experimental.mosaic.gpu import core

    sizes: dict[str, int] = {}
    lower, measure = core._lower_as_gpu_kernel, core._smem_tree_size
    signature, current, depth = inspect.signature(lower), "", 0

    def watched_lower(*arguments, **options):
        nonlocal current
        current = signature.bind(*arguments, **options).arguments["kernel_name"]
        return lower(*arguments, **options)

    def watched_measure(buffers):
        nonlocal depth
        depth += 1  # it calls itself
        try:
            size = measure(buffers)
        finally:
            depth -= 1
        if not depth:
            sizes[current] = size
        return size

    core._lower_as_gpu_kernel, core._smem_tree_size = watched_lower, watched_measure
    try:
        yield sizes
    finally:
        core._lower_as_gpu_kernel, core._smem_tree_size = lower, measure
