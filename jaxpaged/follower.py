"""The other ranks of an engine on many hosts: they replay the leader's journal, and take the same steps on their devices."""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpaged import channel, wire
from jaxpaged.batch import Bucket
from jaxpaged.channel import Channel
from jaxpaged.engine import Runner
from jaxpaged.journal import Committed, Failed, Record
from jaxpaged.leader import NOTICE, ClusterError, differences
from jaxpaged.replay import Replay
from jaxpaged.request import RequestError
from jaxpaged.scheduler import Limits, Plan

log = logging.getLogger(__name__)


class Follower:
    """A connection to the leader. on_lost: called once, in another thread, when it is lost."""

    def __init__(self, sock: socket.socket, key: bytes, rank: int, on_lost: Callable[[str], None] = lambda why: None):
        self.rank = rank
        try:
            channel.introduce(sock, key, rank)
        except BaseException:
            sock.close()
            raise
        self.channel = Channel(sock, "rank 0", on_lost, stays=True)
        self.channel.start()

    def agree(self, facts: dict[str, str]) -> None:
        """As `Leader.agree`."""
        self.channel.send(wire.Facts(facts))
        message = self.channel.receive()
        theirs = message.values if isinstance(message, wire.Facts) else {}
        wrong = differences(theirs, facts, "rank 0", f"rank {self.rank}")
        if wrong:
            raise RequestError(f"the processes of this engine are not alike: {'; '.join(wrong)}.")

    def least(self, value: int) -> int:
        """As `Leader.least`."""
        self.channel.send(wire.Value(value))
        message = self.channel.receive()
        assert isinstance(message, wire.Value), message
        return message.value

    def run(self, limits: Limits, buckets: Sequence[Bucket], runner: Runner) -> None:
        """Follows until the leader ends. ClusterError, or whatever a step raises, when this rank cannot go on."""
        self.channel.silence = channel.SILENCE
        try:
            self._follow(Steps(limits, buckets, runner))
        except Exception as error:
            why = self.channel.why_lost(NOTICE)
            raise (error if why is None else ClusterError(why)) from error

    def _follow(self, steps: Steps) -> None:
        reader = wire.Reader()
        while True:
            message = self.channel.receive()
            if isinstance(message, wire.Stop):
                steps.finish()
                return
            assert isinstance(message, wire.Step), message
            for record in reader.records(message):
                steps.take(record)

    def fail(self, why: str) -> None:
        """The leader is told; then this is the end."""
        try:
            self.channel.send(wire.Trouble(why))
        except ConnectionError:  # it has ended
            pass
        self.channel.close()


class Steps:
    """Takes the steps of a journal on a runner."""

    def __init__(self, limits: Limits, buckets: Sequence[Bucket], runner: Runner):
        self._replay, self._runner = Replay(limits, buckets), runner
        self._handles: deque[Any] = deque()

    def take(self, record: Record) -> None:
        if isinstance(record, Failed):
            raise ClusterError("a step of the leader failed.")
        if isinstance(record, Committed):
            self._check(self._replay.plans[0], record)
        batch = self._replay.apply(record)
        if batch is not None:
            self._handles.append(self._runner.dispatch(batch))

    def _check(self, plan: Plan, record: Committed) -> None:
        """The step has run here too, and with the same result: ranks that differ must not go on."""
        own = self._runner.collect(self._handles.popleft()).tokens[: len(plan.slots)]
        if not np.array_equal(own[plan.samples], record.tokens[plan.samples]):
            raise ClusterError(f"this rank has sampled {own[plan.samples].tolist()} and the leader "
                               f"{record.tokens[plan.samples].tolist()}: they do not run the same program.")  # fmt: skip

    def finish(self) -> None:
        """Waits for what is still under way."""
        while self._handles:
            self._runner.collect(self._handles.popleft())
        self._runner.close()


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """To the leader, which may not listen yet. ClusterError after so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), channel.HANDSHAKE)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"rank 0 cannot be reached at {host}:{port}: {error.strerror or error}.") from None
            time.sleep(0.2)
