"""Rank 0 of an engine on many hosts: it has the scheduler, and tells the others each step before it takes it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxpaged import channel, wire
from jaxpaged.batch import Batch, Sampled
from jaxpaged.channel import Channel, HandshakeError
from jaxpaged.engine import Runner
from jaxpaged.journal import Record, Scheduled
from jaxpaged.request import RequestError
from jaxpaged.wire import Message

log = logging.getLogger(__name__)


NOTICE = 1.0  # seconds after a step has failed in which the loss of a process is noticed, if that is why


class ClusterError(RuntimeError):
    """A process of the engine is lost, or its devices failed: nobody can go on without it."""


class Leader:
    """key: who has it is let in. size: processes, this one included. on_lost: called once, in any thread."""

    def __init__(self, sock: socket.socket, key: bytes, size: int, on_lost: Callable[[str], None] = lambda why: None):
        self.size, self.on_lost = size, on_lost
        self.channels: dict[int, Channel] = {}  # by rank
        self.num_steps = 0
        self._sock, self._key = sock, key
        self._records: list[Record] = []
        self._writer = wire.Writer()
        self._once, self._over = threading.Lock(), threading.Event()
        self._why: str | None = None

    # -- starting --------------------------------------------------------------------------------------------------------

    def gather(self, timeout: float) -> None:
        """Waits for the followers. ClusterError if some do not come. Strangers are sent away."""
        deadline = time.monotonic() + timeout
        while len(self.channels) < self.size - 1:
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, address = self._sock.accept()
            except TimeoutError:
                missing = sorted(set(range(1, self.size)) - self.channels.keys())
                raise ClusterError(f"ranks {missing} of {self.size} have not come in {timeout:g} s.") from None
            self._admit(sock, address)
        self._sock.close()

    def _admit(self, sock: socket.socket, address: Any) -> None:
        try:
            rank = channel.admit(sock, self._key)
            if not 0 < rank < self.size or rank in self.channels:
                raise HandshakeError(f"rank {rank} is not awaited: of {self.size}, {[*self.channels]} are here")
        except OSError as error:
            log.warning("%s is not let in: %s", address[0], error)
            sock.close()
            return
        self.channels[rank] = Channel(sock, f"rank {rank}", self._lost)
        self.channels[rank].start()

    def agree(self, facts: dict[str, str]) -> None:
        """RequestError if they are not the same on all ranks: with what differs, on both sides."""
        self.tell(wire.Facts(facts))
        wrong = []
        for rank, one in self.channels.items():
            message = one.receive()
            theirs = message.values if isinstance(message, wire.Facts) else {}
            wrong += differences(facts, theirs, "rank 0", f"rank {rank}")
        if wrong:
            raise RequestError(f"the processes of this engine are not alike: {'; '.join(wrong)}.")

    def least(self, value: int) -> int:
        """The least of what all ranks say."""
        said = [one.receive() for one in self.channels.values()]
        least = min(value, *(message.value for message in said if isinstance(message, wire.Value)))
        self.tell(wire.Value(least))
        return least

    # -- running ---------------------------------------------------------------------------------------------------------

    def journal(self, record: Record) -> None:
        """For `Engine.journal`: a step goes out as it is scheduled, with what happened since the last one. ClusterError if
        somebody is lost."""
        self._records.append(record)
        if isinstance(record, Scheduled):
            records, self._records = self._records, []
            self.num_steps += 1
            self.tell(self._writer.step(records))

    def tell(self, message: Message) -> None:
        """All of them."""
        data = wire.encode(message)
        for one in self.channels.values():
            try:
                one.send_bytes(data)
            except ConnectionError as error:
                raise ClusterError(str(error)) from None

    def watch(self) -> None:
        """From here on who is silent for a few seconds is lost."""
        for one in self.channels.values():
            one.silence = channel.SILENCE

    # -- the end ---------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """All is well: the followers end, and hang up."""
        self._say(wire.Stop())
        self._wait_for_ends(5.0)

    def fail(self, why: str) -> None:
        """The followers end with an error."""
        self._over.set()
        self._say(wire.Trouble(why))
        self._wait_for_ends(4.0)

    def _wait_for_ends(self, seconds: float) -> None:
        """They end first: JAX takes it for a crash when rank 0, where its own service is, goes before them."""
        deadline = time.monotonic() + seconds
        for one in self.channels.values():
            one.wait_for_end(max(0.0, deadline - time.monotonic()))
        self.close()

    def why_lost(self, timeout: float) -> str | None:
        """As `Channel.why_lost`, of any follower."""
        self._over.wait(timeout)
        return self._why

    def _say(self, message: Message) -> None:
        for one in self.channels.values():
            one.expect_end()
            try:
                one.send(message)
            except ConnectionError:  # it needs no telling
                pass

    def close(self) -> None:
        for one in self.channels.values():
            one.close()
        self._sock.close()

    def _lost(self, why: str) -> None:
        with self._once:
            if self._over.is_set():
                return
            self._why = why
            self._over.set()
        self._say(wire.Trouble(why))  # the others may wait for it in a step
        self.on_lost(why)


class Shared:
    """A `Runner` whose failed steps are the end: the other processes wait in that step, or have taken it."""

    def __init__(self, runner: Runner, leader: Leader):
        self._runner, self._leader = runner, leader

    @property
    def embed_dim(self) -> int:
        return self._runner.embed_dim

    def dispatch(self, batch: Batch) -> Any:
        return self._runner.dispatch(batch)

    def collect(self, handle: Any) -> Sampled:
        return self._runner.collect(handle)

    def recover(self) -> bool:
        why = self._leader.why_lost(NOTICE)
        raise ClusterError(why or "a step failed, and the engine's other processes cannot take it again (see the log).")

    def close(self) -> None:
        self._runner.close()


def differences(mine: dict[str, str], theirs: dict[str, str], me: str, them: str) -> list[str]:
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return [f"{name} is {mine.get(name)} on {me} and {theirs.get(name)} on {them}" for name in names]
