"""The connection of leader and followers, over loopback and without devices: who is let in, what must be alike, who is lost."""

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeRunner
from live_server import wait_until
from scripted import scripted_engine
from server_process import tiny_model

from jaxpaged import channel, wire
from jaxpaged.async_engine import AsyncEngine, EngineDeadError
from jaxpaged.batch import ladder
from jaxpaged.channel import HandshakeError
from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.follower import Follower, connect
from jaxpaged.journal import Scheduled
from jaxpaged.leader import ClusterError, Leader, Shared
from jaxpaged.nodes import Nodes, Place, place
from jaxpaged.request import RequestError, SamplingParams
from jaxpaged.scheduler import Limits

KEY = b"a key"
LIMITS = Limits(max_num_seqs=4, max_num_batched_tokens=16, page_size=4, num_pages=40, max_model_len=64, vocab_size=50)
BUCKETS = ladder(16, 4)


class Cluster:
    """A leader, and the port where it listens. lost: why it has lost somebody."""

    def __init__(self, size: int):
        self.lost: list[str] = []
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self.leader = Leader(sock, KEY, size, self.lost.append)
        self.followers: list[Follower] = []

    def follower(self, rank: int, key: bytes = KEY, lost=lambda why: None) -> Follower:
        self.followers.append(Follower(connect("127.0.0.1", self.port, 5), key, rank, lost))
        return self.followers[-1]

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 5)


@contextlib.contextmanager
def listening(size: int = 2):
    """A leader that waits for its followers in a thread of its own, whose result the future has."""
    cluster = Cluster(size)
    with ThreadPoolExecutor(1) as pool:
        cluster.gathered = pool.submit(cluster.leader.gather, 20)
        try:
            yield cluster
        finally:
            for one in cluster.followers:
                one.channel.close()
            cluster.leader.close()
            with contextlib.suppress(ClusterError, OSError):
                cluster.gathered.result()


@contextlib.contextmanager
def connected(size: int = 2):
    with listening(size) as cluster:
        for rank in range(1, size):
            cluster.follower(rank)
        cluster.gathered.result()
        yield cluster


