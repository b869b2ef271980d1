"""A connection between two processes of one engine: TCP, both prove that they have the key, then frames.

A frame is its length (8 bytes, little-endian) and a message of `wire`. Before the key is proven nobody reads more than a few
bytes of fixed length. One thread sends, one reads; who is silent for too long, or hangs up, is lost. What is said afterwards is
neither encrypted nor signed: like the devices' own traffic it belongs into a network of one's own.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from jaxpaged import wire
from jaxpaged.wire import Message, WireError

log = logging.getLogger(__name__)

MAGIC = b"jaxpaged"
NONCE, DIGEST = 32, hashlib.sha256().digest_size
MAX_FRAME = 1 << 32  # bytes: a LoRA adapter goes over in one
MAX_UNSENT = 256  # frames: who is so many steps behind does not follow any more
BEAT = 1.0  # seconds of silence after which one says that one lives
SILENCE = 5.0  # seconds after which the other one is lost, while serving
PATIENCE = 60.0  # likewise while models are loaded and compiled: that may keep a process from answering
HANDSHAKE = 10.0  # seconds that a follower waits for its turn
ADMISSION = 2.0  # seconds that the leader gives to each who comes: others wait
_LENGTH = struct.Struct("<Q")
_RANK = struct.Struct("<I")


class HandshakeError(ConnectionError):
    """The other side is not one of ours: it has another key, or speaks something else."""


class Channel:
    """name: of the other side, for messages. All that it says but beats goes to `inbox`; None is its end, of which `lost` says
    why. on_lost: called once, in a thread of the channel, when that end was not wished. stays: when the other side says that it
    ends, this one does not hang up: that tells the other one that this process has ended."""

    def __init__(self, sock: socket.socket, name: str, on_lost: Callable[[str], None] = lambda why: None, stays: bool = False):
        self.name, self.on_lost, self.silence, self._stays = name, on_lost, PATIENCE, stays
        self.inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.lost: str | None = None
        self.num_sent = self.num_frames = 0  # bytes, frames
        self._sock, self._closing = sock, False
        self._outbox: queue.Queue[bytes | None] = queue.Queue(MAX_UNSENT)
        self._ending, self._ended = threading.Lock(), threading.Event()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        self._threads = [threading.Thread(target=run, name=f"jaxpaged-{what}-{name}", daemon=True)
                         for what, run in (("send", self._send), ("read", self._read))]  # fmt: skip

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, message: Message) -> None:
        self.send_bytes(wire.encode(message))

    def send_bytes(self, data: bytes) -> None:
        """Of a message; goes out in the background. ConnectionError if the other side is lost or too far behind."""
        if self.lost is not None:
            raise ConnectionError(self.lost)
        try:
            self._outbox.put_nowait(data)
        except queue.Full:
            self._end(f"{self.name} is {MAX_UNSENT} messages behind")
            raise ConnectionError(self.lost) from None

    def receive(self) -> Message:
        """The next message. ConnectionError at the end."""
        message = self.inbox.get()
        if message is None:
            self.inbox.put(None)
            raise ConnectionError(self.lost or f"{self.name} has ended")
        return message

    def expect_end(self) -> None:
        """From here on the other side may hang up: nobody hears of it."""
        self._closing = True

    def why_lost(self, timeout: float) -> str | None:
        """Why the other side is lost, if that is known in so many seconds: a step that fails may be the first sign of it."""
        self._ended.wait(timeout)
        return self.lost

    def close(self, timeout: float = 2.0) -> None:
        """Sends what there is to send, at most for so many seconds, and hangs up."""
        self.expect_end()
        try:
            self._outbox.put(None, timeout=timeout)
            self._threads[0].join(timeout)
        except (queue.Full, RuntimeError):  # it does not read; never started
            pass
        self._shut(socket.SHUT_WR)  # and goes on reading: with something unread, TCP would take back what has been sent
        for thread in reversed(self._threads):
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout)
        self._shut()
        self._sock.close()

    def wait_for_end(self, timeout: float) -> None:
        """Until the other side hangs up."""
        self.expect_end()
        self._threads[1].join(timeout)

    # -- threads ---------------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        beat = wire.encode(wire.Beat())
        try:
            while True:
                try:
                    data = self._outbox.get(timeout=BEAT)
                except queue.Empty:
                    data = beat
                if data is None:
                    return
                self._sock.sendall(_LENGTH.pack(len(data)) + data if len(data) < 1 << 16 else _LENGTH.pack(len(data)))
                if len(data) >= 1 << 16:
                    self._sock.sendall(data)
                self.num_sent += _LENGTH.size + len(data)
                self.num_frames += 1
        except OSError as error:
            self._end(f"the connection to {self.name} is broken: {error.strerror or error}")

    def _read(self) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
                if length > MAX_FRAME:
                    raise WireError(f"a message of {length} bytes")
                message = wire.decode(self._exactly(length))
                if isinstance(message, wire.Trouble):
                    return self._end(f"{self.name} ends: {message.why}", hang_up=not self._stays)
                if not isinstance(message, wire.Beat):
                    self.inbox.put(message)
        except WireError as error:
            self._end(f"{self.name} sends what nobody understands: {error}")
        except ConnectionResetError:
            self._end(f"{self.name} has gone")
        except OSError as error:
            self._end(str(error))

    def _exactly(self, size: int) -> bytearray:
        """So many bytes: memory is taken for those that come, not for those that are announced."""
        data, since, poll = bytearray(), time.monotonic(), select.poll()
        poll.register(self._sock, select.POLLIN)
        while len(data) < size:
            asked = time.monotonic()  # before looking: if it is this process that was held up, the other one has spoken by now
            if poll.poll(250):
                part, since = self._sock.recv(min(size - len(data), 1 << 20)), time.monotonic()
                if not part:
                    raise ConnectionResetError
                data += part
            elif asked - since > self.silence:
                raise TimeoutError(f"{self.name} has been silent for {self.silence:g} s")
        return data

    def _end(self, why: str, hang_up: bool = True) -> None:
        with self._ending:
            first, self.lost = self.lost is None, self.lost or why
        if not first:
            return
        if hang_up:
            self._shut()
        self.inbox.put(None)
        self._ended.set()
        if not self._closing:
            log.error("%s", why)
            self.on_lost(why)

    def _shut(self, how: int = socket.SHUT_RDWR) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:  # it is down already
            pass


# -- the key: HMAC over both sides' random numbers, each side's answer its own ---------------------------------------------


def admit(sock: socket.socket, key: bytes) -> int:
    """The leader's side of a handshake: the rank of who has the key. HandshakeError for anybody else."""
    deadline, mine = time.monotonic() + ADMISSION, os.urandom(NONCE)
    sock.settimeout(ADMISSION)
    sock.sendall(MAGIC + mine)
    said = _fixed(sock, len(MAGIC) + NONCE + _RANK.size + DIGEST, deadline)
    magic, theirs, rank = said[: len(MAGIC)], said[len(MAGIC) : len(MAGIC) + NONCE], said[-DIGEST - _RANK.size : -DIGEST]
    if magic != MAGIC or not hmac.compare_digest(said[-DIGEST:], _proof(key, b"follower", mine, theirs, rank)):
        raise HandshakeError("it does not have this engine's key")
    sock.sendall(_proof(key, b"leader", theirs, mine, rank))
    return _RANK.unpack(rank)[0]


