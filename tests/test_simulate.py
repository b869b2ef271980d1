"""The real engine on a paper device and a counted clock: nothing is lost, and what can be worked out by hand comes out."""

import json

import numpy as np
import pytest
from plan_models import MODELS

from jaxpaged import simulate, simulate_plot, simulate_traces
from jaxpaged.batch import Bucket
from jaxpaged.config import EngineConfig
from jaxpaged.cost import chunk, host_seconds, repeated
from jaxpaged.devices import DEVICES
from jaxpaged.plan_model import Source, fit, setting
from jaxpaged.plan_times import itl
from jaxpaged.request import RequestError
from jaxpaged.simulate_traces import HASHED, Traced, arrivals, read, tokens


def on_paper(name: str = "Llama-3-8B", **config):
    return fit(setting(Source(MODELS[name]), EngineConfig(model=name, **config), DEVICES["h200"]))


# -- one request, by hand ----------------------------------------------------------------------------------------------------


def test_one_request_takes_its_steps():
    given, plan = on_paper()
    result = simulate.simulate(given, plan, [Traced(None, 100, 4)], rate=1.0)
    step = lambda tokens, rows: given.cost.step(Bucket(tokens, min(tokens, 256)), rows).total
    prompt = step(128, chunk(0, 100))
    decodes = [step(1, repeated(at, 1)) for at in (100, 101, 102)]
    host = host_seconds(1)
    # The host makes the next step while the device computes one: only the first is waited for.
    assert result.ttft["p50"] == pytest.approx(host + prompt)
    assert result.e2e["p50"] == pytest.approx(host + prompt + sum(decodes))
    assert result.itl["mean"] == pytest.approx(np.mean(decodes))


def test_stages_of_a_pipeline_wait_for_the_token():
    """One request alone: no stage can begin a step before the last one has sampled."""
    given, plan = on_paper(pipeline_parallel_size=4)
    result = simulate.simulate(given, plan, [Traced(None, 100, 4)], rate=1.0)
    one = given.cost.step(Bucket(1, 1), repeated(101, 1)).total
    assert result.itl["mean"] == pytest.approx(one + host_seconds(1), rel=0.1)


# -- many --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"data_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_every_request_gets_its_tokens(sizes):
    given, plan = on_paper(
        "tiny", max_model_len=512, num_gpu_blocks_override=30, max_num_seqs=8, max_num_batched_tokens=64, **sizes
    )
    rng = np.random.default_rng(0)
    asked = [Traced(None, int(p), int(o)) for p, o in zip(rng.integers(1, 300, 60), rng.integers(1, 200, 60))]
    replica = simulate.Replica(given, plan)
    replica.run(list(zip(arrivals(asked, 500.0, False, 0).tolist(), range(60), asked)))
    assert [len(one.times) for one in replica.served.values()] == [request.output for request in asked]
    for one in replica.served.values():
        assert one.times == sorted(one.times) and one.ttft > 0
    stats = replica.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held_pages) == (0, 0, 0)
    assert stats.num_preemptions > 0, "pages were to be short"
    again = [simulate.simulate(given, plan, asked, 500.0) for _ in range(2)]
    assert again[0] == again[1] and again[0].requests == 60


def test_throughput_ends_at_the_roofline():
    """However fast requests come, tokens come no faster than full batches make them; and nearly as fast."""
    given, plan = on_paper(max_num_seqs=64)
    asked = [Traced(None, 16, 256)] * 256
    slow, fast = (simulate.simulate(given, plan, asked, rate) for rate in (1000.0, 1e6))
    best = 64 / itl(given, 64, 16)[0]
    assert fast.output_tokens_per_s == pytest.approx(slow.output_tokens_per_s, rel=0.05)
    assert 0.85 * best < fast.output_tokens_per_s <= best
    assert fast.peak_running == 64 and fast.busy > 0.9


def test_a_slow_rate_is_kept_and_a_fast_one_waits():
    given, plan = on_paper()
    asked = read("synthetic:prompt=200,output=20,n=60")
    slow, fast = (simulate.simulate(given, plan, asked, rate) for rate in (2.0, 1e4))
    assert slow.requests_per_s == pytest.approx(2.0, rel=0.35)  # sixty draws
    assert fast.ttft["p99"] > 3 * slow.ttft["p99"]
    rates = simulate.rates_to_try(given, plan, asked)
    assert rates == sorted(rates) and rates[-1] < 1e4


def test_what_is_too_long_is_refused_and_counted():
    given, plan = on_paper(max_model_len=512)
    result = simulate.simulate(given, plan, [Traced(None, 600, 4), Traced(None, 100, 4), Traced(None, 10**15, 4)], 1.0)
    assert (result.requests, result.refused) == (1, 2)
    with pytest.raises(RequestError, match="no request of the trace fits"):
        simulate.simulate(given, plan, [Traced(None, 600, 4)], 1.0)


def test_equal_hashes_share_pages():
    given, plan = on_paper()
    shared = [Traced(None, 2 * HASHED, 2, (7, 8))] * 4
    other = [Traced(None, 2 * HASHED, 2, (2 * i, 2 * i + 1)) for i in range(4)]
    hits = [simulate.simulate(given, plan, asked, 1.0).prefix_hits for asked in (shared, other)]
    assert hits[0] > 0.7 and hits[1] == 0


