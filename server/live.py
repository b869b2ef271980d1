"""The live view's feed: whose pages are whose, who runs and who waits, how fast it goes.

`snapshot` looks at an engine's state, in the engine's thread; `side_by_side` makes one of several engines'. A `Feed` takes one
for all viewers at once, as long as there is a viewer, and hands it out as server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncGenerator
from itertools import islice
from typing import Protocol

import msgspec
import numpy as np

from jaxpaged.async_engine import EngineDeadError
from jaxpaged.engine import Engine
from jaxpaged.pages import NULL_PAGE
from jaxpaged.replicas import FrontDoor
from jaxpaged.state import Limits, State, Waiting
from jaxpaged_server import sse

FREE, SHARED, CACHED = 0, 0x8000, 0xFFFF  # codes of a page; between them: slot + 1, SHARED + number of the group
MAX_LISTED = 200  # running, and waiting, requests that are described one by one
BUSY_SECONDS, IDLE_SECONDS = 0.25, 2.0  # between frames: while something changes, and while nothing does


class Meter(Protocol):
    """Where the speeds come from."""

    def latencies(self) -> dict[str, dict[str, float | None]]:
        """Seconds: {"ttft": {"p50", "p90", "p99"}, "itl": the same}; None while there is nothing to measure."""
        ...

    def throughput(self) -> dict[str, float]:
        """Tokens per second: {"prompt", "generation"}."""
        ...


class Sequence(msgspec.Struct):
    """One sequence (a request with n samples has n). `state`: prefill, decode; waiting, preempted (in the queue: no slot)."""

    id: str
    state: str
    slot: int | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    pages: int


class PageCounts(msgspec.Struct):
    """total = free + held + cached; `shared` are those of the held that several sequences hold. page_size in tokens."""

    total: int
    free: int
    held: int
    shared: int
    cached: int
    page_size: int


class Snapshot(msgspec.Struct):
    """`map`: a code of two bytes, little-endian, for each page from 1 on (page 0, the null page, is nobody's): FREE, CACHED,
    slot + 1, or SHARED + i: held by all slots of `groups[i]`. At most MAX_LISTED sequences are in `running`, `waiting`. Of
    several engines pages and slots follow each other, those of the first engine first."""

    pages: PageCounts
    num_running: int
    num_waiting: int
    running: list[Sequence]
    waiting: list[Sequence]
    groups: list[list[int]]
    map: bytes


class Frame(msgspec.Struct):
    """What a viewer gets. `at`: seconds, on a clock of its own. The snapshot's map is compressed here (zlib)."""

    at: float
    throughput: dict[str, float]
    latencies: dict[str, dict[str, float | None]]
    snapshot: Snapshot


def snapshot(engine: Engine) -> Snapshot:
    """What the engine's state says now; for `AsyncEngine.call`, as only the engine's thread may read it."""
    state = engine.state
    pool, slots = state.pool, np.flatnonzero(state.seats.active)
    codes, groups = page_map(state, slots)
    counts = PageCounts(
        total=pool.num_pages - 1, free=pool.num_free - pool.num_cached, held=pool.num_held,
        shared=int(np.count_nonzero(pool.refs.read() > 1)), cached=pool.num_cached, page_size=pool.page_size,
    )  # fmt: skip
    running = _running(engine, slots[:MAX_LISTED])
    waiting = [_in_queue(entry) for entry in islice(state.waiting.read().values(), MAX_LISTED)]
    return Snapshot(counts, len(slots), len(state.waiting), running, waiting, groups, codes[NULL_PAGE + 1 :].tobytes())


def side_by_side(snapshots: list[Snapshot], max_num_seqs: int) -> Snapshot:
    """Engines with `max_num_seqs` slots each, as if they were one."""
    if len(snapshots) == 1:
        return snapshots[0]
    shifted = [_shifted(one, i * max_num_seqs, sum(len(s.groups) for s in snapshots[:i])) for i, one in enumerate(snapshots)]
    joined = lambda name: [item for one in shifted for item in getattr(one, name)]
    counts = [msgspec.structs.asdict(one.pages) for one in shifted]
    added = {name: sum(one[name] for one in counts) for name in counts[0]}
    pages = PageCounts(**{**added, "page_size": counts[0]["page_size"]})
    return Snapshot(pages, sum(s.num_running for s in shifted), sum(s.num_waiting for s in shifted),
                    joined("running")[:MAX_LISTED], joined("waiting")[:MAX_LISTED], joined("groups"),
                    b"".join(s.map for s in shifted))  # fmt: skip


def _shifted(taken: Snapshot, slots: int, groups: int) -> Snapshot:
    """The same with higher numbers for its slots and its groups."""
    codes = np.frombuffer(taken.map, np.uint16).copy()
    shared = (codes >= SHARED) & (codes != CACHED)
    codes[shared] += groups
    codes[(codes != FREE) & (codes < SHARED)] += slots
    running = [msgspec.structs.replace(s, slot=None if s.slot is None else s.slot + slots) for s in taken.running]
    moved = [[slot + slots for slot in members] for members in taken.groups]
    return msgspec.structs.replace(taken, running=running, groups=moved, map=codes.tobytes())


def page_map(state: State, slots: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """The code of every page (uint16 [P]) and the groups of slots that share pages. `slots`: those in use."""
    pool = state.pool
    slot, page = _holdings(state, slots)
    codes = np.where(pool.stamp.read() >= 0, np.uint16(CACHED), np.uint16(FREE))
    codes[page] = (slot + 1).astype(np.uint16)
    (shared,) = np.nonzero(pool.refs.read() > 1)
    group_of, examples = _group(slot, page, shared, state.limits)
    codes[shared] = SHARED + group_of
    return codes, _members(slot, page, codes, examples)


def _holdings(state: State, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slot, page) of every place in use of the page table, slot by slot."""
    table, (groups, M) = state.page_table.read(), (len(state.limits.reaches), state.limits.max_pages_per_seq)
    first = state.seats.dropped[slots].astype(np.int64).reshape(-1)
    num_held = np.repeat(state.seats.num_pages[slots], groups) - first
    ends = np.cumsum(num_held)
    begin = (slots[:, None] * groups + np.arange(groups)).reshape(-1) * M + first
    offset = begin - (ends - num_held)  # flat indices: half the time of `spread` and two of them
    places = np.repeat(offset, num_held) + np.arange(num_held.sum())
    return np.repeat(np.repeat(slots, groups), num_held), table.reshape(-1)[places].astype(np.int64)


def _group(slot: np.ndarray, page: np.ndarray, shared: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Pages with the same holders are a group: the number of each shared page's group, and one page of each group. Sets are
    told apart by the sum of their members' random marks: comparing them one by one would take a loop."""
    marks = np.random.default_rng(0).integers(2**63, size=limits.max_num_seqs, dtype=np.uint64)
    sums = np.zeros(limits.num_pages, np.uint64)
    np.add.at(sums, page, marks[slot])
    _, first, group_of = np.unique(sums[shared], return_index=True, return_inverse=True)
    return group_of, shared[first]


def _members(slot: np.ndarray, page: np.ndarray, codes: np.ndarray, examples: np.ndarray) -> list[list[int]]:
    """The holders of each of `examples`, pages of group 0, 1, ..."""
    if not len(examples):
        return []
    wanted = np.zeros(len(codes), bool)
    wanted[examples] = True
    (found,) = wanted[page].nonzero()
    group = codes[page[found]] - SHARED
    ends = np.cumsum(np.bincount(group))
    by_group = found[np.argsort(group, kind="stable")]
    return [members.tolist() for members in np.split(slot[by_group], ends[:-1])]


def _running(engine: Engine, slots: np.ndarray) -> list[Sequence]:
    seats, requests = engine.state.seats, engine.state.requests.read()[slots].tolist()
    columns = (seats.num_prompt, seats.num_known, seats.num_computed, seats.num_pages)
    rows = zip(requests, slots.tolist(), *(column[slots].tolist() for column in columns))
    return [
        Sequence(request.id, "decode" if computed >= prompt else "prefill", slot, prompt, known - prompt,
                 engine.num_cached_tokens(request.id), num_pages)
        for request, slot, prompt, known, computed, num_pages in rows
    ]  # fmt: skip


def _in_queue(entry: Waiting) -> Sequence:
    prompt, state = len(entry.request.prompt), "preempted" if entry.preempted else "waiting"
    return Sequence(entry.request.id, state, None, prompt, len(entry.tokens) - prompt, 0, 0)


Mailbox = asyncio.Queue[bytes | None]


class Feed:
    """Snapshots for whoever watches: one ticker, which runs as long as there are viewers. Belongs to the event loop."""

    def __init__(self, engine: FrontDoor, meter: Meter):
        self.engine, self.meter = engine, meter
        self._viewers: set[Mailbox] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._newest: bytes | None = None

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, until the engine stops or takes no more requests. A slow viewer misses some."""
        mailbox = self._join()
        try:
            while (event := await mailbox.get()) is not None:
                yield event
        finally:
            self._leave(mailbox)

    def _join(self) -> Mailbox:
        mailbox = Mailbox(1)
        self._viewers.add(mailbox)
        if self._ticker is None or self._ticker.done():
            self._ticker = asyncio.create_task(self._tick())
        elif self._newest is not None:
            _put(mailbox, self._newest)
        return mailbox

    def _leave(self, mailbox: Mailbox) -> None:
        self._viewers.discard(mailbox)
        if not self._viewers and self._ticker is not None:
            self._ticker.cancel()
            self._ticker = None

    async def _tick(self) -> None:
        self._newest = None
        try:
            with contextlib.suppress(EngineDeadError):
                await self._tell()
        finally:
            if asyncio.current_task() is self._ticker:  # else it was cancelled for want of viewers, and they are another's
                for mailbox in self._viewers:
                    _put(mailbox, None)

    async def _tell(self) -> None:
        """A frame whenever something has changed, and every IDLE_SECONDS. A server that drains must not wait for viewers."""
        clock = asyncio.get_running_loop().time
        last, told_at = None, 0.0
        while not self.engine.draining:
            taken = await self._take()
            if taken != last or clock() - told_at >= IDLE_SECONDS:
                last, told_at = taken, clock()
                self._newest = event(Frame(told_at, self.meter.throughput(), self.meter.latencies(), taken))
                for mailbox in self._viewers:
                    _put(mailbox, self._newest)
            await asyncio.sleep(BUSY_SECONDS)

    async def _take(self) -> Snapshot:
        taken = await asyncio.gather(*(one.call(snapshot) for one in self.engine.engines))
        return side_by_side(taken, self.engine.engine.limits.max_num_seqs)


def event(frame: Frame) -> bytes:
    """A frame as a server-sent event: JSON, its map compressed and in base64."""
    taken = msgspec.structs.replace(frame.snapshot, map=zlib.compress(frame.snapshot.map, 1))
    return sse.event(msgspec.structs.replace(frame, snapshot=taken))


def _put(mailbox: Mailbox, item: bytes | None) -> None:
    """Into a box for one: what has not been read yet is no longer news."""
    if mailbox.full():
        mailbox.get_nowait()
    mailbox.put_nowait(item)
