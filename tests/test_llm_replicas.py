"""Data parallel: `LLM(..., data_parallel_size=2)` and the server over it answer as one engine does, on a tiny model with random
weights and on the demo model."""

import re
import threading
from collections import Counter

import httpx
import jax
import numpy as np
import openai
import pytest
from live_server import serve
from test_llm import CONFIG, GREEDY, PROMPTS, metric, run, tokens
from test_llm import ENGINE as ALL_PROGRAMS
from test_lora import ENGINE as LORA_ENGINE
from test_lora import GREEDY as LORA_GREEDY
from test_lora import check
from tiny_lora import three as three

from jaxpaged import LLM, BeamSearchParams, LoRARequest, RequestError, SamplingParams, build_replicas, memory, stepping
from jaxpaged.build_replicas import build_replicas as build
from jaxpaged.config import EngineConfig
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import open_service

ENGINE = {**ALL_PROGRAMS, "enforce_eager": True}
MANY = [[i % 7, i % 5, i % 3, i] for i in range(24)]
QUESTIONS = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The quick brown fox"]


@pytest.fixture(scope="module")
def one():
    with LLM(CONFIG, **ENGINE) as llm:
        yield llm


@pytest.fixture(scope="module")
def two():
    with LLM(CONFIG, **ENGINE, data_parallel_size=2) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "two" in request.fixturenames:
        llm = request.getfixturevalue("two")
        assert not any(engine.has_work for engine in llm.engines) and metric(llm, "kv_pages_held") == 0
        assert llm._router.loads == [0, 0]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxpaged-engine")]


def test_each_engine_is_on_a_device_of_its_own(two):
    devices = [{str(d) for leaf in jax.tree.leaves(engine.runner.leaves) for d in leaf.devices()} for engine in two.engines]
    assert devices == [{str(jax.devices()[0])}, {str(jax.devices()[1])}]
    assert two.get_world_size() == 2


def test_greedy_tokens_are_one_engines_and_in_order(one, two):
    before = [engine.counters.prompt_tokens for engine in two.engines]
    assert tokens(run(two, MANY)) == tokens(run(one, MANY))
    given = [engine.counters.prompt_tokens - b for engine, b in zip(two.engines, before)]
    assert sum(given) == sum(map(len, MANY)) and min(given) >= sum(given) * 0.4
    assert metric(two, "prompt_tokens") == sum(engine.counters.prompt_tokens for engine in two.engines)


def test_seeds_are_those_of_one_engine(one, two):
    wanted = SamplingParams(temperature=1.0, max_tokens=8, n=2)
    with LLM(CONFIG, **ENGINE) as fresh_one, LLM(CONFIG, **ENGINE, data_parallel_size=2) as fresh_two:
        for _ in range(2):  # the second time a prefix is remembered
            assert tokens(run(fresh_two, MANY, wanted)) == tokens(run(fresh_one, MANY, wanted))


def test_logprobs_samples_beams_and_vectors(one, two):
    wanted = SamplingParams(temperature=0.7, seed=3, n=3, max_tokens=6, logprobs=2, prompt_logprobs=1)
    for ours, theirs in zip(run(two, PROMPTS, wanted), run(one, PROMPTS, wanted)):
        assert tokens([ours]) == tokens([theirs])
        for a, b in zip(ours.outputs, theirs.outputs):
            assert [list(entry) for entry in a.logprobs] == [list(entry) for entry in b.logprobs]
            assert a.cumulative_logprob == pytest.approx(b.cumulative_logprob, abs=1e-4)
        assert len(ours.prompt_logprobs) == len(ours.prompt_token_ids)
    beams = [llm.beam_search(PROMPTS[:2], BeamSearchParams(beam_width=2, max_tokens=4)) for llm in (one, two)]
    assert [[s.tokens for s in output.sequences] for output in beams[0]] == [
        [s.tokens for s in output.sequences] for output in beams[1]
    ]
    for ours, theirs in zip(two.embed(PROMPTS, use_tqdm=False), one.embed(PROMPTS, use_tqdm=False)):
        np.testing.assert_allclose(ours.outputs.embedding, theirs.outputs.embedding, atol=1e-5)
    assert [round(pair.outputs.score, 4) for pair in two.score(PROMPTS[0], PROMPTS[1:], use_tqdm=False)] == [
        round(pair.outputs.score, 4) for pair in one.score(PROMPTS[0], PROMPTS[1:], use_tqdm=False)
    ]