# -- traces ------------------------------------------------------------------------------------------------------------------


def test_public_formats_are_read(tmp_path):
    mooncake, azure = tmp_path / "a.jsonl", tmp_path / "b.csv"
    lines = [{"timestamp": 27000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]},
             {"timestamp": 24000, "input_length": 10, "output_length": 26, "hash_ids": []}]  # fmt: skip
    mooncake.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read(str(mooncake)) == [Traced(0.0, 10, 26), Traced(3.0, 6955, 52, (46, 47))]
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
                     "2023-11-16 18:15:50.9951690,396,109\n")  # fmt: skip
    first, second = read(str(azure))
    assert (first.prompt, second.output) == (374, 109) and second.at == pytest.approx(4.314579)
    assert simulate_traces.own_rate(read(str(mooncake))) == pytest.approx(1 / 3)
    assert read("synthetic:prompt=5,n=3") == [Traced(None, 5, 128)] * 3 and len(read("synthetic:", 7)) == 7


@pytest.mark.parametrize("text, said", [
    ("{}", "line 1: one of input_length"),
    ('{"input_length": 5}', "line 1: one of output_length"),
    ('\n{"input_length": -5, "output_length": 1}', "line 2: input_length must be a positive integer .*, got -5"),
    ('{"timestamp": "soon", "input_length": 5, "output_length": 1}', "line 1: its time cannot be read"),
    ('{"timestamp": NaN, "input_length": 5, "output_length": 1}', r"line 1: its time cannot be read \(timestamp: nan"),
    ('{"timestamp": Infinity, "input_length": 5, "output_length": 1}', r"line 1: its time cannot be read \(timestamp: inf"),
    ('{"arrival_time": -1e400, "input_length": 5, "output_length": 1}', r"line 1: its time cannot be .*arrival_time: -inf"),
    ('{"timestamp": 1%s, "input_length": 5, "output_length": 1}' % ("0" * 400), "line 1: its time cannot be read"),
    ('{"input_length": 1e400, "output_length": 1}', "input_length must be a positive integer of at most 10,000,000, got inf"),
    ('{"input_length": 5, "output_length": 1000000000000}', "output_length must be a positive integer of at most 10,000,000"),
    ('{"input_length": 5, "output_length": 1, "hash_ids": "a"}', "hash_ids must be a list of integers"),
    ("[1]", "line 1: an object is needed"),
    ("{", "line 1: not JSON"),
    ("", "has no requests"),
])  # fmt: skip
def test_a_wrong_trace_is_refused_by_line(tmp_path, text, said):
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(RequestError, match=said):
        read(str(tmp_path / "t.jsonl"))


def test_what_is_no_trace_is_refused():
    for trace, said in (("nowhere.jsonl", "cannot be read"), ("synthetic:promt=4", "did you mean 'prompt'"),
                        ("synthetic:n=0", "n must be a positive integer"),
                        ("synthetic:n=1000000000000", "n must be a positive integer of at most"),
                        ("synthetic:n=²", "n must be a positive integer")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            read(trace)
    for most in (0, -1):
        with pytest.raises(RequestError, match=f"num_requests must be a positive integer, got {most}"):
            read("synthetic:", most)


@pytest.mark.parametrize("name, text", [
    ("t.csv", "timestamp,input_length,output_length\n1000,5,1\n3000,6,1\n"),
    ("t.jsonl", '{"timestamp": 1000, "input_length": 5, "output_length": 1}\n'
                '{"timestamp": 3000, "input_length": 6, "output_length": 1}\n'),
])  # fmt: skip
def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read(str(tmp_path / name)) == [Traced(0.0, 5, 1), Traced(2.0, 6, 1)]


def test_arrivals_have_the_rate_that_is_asked_for():
    asked = [Traced(at, 1, 1) for at in (0.0, 1.0, 5.0)]
    assert arrivals(asked, 4.0, True, 0).tolist() == [0.0, 0.1, 0.5]
    assert arrivals([Traced(at, 1, 1) for at in (0.0, 5e-324)], 4.0, True, 0).tolist() == [0.0, 0.25]
    times = arrivals([Traced(None, 1, 1)] * 4000, 4.0, False, 3)
    assert times[-1] == pytest.approx(1000, rel=0.05) and (np.diff(times) > 0).all()
    assert arrivals([Traced(None, 1, 1)] * 4000, 8.0, False, 3) * 2 == pytest.approx(times)


def test_prompts_have_their_length_and_differ():
    assert len(tokens(0, Traced(None, 700, 1, (5,)), 100)) == 700
    one, two = (tokens(i, Traced(None, 50, 1), 1000) for i in (1, 2))
    assert (one != two).any() and (one == tokens(1, Traced(None, 50, 1), 1000)).all() and one.max() < 1000


def test_a_plot_is_drawn(tmp_path):
    given, plan = on_paper("tiny")
    lines: list[str] = []
    results = simulate.sweep(given, plan, read("synthetic:prompt=20,output=5,n=10"), [1.0, 100.0], progress=lines.append)
    for name in ("b.png", "without"):
        simulate_plot.plot(results, "tiny", tmp_path / "a" / name)
        assert (tmp_path / "a" / name).read_bytes()[:4] == b"\x89PNG"
    assert len(lines) == 3 and lines[1].split()[0] == "1"
