"""jaxpaged.ray on a Ray cluster of two nodes: replicas come and go, an engine dies, a job is killed and goes on."""

import contextlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from live_server import wait_until
from ray import serve
from ray_cluster import URL, WORKER, Load, num_running, replicas, serving, two_nodes
from scripted import echo, scripted_service
from server_process import tiny_model

from jaxpaged import LLM
from jaxpaged.config import EngineConfig
from jaxpaged.ray import Sizes
from jaxpaged.ray.serving import application
from jaxpaged_server.options import ServerOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STARTS = 240.0  # seconds: a replica that loads and compiles on a busy machine


def scripted_app(reply, **sizes):
    """The application around engines without a model, which are up within a second. A step takes 20 ms."""
    options = ServerOptions(shutdown_timeout=60)
    made = Sizes(num_cpus=0.8, health_check_period_s=1.0, **sizes)
    return application(partial(scripted_service, reply, seconds=0.02), EngineConfig(max_num_seqs=8), options, made)


def test_replicas_come_with_requests_and_go_without_failing_any():
    with serving():
        serve.run(scripted_app("word " * 40, min_replicas=1, max_replicas=2, target_ongoing_requests=1, upscale_delay_s=1,
                               downscale_delay_s=2), name="demo")  # fmt: skip
        assert num_running() == (1, 1)
        load = Load(4, model="scripted")
        try:
            wait_until(lambda: num_running()[0] == 2, "a replica is added", 60)
        finally:
            load.end()
        few = Load(1, model="scripted")
        try:
            wait_until(lambda: num_running() == (1, 1), "it is taken away", 60)
        finally:
            few.end()
        assert load.done and few.done and not load.failed and not few.failed


def test_an_engine_that_dies_is_replaced_and_its_requests_sent_to_the_other(tmp_path):
    with serving():
        serve.run(scripted_app(partial(die_once, tmp_path / "died"), min_replicas=2, max_replicas=2, retries=2), name="demo")
        before = set(replicas())
        load = Load(3, model="scripted")
        try:
            fatal = {"model": "scripted", "messages": [{"role": "user", "content": "die"}]}
            answer = httpx.post(f"{URL}/v1/chat/completions", json=fatal, timeout=60)
            wait_until(lambda: num_running() == (2, 2) and not before <= set(replicas()), "it is replaced", 60)
        finally:
            load.end()
        assert answer.json()["choices"][0]["message"]["content"] == "alive"
        assert all(stream for _, _, stream, _ in load.failed), load.failed


def die_once(died, prompt):
    """A reply. The first engine that is asked to die does; the file says that it has."""
    if "die" not in echo(prompt):
        return "word " * 5
    if died.exists():
        return "alive"
    died.touch()
    raise SystemExit("the engine's thread ends")


# -- offline ---------------------------------------------------------------------------------------------------------------

NUM_PROMPTS = 1000


@contextlib.contextmanager
def job(cluster, folder):
    """A process that runs the job; it does not outlive the block."""
    script = str(Path(__file__).parent / "ray_job.py")
    command = [sys.executable, script, cluster.address, str(folder / "in.jsonl"), str(folder / "out"), str(folder / "model")]
    environment = {**os.environ, **WORKER}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def parts(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").glob("part-*")} if (folder / "out").exists() else {}


def test_a_job_that_is_killed_goes_on_and_repeats_and_loses_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    tiny_model(tmp_path / "model")
    prompts = [f"the fox {i}" for i in range(NUM_PROMPTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    with two_nodes() as cluster:
        with job(cluster, tmp_path) as first:
            wait_until(lambda: len(parts(tmp_path)) >= 5 or first.poll() is not None, "parts are written", STARTS)
            first.kill()
            said = first.communicate()[0]
        kept = parts(tmp_path)
        assert 5 <= len(kept) < NUM_PROMPTS / 50, said
        cut = sorted(kept)[1]
        (tmp_path / "out" / cut).write_bytes(kept.pop(cut)[:-100])  # as if the machine had gone down with it
        with job(cluster, tmp_path) as second:
            said = second.communicate(timeout=STARTS)[0]
    assert second.returncode == 0, said
    before = sum(pq.read_table(tmp_path / "out" / name).num_rows for name in kept)
    assert f"Report(rows={NUM_PROMPTS}, before={before}, failed=0)" in said and f"{cut} is not what was written" in said
    assert kept.items() <= parts(tmp_path).items()  # what was there was not touched
    rows = [row for name in parts(tmp_path) for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    assert sorted(row["row_number"] for row in rows) == list(range(NUM_PROMPTS))
    assert all(row["prompt"] == prompts[row["row_number"]] and len(row["generated_token_ids"]) == 4 for row in rows)
    check_some(tmp_path, rows)


def check_some(folder, rows):
    """Results are those of the engine alone."""
    from ray_job import CONFIG, PARAMS

    from jaxpaged import SamplingParams

    with LLM(str(folder / "model"), use_tqdm=False, **CONFIG) as llm:
        some = rows[:: NUM_PROMPTS // 20]
        alone = llm.generate([row["prompt"] for row in some], SamplingParams(**PARAMS), use_tqdm=False)
    assert [row["generated_token_ids"] for row in some] == [list(one.outputs[0].token_ids) for one in alone]