def test_a_common_beginning_is_computed_once_an_engine(two):
    two.reset_prefix_cache()
    hits = metric(two, "prefix_cache_hits")
    begin = list(range(100, 180))
    for i in range(4):
        run(two, [[*begin, i]])
    assert metric(two, "prefix_cache_hits") - hits == 3 * 80, "one after the other: all on the engine that has it"
    assert two.reset_prefix_cache() and metric(two, "kv_pages_cached") == 0


def test_if_one_prompt_is_refused_none_is_run(two):
    before = metric(two, "engine_steps")
    with pytest.raises(RequestError, match="999 is not a token id"):
        run(two, [*MANY, [999]])
    assert metric(two, "engine_steps") == before


def test_a_failing_step_takes_its_own_requests_down(two, monkeypatch):
    def fails(batch):
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(two.engines[1].runner, "dispatch", fails)
    reasons = Counter(output.outputs[0].finish_reason for output in run(two, MANY))
    assert reasons["error"] > 0 and reasons["length"] > 0


@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_ends_an_engine_s_thread_is_raised_and_nothing_is_left(two, monkeypatch, engine, error):
    def fails():
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(two.engines[engine], "_schedule", fails)
        patch.setattr(two, "_abort_all", lambda ids, real=two._abort_all: (patch.undo(), real(ids)))
        with pytest.raises(error):
            run(two, MANY)
    assert len(run(two, MANY)) == len(MANY)


def test_ctrl_c_in_the_callers_thread_ends_all(two, monkeypatch):
    told = []

    class Interrupted(stepping.queue.SimpleQueue):
        def get(self):
            told.append(super().get())
            if len(told) == 3:
                raise KeyboardInterrupt
            return told[-1]

    monkeypatch.setattr(stepping.queue, "SimpleQueue", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(two, MANY, GREEDY.clone(max_tokens=200))
    assert len(told) == 3


def test_the_bar_counts_all(two, capsys):
    two.generate(MANY, GREEDY, use_tqdm=True)
    shown = capsys.readouterr().err
    assert f"{len(MANY)}/{len(MANY)}" in shown and "tokens/s" in shown


def test_adapters_are_loaded_once_and_known_to_all_engines(three):
    folder, models = three
    with LLM(str(folder / "model"), **LORA_ENGINE, max_loras=2, data_parallel_size=2) as llm:
        assert llm.add_lora(LoRARequest("b", lora_path=str(folder / "b"))) and llm.list_loras() == ["b"]
        order, prompts = [None, None, "b", "b"] * 2, [[i, 3, i, 5] for i in range(8)]
        outputs = llm.generate(prompts, LORA_GREEDY, lora_request=order, use_tqdm=False)
        for output, name in zip(outputs, order):
            check(output, models[name])
        adapted = [[place.key for place in engine.state.residents] for engine in llm.engines]
        assert all(any(key is not None and key.startswith("b@") for key in keys) for keys in adapted)


# -- building --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, what", [
    ({"data_parallel_size": 9}, "data_parallel_size=9: 9 engines need 9 devices and there are 8; at most 8 fit"),
    ({"data_parallel_size": 3, "tensor_parallel_size": 4},
     r"3 engines of 4 devices each \(tensor_parallel_size x pipeline_parallel_size\) need 12 devices .* 8; at most 2 fit"),
    ({"data_parallel_size": 2, "tensor_parallel_size": 16}, "need 32 .* not even one fits: .* to 8 or less"),
])  # fmt: skip
def test_too_many_devices_are_refused_with_what_fits(sizes, what):
    with pytest.raises(RequestError, match=what):
        LLM(CONFIG, **ENGINE, **sizes)