def introduce(sock: socket.socket, key: bytes, rank: int) -> None:
    """The follower's side. HandshakeError if the other one does not have the key."""
    sock.settimeout(HANDSHAKE)
    deadline = time.monotonic() + HANDSHAKE
    hello, own = _fixed(sock, len(MAGIC) + NONCE, deadline), os.urandom(NONCE)
    if hello[: len(MAGIC)] != MAGIC:
        raise HandshakeError("it is not an engine's leader")
    theirs, packed = hello[len(MAGIC) :], _RANK.pack(rank)
    sock.sendall(MAGIC + own + packed + _proof(key, b"follower", theirs, own, packed))
    if not hmac.compare_digest(_fixed(sock, DIGEST, deadline), _proof(key, b"leader", own, theirs, packed)):
        raise HandshakeError("it does not have this engine's key")


def _proof(key: bytes, who: bytes, *said: bytes) -> bytes:
    return hmac.new(key, b"\0".join((who, *said)), hashlib.sha256).digest()


def _fixed(sock: socket.socket, size: int, deadline: float) -> bytes:
    """TimeoutError after the deadline, also if a byte comes now and then."""
    data = b""
    while len(data) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        part = sock.recv(size - len(data))
        if not part:
            raise HandshakeError("it hung up, as one does who is not let in: the keys differ (JAXPAGED_CLUSTER_KEY)")
        data += part
    return data
