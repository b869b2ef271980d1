"""Which processes form one engine: what the command line says, or the environment of a launcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxpaged.flags import DEVICES
from jaxpaged.request import RequestError

PORT = 8476  # of the coordinator, where none is given
NODES_HELP = {
    "nnodes": (
        DEVICES,
        "Processes of one engine, usually one a host; auto: as SLURM, Open MPI or Kubernetes say.",
    ),
    "node_rank": (DEVICES, "Number of this process, from 0. Rank 0 serves HTTP, the others follow it."),
    "coordinator": (DEVICES, f"HOST:PORT of rank 0, free for JAX to listen on (port: {PORT} unless given)."),
    "master_addr": (DEVICES, "vLLM's name for the coordinator's host."),
    "master_port": (DEVICES, "vLLM's name for the coordinator's port."),
    "distributed_timeout_seconds": (DEVICES, "How long the processes wait for each other at the start."),
}


@dataclass(frozen=True)
class Nodes:
    """As the flags say. nnodes: a number, "auto", or None: one process, unless a launcher has started several."""

    nnodes: int | str | None = None
    node_rank: int | None = None
    coordinator: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    distributed_timeout_seconds: int = 600


@dataclass(frozen=True)
class Place:
    """This process among those of its engine. None: to be found out by JAX."""

    size: int | None
    rank: int | None
    coordinator: str | None
    timeout: int


def place(nodes: Nodes, environment: Mapping[str, str]) -> Place | None:
    """None: this process is an engine of its own. RequestError for flags that do not fit together."""
    coordinator, given = _coordinator(nodes), nodes.nnodes
    if given is None and nodes.node_rank is None and coordinator is None:
        given = "auto" if launched(environment) > 1 else 1
    if given == "auto":
        return Place(None, nodes.node_rank, coordinator, nodes.distributed_timeout_seconds)
    if not isinstance(given, int) or given < 1:
        raise RequestError(f'nnodes must be a number of processes >= 1 or "auto", got {given!r}.', "nnodes")
    rank = nodes.node_rank if nodes.node_rank is not None or given > 1 else 0
    if not isinstance(rank, int) or not 0 <= rank < given:
        raise RequestError(f"node_rank must be a number from 0 to {given - 1}, of nnodes={given}; got {rank!r}.", "node_rank")
    if given == 1:
        return None
    if coordinator is None:
        raise RequestError(f"nnodes={given} needs coordinator=HOST:PORT: where all reach rank 0.", "coordinator")
    return Place(given, rank, coordinator, nodes.distributed_timeout_seconds)


def launched(environment: Mapping[str, str]) -> int:
    """Processes that `srun` or `mpirun` has started this one with."""
    in_step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", "")).isdigit()  # not in a batch script
    count = environment.get("SLURM_STEP_NUM_TASKS", "1") if in_step else environment.get("OMPI_COMM_WORLD_SIZE", "1")
    return int(count) if count.isdigit() else 1


def alone_on_host(environment: Mapping[str, str]) -> bool:
    """The launcher has started one process a host: all of the host's devices are its own, and not one of them."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    return tasks.partition("(")[0] == "1"


def host_of(coordinator: str) -> str:
    return coordinator.rpartition(":")[0].strip("[]")


def _coordinator(nodes: Nodes) -> str | None:
    if nodes.coordinator is not None and (nodes.master_addr is not None or nodes.master_port is not None):
        raise RequestError("give coordinator, or master_addr and master_port, not both.", "coordinator")
    if nodes.coordinator is None:
        return None if nodes.master_addr is None else f"{nodes.master_addr}:{nodes.master_port or PORT}"
    given = str(nodes.coordinator)
    host, colon, port = given.rpartition(":")
    if not colon or given.endswith("]"):
        return f"{given}:{PORT}"
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise RequestError(f"coordinator must be HOST:PORT, such as 10.0.0.1:{PORT}; got {given!r}.", "coordinator")
    return given