def test_if_one_engine_cannot_be_built_the_others_are_let_go(monkeypatch):
    real, closed = build_replicas.build_engine, []

    def fails(config, model, params, progress, devices):
        if devices[0].id == 2:
            raise MemoryError("device 2 is full")
        built = real(config, model, params, progress, devices)
        monkeypatch.setattr(built.engine, "close", lambda: closed.append(devices[0].id))
        return built

    monkeypatch.setattr(build_replicas, "build_engine", fails)
    with pytest.raises(MemoryError, match="device 2 is full"):
        LLM(CONFIG, **ENGINE, data_parallel_size=4)
    assert sorted(closed) == [0, 1, 3]


# -- the demo model --------------------------------------------------------------------------------------------------------

DEMO = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64, "enforce_eager": True}


@pytest.mark.slow
def test_the_demo_model_answers_the_same_offline_and_over_http():
    wanted = SamplingParams(temperature=0, max_tokens=12, logprobs=1)
    with LLM("demo", **DEMO, use_tqdm=False) as one:
        expected = [output.outputs[0] for output in one.generate(QUESTIONS, wanted, use_tqdm=False)]
    with LLM("demo", **DEMO, data_parallel_size=2, use_tqdm=False) as two:
        found = [output.outputs[0] for output in two.generate(QUESTIONS, wanted, use_tqdm=False)]
        assert all(engine.counters.steps for engine in two.engines)
    assert [one.text for one in found] == [one.text for one in expected]
    built = build(EngineConfig("demo", **DEMO, data_parallel_size=2), progress=False)
    with serve(open_service(built, ServerOptions(served_model_name=("demo",)))) as live:
        with openai.OpenAI(base_url=f"{live.base_url}/v1", api_key="none", max_retries=0) as client:
            ask = lambda **more: client.completions.create(
                model="demo", prompt=QUESTIONS, max_tokens=12, temperature=0, logprobs=1, **more
            )
            whole = sorted(ask().choices, key=lambda choice: choice.index)
            assert [choice.text for choice in whole] == [one.text for one in expected]
            for choice, one in zip(whole, expected):
                chosen = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs)]
                assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-4)
            texts = Counter()
            for chunk in ask(stream=True):
                for choice in chunk.choices:
                    texts[choice.index] = (texts[choice.index] or "") + choice.text
            assert [texts[i] for i in range(5)] == [one.text for one in expected]
            several = client.completions.create(
                model="demo", prompt=QUESTIONS[0], n=3, temperature=0.8, seed=1, max_tokens=6
            ).choices
            assert len({choice.index for choice in several}) == 3
        counts = re.findall(r"jaxpaged:generation_tokens_total{(.*?)} (\S+)", httpx.get(f"{live.base_url}/metrics").text)
        assert [labels for labels, _ in counts] == [f'engine="{i}",model_name="demo"' for i in range(2)]
        assert all(float(count) > 0 for _, count in counts)


def test_engines_are_as_long_as_the_first_one_says(monkeypatch):
    """Where devices have unlike memory: what the first engine takes, all take, or say that they cannot."""
    options = {name: value for name, value in ENGINE.items() if name != "use_tqdm"}
    config = EngineConfig(**options, data_parallel_size=2)
    small, large = jax.devices()[:2]
    limits = {small: 221_000, large: 2_000_000}
    monkeypatch.setattr(memory, "device_limit", lambda device, share: limits[device])
    built = build(config, CONFIG, progress=False)
    lengths = [one.engine.limits.max_model_len for one in built]
    for one in built:
        one.engine.close()
    assert lengths[0] == lengths[1] < CONFIG["max_position_embeddings"]
    limits.update({small: limits[large], large: limits[small]})
    with pytest.raises(RequestError, match="set max_model_len to at most"):
        build(config, CONFIG, progress=False)
