"""The demo model on a Ray cluster of two nodes: it answers, prompts stay, clients leave, a replica is killed, all end well."""

import collections
import os
import re
import signal
import threading
import time

import httpx
import openai
import pytest
import ray
from live_server import wait_until
from ray import serve
from ray_cluster import URL, Load, num_running, replicas, serving

from jaxpaged.ray import serve_app

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STARTS = 240.0  # seconds: a replica that loads and compiles on a busy machine
DEMO = {"model": "demo", "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 32, "enforce_eager": True}
QUESTION = {"model": "demo", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8,
            "temperature": 0.0}  # fmt: skip
SAMPLE = re.compile(r'^jaxpaged:(\w+)\{replica="(\w+)",[^}]*\} (\S+)$', re.MULTILINE)


@pytest.fixture(scope="module")
def served():
    """The demo model, a replica on each node."""
    with serving() as cluster:
        application = serve_app(DEMO, min_replicas=2, max_replicas=2, num_cpus=0.8, health_check_period_s=1.0)
        serve.run(application, name="demo")
        yield cluster


def counted(name):
    """A counter of each replica."""
    found = [
        (replica, float(value)) for sample, replica, value in SAMPLE.findall(httpx.get(f"{URL}/metrics").text) if sample == name
    ]
    return collections.Counter(dict(found))


def load():
    return httpx.get(f"{URL}/load", timeout=30).json()["server_load"]


def test_openais_client_is_answered_by_two_nodes(served):
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
    whole = client.chat.completions.create(**QUESTION)
    assert "Paris" in whole.choices[0].message.content
    stream = client.chat.completions.create(**QUESTION, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and len([p for p in pieces if p]) > 1
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**{**QUESTION, "temperature": -1.0})
    nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert len(nodes) == 2 and len(replicas()) == 2 and num_running() == (2, 2)


def test_a_prompt_stays_with_its_replica(served):
    prefix = "A fox and a dog met in the forest, and the fox said: "
    for story in range(3):
        before = counted("prompt_tokens_total")
        for _ in range(4):
            body = {"model": "demo", "prompt": f"Story {story}. {prefix}", "max_tokens": 1}
            assert httpx.post(f"{URL}/v1/completions", json=body, timeout=60).status_code == 200
        grown = counted("prompt_tokens_total") - before
        assert len(grown) == 1, grown


def test_a_client_that_leaves_ends_its_request(served):
    before = counted("generation_tokens_total")
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    wait_until(lambda: load() == 0, "the request ends", 10)
    assert (counted("generation_tokens_total") - before).total() < 200


def test_the_kill_of_a_replica_fails_nothing_but_what_it_was_answering(served):
    load = Load(6)
    try:
        wait_until(lambda: len(load.done) >= 20, "requests are answered", 120)
        killed, at, ended = replicas()[0], time.monotonic(), len(load.done)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(load.done) >= ended + 30, lambda: f"requests go on: {load.failed}", 120)
        wait_until(lambda: num_running() == (2, 2) and killed not in replicas(), "another replica takes its place", STARTS)
        up, count = time.monotonic(), len(load.done)
        wait_until(lambda: len(load.done) >= count + 10, "requests go on", 120)
    finally:
        load.end()
    print(f"{len(load.done)} requests answered, {len(load.failed)} failed, replaced after {up - at:.1f} s")
    assert all(began < at for began, *_ in load.failed), load.failed  # in flight at the kill
    assert all(stream for _, _, stream, _ in load.failed), load.failed  # others were sent to the other replica
    assert len(load.failed) <= DEMO["max_num_seqs"]


def test_running_requests_end_before_the_application_does(served):
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 100, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{URL}/v1/completions", json=body, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        deleting = threading.Thread(target=serve.delete, args=("demo",))
        deleting.start()
        rest = list(lines)
    deleting.join()
    assert rest[-2] == "data: [DONE]"
    wait_until(lambda: not replicas(), "the replicas end", 30)