def both(*calls):
    """Runs them at the same time; what each returns or raises."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.exception() or future.result() for future in futures]


# -- who is let in -----------------------------------------------------------------------------------------------------------


def test_who_has_the_key_is_let_in_and_others_are_not(caplog):
    with listening() as cluster:
        with pytest.raises(HandshakeError, match="the keys differ"):
            cluster.follower(1, b"another key")
        cluster.follower(1)
        cluster.gathered.result()
        assert [*cluster.leader.channels] == [1]
    assert "127.0.0.1 is not let in: it does not have this engine's key" in caplog.text


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n" * 10, b"\0" * 200, b"jaxpaged" + b"\xff" * 68, b""])
def test_strangers_are_sent_away_and_the_followers_still_come(said):
    with listening() as cluster:
        with cluster.raw() as stranger, contextlib.suppress(OSError):
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1000):
                pass
        cluster.follower(1)
        cluster.gathered.result()


def test_a_leader_without_the_key_is_not_followed():
    with socket.create_server(("127.0.0.1", 0)) as sock, ThreadPoolExecutor(1) as pool:
        coming = pool.submit(lambda: Follower(connect("127.0.0.1", sock.getsockname()[1], 5), KEY, 1))
        liar, _ = sock.accept()
        with liar:
            liar.sendall(b"jaxpaged" + os.urandom(32))
            liar.recv(1000)
            liar.sendall(os.urandom(32))
            with pytest.raises(HandshakeError, match="does not have this engine's key"):
                coming.result()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_rank_that_is_there_or_does_not_exist_is_not_let_in(rank, caplog):
    with listening(3) as cluster:
        cluster.follower(1)
        stranger = cluster.follower(rank)  # it has the key: only the rank is wrong
        assert stranger.channel.why_lost(5)
        cluster.follower(2)
        cluster.gathered.result()
    assert f"rank {rank} is not awaited" in caplog.text


def test_followers_that_do_not_come_are_named():
    cluster = Cluster(3)
    with pytest.raises(ClusterError, match=r"ranks \[1, 2\] of 3 have not come in 0.1 s"):
        cluster.leader.gather(0.1)
    cluster.leader.close()


# -- what must be alike ------------------------------------------------------------------------------------------------------


def test_facts_that_differ_are_named_on_both_sides_with_both_values():
    with connected(3) as cluster:
        one, two = cluster.followers
        facts = {"jax": "0.10.2", "devices": "8 x NVIDIA H200"}
        results = both(lambda: cluster.leader.agree(facts), lambda: one.agree(facts),
                       lambda: two.agree(facts | {"jax": "0.11.0", "devices": "4 x NVIDIA H200"}))  # fmt: skip
        leader, alike, other = results
        for error in leader, other:
            assert isinstance(error, RequestError)
            assert "jax is 0.10.2 on rank 0 and 0.11.0 on rank 2" in str(error)
            assert "devices is 8 x NVIDIA H200 on rank 0 and 4 x NVIDIA H200 on rank 2" in str(error)
        assert alike is None


def test_all_get_the_least_of_what_all_say():
    with connected(3) as cluster:
        one, two = cluster.followers
        calls = lambda *values: [
            lambda: cluster.leader.least(values[0]),
            lambda: one.least(values[1]),
            lambda: two.least(values[2]),
        ]
        assert both(*calls(5, 3, 4)) == [3] * 3
        assert both(*calls(-7, 2**40, 0)) == [-7] * 3


# -- who is lost ---------------------------------------------------------------------------------------------------------------


def test_a_follower_that_hangs_up_is_lost_at_once_and_the_others_hear_of_it():
    with connected(3) as cluster:
        gone, other = cluster.followers
        gone.channel._sock.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: cluster.lost == ["rank 1 has gone"], lambda: f"the loss: {cluster.lost}")
        with pytest.raises(ConnectionError, match="rank 0 ends: rank 1 has gone"):
            other.channel.receive()
        with pytest.raises(ClusterError, match="rank 1 has gone"):
            cluster.leader.journal(Scheduled())


def test_a_leader_that_hangs_up_is_lost_at_once():
    lost = []
    with listening() as cluster:
        follower = cluster.follower(1, lost=lost.append)
        cluster.gathered.result()
        cluster.leader.close()
        assert follower.channel.why_lost(5) == "rank 0 has gone"
        wait_until(lambda: lost == ["rank 0 has gone"], lambda: f"the loss: {lost}")


def silent(cluster: Cluster) -> socket.socket:
    """A follower that is let in and then says what a test wants."""
    sock = cluster.raw()
    channel.introduce(sock, KEY, 1)
    cluster.gathered.result()
    return sock


def test_who_is_silent_is_lost_and_who_beats_is_not():
    with listening() as cluster, silent(cluster) as sock:
        cluster.leader.channels[1].silence = 1.6 * channel.BEAT
        assert cluster.leader.why_lost(5) == "rank 1 has been silent for 1.6 s"
        assert sock.recv(1000), "it has been spoken to meanwhile"
    with connected() as cluster:
        cluster.leader.channels[1].silence = 2.5 * channel.BEAT
        assert cluster.leader.why_lost(4 * channel.BEAT) is None


def test_who_was_held_up_itself_does_not_say_that_the_other_one_was_silent(monkeypatch):
    """As if this process had been stopped between looking and asking the clock: what has come meanwhile counts."""
    real, held = channel.select.poll, threading.Event()

    class Held:
        def __init__(self):
            self._poll = real()

        def register(self, *of):
            self._poll.register(*of)

        def poll(self, timeout):
            found = self._poll.poll(timeout)
            if not found and not held.is_set():
                held.set()
                time.sleep(2.5 * channel.BEAT)
            return found

    monkeypatch.setattr(channel.select, "poll", Held)
    with connected() as cluster:
        for one in (cluster.leader.channels[1], cluster.followers[0].channel):
            one.silence = 2 * channel.BEAT
        assert cluster.leader.why_lost(5 * channel.BEAT) is None and held.is_set()


def test_silent_strangers_do_not_keep_the_followers_out(monkeypatch):
    monkeypatch.setattr(channel, "ADMISSION", 0.2)
    with listening() as cluster:
        strangers = [cluster.raw() for _ in range(3)]
        began = time.monotonic()
        cluster.follower(1)
        cluster.gathered.result()
        assert time.monotonic() - began < 3
        for one in strangers:
            one.close()


@pytest.mark.parametrize("said, why", [
    (struct.pack("<Q", 2**40), "a message of 1099511627776 bytes"),
    (struct.pack("<Q", 4) + b"\xffabc", "4 bytes are not a message"),
    (struct.pack("<Q", 0), "0 bytes are not a message"),
])  # fmt: skip
def test_what_nobody_understands_is_the_end(said, why):
    with listening() as cluster, silent(cluster) as sock:
        sock.sendall(said)
        lost = cluster.leader.why_lost(5)
        assert lost and why in lost and lost.startswith("rank 1 sends what nobody understands")


def test_who_does_not_read_is_lost_and_nothing_piles_up():
    with listening() as cluster, silent(cluster):
        message = wire.encode(wire.Facts({"x": "y" * 1_000_000}))
        with pytest.raises(ConnectionError, match=f"rank 1 is {channel.MAX_UNSENT} messages behind"):
            for _ in range(2 * channel.MAX_UNSENT):
                cluster.leader.channels[1].send_bytes(message)


def test_a_follower_says_why_it_ends():
    with connected() as cluster:
        cluster.followers[0].fail("ValueError: no such file")
        assert cluster.leader.why_lost(5) == "rank 1 ends: ValueError: no such file"


# -- steps ---------------------------------------------------------------------------------------------------------------------


def submit(engine: Engine, count: int) -> None:
    for i in range(count):
        engine.submit(str(i), [1, 2, i], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))


def test_followers_take_the_steps_of_an_engine_and_end_with_it():
    with connected(3) as cluster, ThreadPoolExecutor(2) as pool:
        runners = [FakeRunner(LIMITS), FakeRunner(LIMITS)]
        ends = [pool.submit(one.run, LIMITS, BUCKETS, runner) for one, runner in zip(cluster.followers, runners)]
        mine = FakeRunner(LIMITS)
        engine = Engine(LIMITS, Shared(mine, cluster.leader), BUCKETS)
        engine.journal = cluster.leader.journal
        cluster.leader.watch()
        submit(engine, 7)
        while engine.has_work:
            engine.step()
        engine.close()
        stopping = threading.Thread(target=cluster.leader.stop)
        stopping.start()
        assert [end.result(10) for end in ends] == [None, None]
        for one in cluster.followers:
            one.channel.close()
        stopping.join(10)
        assert all(np.array_equal(runner.cache, mine.cache) and runner.closed for runner in runners)
        assert cluster.lost == [] and cluster.leader.num_steps >= engine.counters.steps > 20


def test_a_step_that_fails_on_a_follower_ends_the_engine():
    with connected() as cluster, ThreadPoolExecutor(1) as pool:
        follower = cluster.followers[0]

        def follow() -> None:
            try:
                follower.run(LIMITS, BUCKETS, FakeRunner(LIMITS, fail_at=frozenset({3})))
            except RuntimeError as error:
                follower.fail(str(error))

        end = pool.submit(follow)
        engine = Engine(LIMITS, Shared(FakeRunner(LIMITS, step_seconds=0.2), cluster.leader), BUCKETS)
        engine.journal = cluster.leader.journal
        submit(engine, 2)
        with pytest.raises(ClusterError, match="rank 1 ends: out of paper"):
            while engine.has_work:
                engine.step()
        end.result()


def test_a_step_that_fails_on_the_leader_is_not_tried_again():
    with connected() as cluster:
        engine = Engine(LIMITS, Shared(FakeRunner(LIMITS, fail_at=frozenset({2})), cluster.leader), BUCKETS)
        submit(engine, 1)
        with pytest.raises(ClusterError, match="other processes cannot take it again"):
            while engine.has_work:
                engine.step()


def test_an_engine_that_hangs_in_a_step_can_be_ended():
    """As it is when a device waits for one that has gone."""
    engine, hang = scripted_engine("Hello!"), threading.Event()
    collect = engine.runner.collect
    engine.runner.collect = lambda handle: (hang.wait(), collect(handle))[1]

    async def run() -> tuple[str, float]:
        deaths = []
        outer = AsyncEngine(engine, on_death=deaths.append)
        outer.start()
        stream = outer.submit("a", [1, 2], SamplingParams())
        await asyncio.sleep(0)
        threading.Thread(target=outer.end, args=(ClusterError("rank 1 has gone"),)).start()
        with pytest.raises(EngineDeadError) as caught:
            async with asyncio.timeout(10):
                await stream.last()
        began = time.monotonic()
        await outer.close()
        assert [str(error) for error in deaths] == ["rank 1 has gone"]
        with pytest.raises(EngineDeadError, match="rank 1 has gone"):
            outer.submit("b", [1, 2], SamplingParams())
        took = time.monotonic() - began
        hang.set()
        outer._thread.join(10)
        return str(caught.value), took

    message, took = asyncio.run(run())
    assert "rank 1 has gone" in message and took < 3


# -- flags -------------------------------------------------------------------------------------------------------------------

SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("flags, environment, expected", [
    ({}, {}, None),
    ({"nnodes": 1}, {}, None),
    ({"nnodes": 1, "node_rank": 0}, {}, None),
    ({"nnodes": 2, "node_rank": 1, "coordinator": "a:1"}, {}, Place(2, 1, "a:1", 600)),
    ({"nnodes": 2, "node_rank": 1, "coordinator": "a"}, {}, Place(2, 1, "a:8476", 600)),
    ({"nnodes": 2, "node_rank": 1, "coordinator": "[::1]"}, {}, Place(2, 1, "[::1]:8476", 600)),
    ({"nnodes": 2, "node_rank": 1, "coordinator": "[::1]:99"}, {}, Place(2, 1, "[::1]:99", 600)),
    ({"nnodes": 2, "node_rank": 0, "master_addr": "a", "master_port": 29501}, {}, Place(2, 0, "a:29501", 600)),
    ({"nnodes": "auto"}, {}, Place(None, None, None, 600)),
    ({}, SLURM, Place(None, None, None, 600)),
    ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, Place(None, None, None, 600)),
    ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
    ({}, {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "batch", "SLURM_STEP_NUM_TASKS": "4"}, None),  # a batch script is one process
    ({"nnodes": 1}, SLURM, None),
])  # fmt: skip
def test_flags_and_launchers_say_where_a_process_stands(flags, environment, expected):
    assert place(Nodes(**flags), environment) == expected


@pytest.mark.parametrize("flags, message", [
    ({"nnodes": 0}, 'nnodes must be a number of processes >= 1 or "auto", got 0'),
    ({"nnodes": "two"}, "got 'two'"),
    ({"node_rank": 1}, "nnodes must be"),
    ({"nnodes": 2}, "node_rank must be a number from 0 to 1, of nnodes=2; got None"),
    ({"nnodes": 2, "node_rank": 2, "coordinator": "a:1"}, "got 2"),
    ({"nnodes": 2, "node_rank": 0}, "needs coordinator=HOST:PORT"),
    ({"nnodes": 2, "node_rank": 0, "coordinator": "a:b"}, "coordinator must be HOST:PORT"),
    ({"nnodes": 2, "node_rank": 0, "coordinator": ":1"}, "coordinator must be HOST:PORT"),
    ({"nnodes": 2, "node_rank": 0, "coordinator": "a:1", "master_addr": "a"}, "not both"),
])  # fmt: skip
def test_flags_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        place(Nodes(**flags), {})


def test_sizes_must_be_all_devices_of_all_processes():
    from jaxpaged.cluster import over_all

    config = EngineConfig()
    assert (
        over_all(config, 8, 2).tensor_parallel_size
        == over_all(config.replace(tensor_parallel_size=8), 8, 2).tensor_parallel_size
    )
    for changes, message in [({"tensor_parallel_size": 4}, "2 processes have 8 devices in all; leave it out or say 8"),
                             ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is for one process"),
                             ({"data_parallel_size": 2}, "data_parallel_size=2 is for one process")]:  # fmt: skip
        with pytest.raises(RequestError, match=message):
            over_all(replace(config, **changes), 8, 2)


def test_pages_are_the_least_of_all_and_other_weights_are_told_apart(tmp_path):
    from jaxpaged.build import build_engine
    from jaxpaged.cluster import facts_of_build

    tiny = EngineConfig(model=str(tiny_model(tmp_path)), load_format="dummy", enforce_eager=True, max_num_seqs=4,
                        max_num_batched_tokens=32, max_model_len=256)  # fmt: skip
    facts = []
    for seed in 0, 1:
        built = build_engine(tiny.replace(seed=seed), progress=False, least=lambda value: min(value, 40))
        assert built.engine.limits.num_pages == built.runner.dims.num_pages == built.plan.num_pages == 40
        facts.append(facts_of_build(built))
        built.engine.close()
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"seed", "weights"}
