"""One engine of many processes: JAX's own start (`jax.distributed`), a connection from rank 0 to each, and what must be alike.

Each process has some of the devices that share each layer, reads its part of the weights and compiles the same programs. What
could differ from host to host (memory, and so pages) is agreed on; what must not is compared, and refused. A process that is
lost ends all: `end_soon` is how, whatever hangs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # its key-value store and what it detects have no other door

from jaxpaged import journal, memory
from jaxpaged.build import Built, build_engine
from jaxpaged.config import EngineConfig
from jaxpaged.follower import Follower, connect
from jaxpaged.leader import ClusterError, Leader
from jaxpaged.nodes import Place, alone_on_host, host_of
from jaxpaged.placement import WHOLE, specs_of
from jaxpaged.request import RequestError
from jaxpaged.runner import ModelRunner

log = logging.getLogger(__name__)

KEY = "JAXPAGED_CLUSTER_KEY"  # an environment variable; without it rank 0 makes a key, which goes through JAX's store
WHERE = "jaxpaged/leader"  # in that store
LAST_RESORT = 4.0  # seconds from a loss to the end of rank 0, should it hang: its clients get their answers in that time
AT_ONCE = 3.0  # likewise of the others, which have nothing to save
# What may differ from host to host: where things are, and what rank 0 alone uses.
LOCAL = ("model", "tokenizer", "skip_tokenizer_init", "hf_token", "chat_template", "generation_config", "compilation_cache_dir",
         "disable_log_stats", "max_cpu_loras")  # fmt: skip
MAX_DIGESTED = 1 << 20  # bytes of a leaf


@dataclass
class Member:
    """This process. on_lost: what to do, besides ending soon, when another one is lost."""

    rank: int
    size: int
    link: Leader | Follower = field(init=False)
    on_lost: Callable[[str], None] = lambda why: None

    def lost(self, why: str) -> None:
        end_soon(AT_ONCE if self.rank else LAST_RESORT)
        self.on_lost(why)

    def build(self, config: EngineConfig, progress: bool) -> Built:
        """The engine, with this process's part of it; the same everywhere. RequestError if it is not."""
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        config = over_all(config, len(devices), self.size)
        if self.rank:
            config = config.replace(skip_tokenizer_init=True)  # texts are rank 0's
        built = build_engine(config, progress=progress and not self.rank, devices=devices, least=self.link.least)
        self.link.agree(facts_of_build(built))
        return built


def join(place: Place, config: EngineConfig) -> Member:
    """Waits for the other processes. ClusterError if they do not come, RequestError if they are not alike."""
    _initialize(place)
    memory.devices(config.gpu_memory_utilization)  # now JAX starts on them
    state = distributed.global_state
    member = Member(state.process_id, state.num_processes)
    connected = _lead if member.rank == 0 else _follow
    member.link = connected(member, state.client, host_of(str(state.coordinator_address)), place.timeout)
    try:
        member.link.agree(facts_of_start(config))
        member.link.agree(facts_of_devices())
    except BaseException as error:  # what was said is still on its way: the others want to compare it too
        member.link.fail(f"{type(error).__name__}: {error}")
        raise
    log.info(
        "rank %d of %d: %d devices here, %d in all", member.rank, member.size, len(jax.local_devices()), len(jax.devices())
    )
    return member


def _initialize(place: Place) -> None:
    """Before any device is used."""
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is the server's
    jax.config.update("jax_enable_recoverability", True)  # else a process that only knocks, with a rank that is here, ends all
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # gloo wants its messages in the order of the programs
    given = None not in (place.size, place.rank, place.coordinator)
    method, size, rank, coordinator = "deactivate", place.size, place.rank, place.coordinator
    if not given and alone_on_host(os.environ):  # else JAX takes one device a process
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        coordinator, size, rank, _ = detect(coordinator, size, rank, None, None, place.timeout)
    elif not given:
        method = None
    if rank == 0 and coordinator is not None:
        _check_port(coordinator)
    log.info("rank %s of %s: waiting for the others, at most %d s (rank 0 at %s)", rank, size, place.timeout, coordinator)
    with _interruptible():
        jax.distributed.initialize(coordinator, size, rank, cluster_detection_method=method,
                                   initialization_timeout=place.timeout)  # fmt: skip


