"""Reading what the compilers make of kernels for NVIDIA GPUs that are not here (`jaxpaged.devices_compiler` calls them).

`make compile-target` installs the compilers.
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

from jaxpaged import devices_compiler
from jaxpaged.devices import DEVICES

ARCHITECTURES = {name: DEVICES[name].architecture for name in ("h200", "a100", "l40s")}
SHARED_MEMORY = {name: device.shared_memory_block for name, device in DEVICES.items()}  # bytes a block


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
    reason = devices_compiler.missing()
    return reason and f"{reason} (make compile-target)"


def environment() -> dict[str, str]:
    """The environment of a child process that compiles: it must be set before JAX starts."""
    return {**devices_compiler.environment(), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1",
            "XLA_FLAGS": f"--xla_dump_to={tempfile.mkdtemp(prefix='jaxpaged-dump-')}"}  # fmt: skip


def devices(target: str, count: int = 1):
    """`count` GPUs of a kind in `ARCHITECTURES` that exist on paper only."""
    return devices_compiler.paper_devices(DEVICES[target], count)


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
    command = [str(devices_compiler.ptxas()), "-v", "-arch", ARCHITECTURES[target], str(path), "-o", os.devnull]
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
