"""Real processes over loopback: one model on several hosts, as far as one machine can show it. Slow."""

import json
import signal
import socket
import threading

import httpx2 as httpx
import pytest
from engine_processes import free_port, ranks
from live_server import wait_until
from server_process import TINY, running, started, tiny_model
from server_process import jaxpaged as command

DEMO = ("demo-gemma3", "--max-model-len", "256", "--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--enforce-eager")
LIMIT = 10.0  # seconds from a death to the end of every process
pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path):
    return (str(tiny_model(tmp_path)), *TINY, "--max-model-len", "500")


def complete(base_url: str, prompt, **more) -> dict:
    body = {"model": more.pop("model", "demo-gemma3"), "prompt": prompt, "temperature": 0, "max_tokens": 12, **more}
    answer = httpx.post(f"{base_url}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


PROMPTS = ["The capital of France is", "The capital of France is Paris, and the capital of Italy is"]


@pytest.fixture(scope="module")
def alone():
    """What one process answers."""
    with running(command("serve", *DEMO)) as server:
        return [complete(server.base_url, prompt, logprobs=2) for prompt in PROMPTS]


@pytest.mark.parametrize("size", [2, 4])
def test_the_demo_model_in_several_processes_answers_as_in_one_and_all_end_together(size, alone, capsys):
    with ranks(size, DEMO) as engine:
        engine.wait_until_up()
        for prompt, expected in zip(PROMPTS, alone):
            answer = complete(engine.base_url, prompt, logprobs=2)
            assert answer["text"] == expected["text"]
            assert answer["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
            assert answer["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"]["token_logprobs"], abs=1e-4)
        engine.send_signal(0, signal.SIGTERM)
        statuses, seconds = engine.wait_for_end(30)
        assert statuses == [0] * size, engine.logs
        assert all("rank 0 has stopped" in one.log for one in engine.processes[1:])
        with capsys.disabled():
            print(f"\n{size} processes end together in {seconds:.1f} s; {engine.processes[0].log.splitlines()[-1]}")


class Reader(threading.Thread):
    """Reads a stream that goes on until something happens."""

    def __init__(self, base_url: str, model: str):
        super().__init__()
        self.base_url, self.model = base_url, model
        self.lines: list[str] = []
        self.began, self.error = threading.Event(), None

    def run(self) -> None:
        body = {
            "model": self.model,
            "prompt": [5, 6, 7],
            "max_tokens": 450,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            with httpx.stream("POST", f"{self.base_url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
                for line in answer.iter_lines():
                    self.lines.append(line)
                    self.began.set()
        except httpx.HTTPError as error:
            self.error = error
        self.began.set()


DEATHS = [(2, 1, signal.SIGKILL), (2, 0, signal.SIGKILL), (2, 1, signal.SIGSTOP), (2, 0, signal.SIGSTOP),
          (2, 1, signal.SIGTERM), (4, 2, signal.SIGKILL)]  # fmt: skip


@pytest.mark.parametrize("size, rank, number", DEATHS, ids=lambda x: getattr(x, "name", str(x)))
def test_the_death_of_one_is_soon_the_end_of_all_and_a_new_start_serves(size, rank, number, tiny, capsys):
    """A stopped process stands for a host that cannot be reached."""
    with ranks(size, tiny) as engine:
        engine.wait_until_up()
        reader = Reader(engine.base_url, tiny[0])
        reader.start()
        assert reader.began.wait(60) and reader.lines, engine.logs
        engine.send_signal(rank, number)
        stopped = [rank] if number == signal.SIGSTOP else []
        statuses, seconds = engine.wait_for_end(LIMIT, stopped)
        with capsys.disabled():
            print(f"\n{number.name} of rank {rank} of {size}: all ended after {seconds:.1f} s, statuses {statuses}")
        assert all(status != 0 for status in statuses), engine.logs
        if rank:
            reader.join(5)
            event = next(json.loads(line[6:]) for line in reader.lines if "error" in line)
            assert f"rank {rank} " in event["error"]["message"], event
            assert statuses[0] == 1
    reader.join(10)
    assert not reader.is_alive()
    with ranks(size, tiny) as engine:
        engine.wait_until_up()
        assert len(complete(engine.base_url, [5, 6, 7], model=tiny[0])["text"]) > 0


@pytest.mark.parametrize("per_node", ["1(x2)", "2"])
def test_a_launcher_says_who_they_are(per_node, tiny):
    """As `srun` starts them; the flags say nothing."""
    step = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_LOCALID": "0",
            "JAX_COORDINATOR_PORT": str(free_port())}  # fmt: skip
    with ranks(2, tiny, environments={rank: step | {"SLURM_PROCID": str(rank)} for rank in (0, 1)}, launched=True) as engine:
        engine.wait_until_up()
        assert len(complete(engine.base_url, [5, 6, 7], model=tiny[0])["text"]) > 0
        assert "rank 1 of 2" in engine.processes[1].log


def test_a_death_while_nothing_is_asked_is_noticed_too(tiny):
    with ranks(2, tiny) as engine:
        engine.wait_until_up()
        engine.send_signal(1, signal.SIGKILL)
        statuses, _ = engine.wait_for_end(LIMIT)
        assert statuses[0] == 1 and "rank 1 has gone" in engine.processes[0].log


REFUSED = [
    ({"own": {1: ("--max-num-seqs", "8")}}, "max_num_seqs is 4 on rank 0 and 8 on rank 1"),
    ({"devices": {0: 2, 1: 1}}, "devices is 2 x cpu on rank 0 and 1 x cpu on rank 1"),
    ({"own": {0: ("--tensor-parallel-size", "4"), 1: ("--tensor-parallel-size", "4")}},
     "tensor_parallel_size=4, but 2 processes have 2 devices in all; leave it out or say 2"),
    ({"own": {0: ("--pipeline-parallel-size", "2"), 1: ("--pipeline-parallel-size", "2")}}, "pipeline_parallel_size=2 is for"),
    ({"own": {1: ("--seed", "7")}}, "seed is 0 on rank 0 and 7 on rank 1"),
]  # fmt: skip


@pytest.mark.parametrize("more, message", REFUSED, ids=["config", "devices", "size", "pipeline", "seed"])
def test_processes_that_do_not_fit_together_are_refused_by_all(more, message, tiny):
    with ranks(2, tiny, **more) as engine:
        statuses, _ = engine.wait_for_end(120)
        assert statuses == [2, 2], engine.logs
        assert all(message in one.log for one in engine.processes), engine.logs


def test_another_version_is_refused_by_both(tiny, tmp_path):
    """sitecustomize makes one rank believe that it is another version."""
    lie = (
        "import importlib.metadata as m\nreal = m.version\nm.version = lambda name: LIE if name == 'jaxpaged' else real(name)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(lie.replace("LIE", "'9.9.9'"))
    with ranks(2, tiny, environments={1: {"PYTHONPATH": str(tmp_path)}}) as engine:
        statuses, _ = engine.wait_for_end(120)
        assert statuses == [2, 2], engine.logs
        assert all("and 9.9.9 on rank 1" in one.log for one in engine.processes), engine.logs


def test_a_second_process_with_a_rank_that_is_there_harms_nobody(tiny):
    with ranks(2, tiny) as engine:
        engine.wait_until_up()
        with started(engine.commands[1] + ["--distributed-timeout-seconds", "5"]) as intruder:
            assert intruder.wait() == 1 and "rank 0 cannot be reached" in intruder.log
        assert complete(engine.base_url, [1, 2], model=tiny[0])["finish_reason"] == "length"
        engine.send_signal(0, signal.SIGTERM)
        assert engine.wait_for_end(30)[0] == [0, 0], engine.logs


def test_ctrl_c_in_a_terminal_that_all_share_lets_requests_end(tiny):
    with ranks(2, tiny) as engine:
        engine.wait_until_up()
        reader = Reader(engine.base_url, tiny[0])
        reader.start()
        reader.began.wait(60)
        for rank in (1, 0):
            engine.send_signal(rank, signal.SIGINT)
        assert engine.wait_for_end(60)[0] == [0, 0], engine.logs
        reader.join(10)


def test_a_port_of_the_coordinator_in_use_is_said(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with started(command("serve", *tiny, "--nnodes", "2", "--node-rank", "0", "--coordinator", address)) as rank:
            assert rank.wait() == 2 and "Address already in use; use another port, the same on all" in rank.log


def test_ctrl_c_ends_who_waits_for_the_others(tiny):
    with started(command("serve", *tiny, "--nnodes", "2", "--node-rank", "0", "--coordinator",
                         f"127.0.0.1:{free_port()}")) as rank:  # fmt: skip
        wait_until(lambda: "recoverable" in rank.log, lambda: rank.log, 60)  # JAX waits
        assert "rank 0 of 2: waiting for the others, at most 600 s" in rank.log
        rank.signal(signal.SIGINT)
        assert rank.wait() == -signal.SIGINT


def test_a_follower_says_why_it_ends_when_rank_0_ends_while_it_builds(tiny, tmp_path):
    with ranks(2, tiny, own={0: ("--uds", str(tmp_path / "no such folder" / "socket"))}) as engine:
        assert engine.wait_for_end(60)[0][1] == 1 and engine.statuses()[0] in (1, 2), engine.logs
        assert "rank 0 ends: " in engine.processes[1].log and "no such folder" in engine.processes[1].log