def _check_port(coordinator: str) -> None:
    """RequestError if somebody listens there: JAX would end the process, or share the port with another engine."""
    port = int(coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual).close()
    except OSError as error:
        raise RequestError(f"coordinator={coordinator}: rank 0 cannot listen on port {port}: {os.strerror(error.errno or 0)}; "
                           "use another port, the same on all.", "coordinator") from None  # fmt: skip


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process: Python's own way waits for what JAX waits for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lead(member: Member, store: Any, host: str, timeout: int) -> Leader:
    key, made = os.environ.get(KEY, ""), secrets.token_hex(32)
    sock = _listen(host)
    store.key_value_set(WHERE, json.dumps({"port": sock.getsockname()[1], "key": "" if key else made}))
    leader = Leader(sock, (key or made).encode(), member.size, member.lost)
    leader.gather(timeout)
    return leader


def _listen(host: str) -> socket.socket:
    """At the coordinator's address, if it is this host's own (and not that of something that forwards to it)."""
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family)
    except OSError:
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)


def _follow(member: Member, store: Any, host: str, timeout: int) -> Follower:
    told = json.loads(store.blocking_key_value_get(WHERE, timeout * 1000))
    key = told["key"] or os.environ.get(KEY, "")
    if not key:
        raise RequestError(f"rank 0 has a {KEY} and rank {member.rank} has none; set the same one everywhere, or nowhere.", KEY)
    return Follower(connect(host, told["port"], timeout), key.encode(), member.rank, member.lost)


def over_all(config: EngineConfig, devices: int, processes: int) -> EngineConfig:
    """All devices of all processes share each layer. RequestError for sizes that say otherwise."""
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        if (size := getattr(config, name)) > 1:
            raise RequestError(f"{name}={size} is for one process; {processes} of them share each layer "
                               f"(tensor_parallel_size={devices}). Leave it out, or start several engines.", name)  # fmt: skip
    if config.tensor_parallel_size not in (1, devices):
        raise RequestError(f"tensor_parallel_size={config.tensor_parallel_size}, but {processes} processes have "
                           f"{devices} devices in all; leave it out or say {devices}.", "tensor_parallel_size")  # fmt: skip
    return config.replace(tensor_parallel_size=devices)


# -- what must be alike --------------------------------------------------------------------------------------------------


def facts_of_start(config: EngineConfig) -> dict[str, str]:
    versions = {name: version(name) for name in ("jaxpaged", "jax", "jaxlib")}
    return versions | {"journal": str(journal.VERSION)} | facts_of_config(config)


def facts_of_config(config: EngineConfig) -> dict[str, str]:
    return {f.name: repr(getattr(config, f.name)) for f in fields(config) if f.name not in LOCAL}


def facts_of_devices() -> dict[str, str]:
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    return {
        "devices": f"{len(jax.local_devices())} x {' and '.join(kinds)}",
        "platform": jax.devices()[0].client.platform_version,
    }


def facts_of_build(built: Built) -> dict[str, str]:
    """The resolved configuration, the scheduler's sizes, the model, and a digest of what every device has of its weights."""
    model = hashlib.blake2b(repr(built.decoder_config).encode(), digest_size=8).hexdigest()
    return facts_of_config(built.config) | {
        "limits": repr(built.engine.limits), "buckets": repr(built.runner.buckets), "model": model,
        "weights": _digest(built.runner),
    }  # fmt: skip


def _digest(runner: ModelRunner) -> str:
    """Of the small leaves that are whole on each device, such as those of norms: other weights have others."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in runner.leaves.items():
        if specs_of(leaf) == WHOLE and leaf.nbytes <= MAX_DIGESTED:
            digest.update(path.encode() + np.asarray(leaf.addressable_data(0)).tobytes())
    return digest.hexdigest()


# -- the end -------------------------------------------------------------------------------------------------------------


def end_soon(seconds: float) -> None:
    """This process ends with status 1, also if it hangs in a step that others will never take."""
    timer = threading.Timer(seconds, leave, (1,))
    timer.daemon = True
    timer.start()


def leave(status: int) -> None:
    """Ends the process, without what JAX does at the end: that waits for processes which may be gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


__all__ = ["ClusterError", "Member", "end_soon", "join", "leave"]
