"""An engine of several processes on this machine, as `jaxpaged serve` makes it of their ranks."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence

from live_server import wait_until
from server_process import START_SECONDS, ServerProcess, jaxpaged


class Ranks:
    """options: of each rank's command line. own: more for some ranks. devices: that each has. environments: variables
    of a launcher, which then says who they are, or of some ranks."""

    def __init__(self, size: int, options: Sequence[str], own: Mapping[int, Sequence[str]] | None = None,
                 devices: Mapping[int, int] | None = None,
                 environments: Mapping[int, Mapping[str, str]] | None = None, launched: bool = False):  # fmt: skip
        flags = [] if launched else ["--nnodes", str(size), "--coordinator", f"127.0.0.1:{free_port()}"]
        place = lambda rank: [] if launched else ["--node-rank", str(rank)]
        self.commands = [
            ["env", f"JAX_NUM_CPU_DEVICES={(devices or {}).get(rank, 1)}",
             *(f"{name}={value}" for name, value in (environments or {}).get(rank, {}).items()),
             *jaxpaged("serve", *flags, *options, *place(rank), *(own or {}).get(rank, ()))]
            for rank in range(size)
        ]  # fmt: skip
        self.processes = list(map(ServerProcess, self.commands))

    @property
    def base_url(self) -> str:
        return self.processes[0].base_url

    @property
    def logs(self) -> str:
        return "\n".join(f"-- rank {rank}:\n{one.log}" for rank, one in enumerate(self.processes))

    def wait_until_up(self) -> None:
        up = lambda: "Application startup complete" in self.processes[0].log
        wait_until(lambda: up() or any(self.statuses()), lambda: f"the engine:\n{self.logs}", START_SECONDS)
        assert up() and not any(self.statuses()), self.logs

    def statuses(self) -> list[int | None]:
        return [one.process.poll() for one in self.processes]

    def wait_for_end(self, seconds: float, but: Sequence[int] = ()) -> tuple[list[int | None], float]:
        """The exit statuses, and how long it took until the last had ended. but: ranks that are not waited for."""
        began = time.monotonic()
        left = [one.process for rank, one in enumerate(self.processes) if rank not in but]
        wait_until(lambda: all(one.poll() is not None for one in left), lambda: f"the end:\n{self.logs}", seconds)
        return self.statuses(), time.monotonic() - began

    def send_signal(self, rank: int, number: int) -> None:
        self.processes[rank].signal(number)


@contextlib.contextmanager
def ranks(size: int, options: Sequence[str], **more) -> Iterator[Ranks]:
    """Whatever happens, none of them is left."""
    found = Ranks(size, options, **more)
    try:
        yield found
    finally:
        for one in found.processes:
            one.process.send_signal(signal.SIGCONT)
            one.process.kill()
            one.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
