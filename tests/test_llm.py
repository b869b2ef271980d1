"""`LLM` as a user sees it, on a tiny model with random weights: outputs, sampling parameters, errors, nothing left over."""

import json
import math

import jax
import numpy as np
import pytest

from jaxpaged import LLM, BeamSearchParams, RequestError, SamplingParams

CONFIG = {
    "model_type": "llama",
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
ENGINE = {"load_format": "dummy", "max_num_seqs": 4, "max_num_batched_tokens": 32, "block_size": 4, "use_tqdm": False}
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], list(range(20, 60)), [7]]


@pytest.fixture(scope="module")
def llm():
    with LLM(CONFIG, **ENGINE) as llm:
        yield llm


def run(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(outputs):
    return [[list(o.token_ids) for o in output.outputs] for output in outputs]


def metric(llm, name):
    return {m.name: m.value for m in llm.get_metrics()}[name]


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert not llm.engine.has_work
        assert metric(llm, "kv_pages_held") == 0


def test_outputs_have_vllms_fields(llm):
    (output,) = run(llm, [{"prompt_token_ids": PROMPTS[0]}])
    assert output.prompt_token_ids == PROMPTS[0] and output.finished and output.error is None
    (completion,) = output.outputs
    assert len(completion.token_ids) == 12
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert completion.logprobs is None and completion.cumulative_logprob is None
    m = output.metrics
    assert m.arrival_time <= m.scheduled_time <= m.first_token_time <= m.last_token_time
    assert m.num_generation_tokens == 12


def test_together_equals_alone(llm):
    together = tokens(run(llm, PROMPTS))
    llm.reset_prefix_cache()
    assert together == [tokens(run(llm, [p]))[0] for p in PROMPTS]


@pytest.mark.parametrize(
    "changes",
    [
        {"async_scheduling": False},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 8},
        {"long_prefill_token_threshold": 3},
        {"block_size": 16},
        {"num_gpu_blocks_override": 14, "max_model_len": 52},
        {"max_num_seqs": 1},
        {"scheduling_policy": "priority"},
    ],
    ids=str,
)
def test_the_schedule_does_not_change_tokens(llm, changes):
    """Greedy and seeded sampling alike."""
    seeded = [SamplingParams(temperature=1.5, seed=i, max_tokens=12) for i in range(len(PROMPTS))]
    with LLM(CONFIG, **{**ENGINE, "enforce_eager": True, **changes}) as other:
        assert tokens(run(other, PROMPTS)) == tokens(run(llm, PROMPTS))
        assert tokens(run(other, PROMPTS, seeded)) == tokens(run(llm, PROMPTS, seeded))
        assert metric(other, "kv_pages_held") == 0


def test_nothing_compiles_after_warm_up(llm):
    before = metric(llm, "compilations")
    rng = np.random.default_rng(0)
    kinds = [
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=20, max_tokens=5),
        SamplingParams(temperature=0.7, presence_penalty=1.0, logit_bias={3: 5.0}, max_tokens=7),
        SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, max_tokens=3),
        SamplingParams(n=3, max_tokens=6),
    ]
    prompts = [rng.integers(3, 211, rng.integers(1, 100)).tolist() for _ in range(20)]
    run(llm, prompts, [kinds[i % len(kinds)] for i in range(20)])
    assert metric(llm, "compilations") == before


def test_seeds_repeat_and_samples_differ(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=10, ignore_eos=True)
    first, again = tokens(run(llm, [PROMPTS[0]], params)), tokens(run(llm, [PROMPTS[0], PROMPTS[1]], params))
    assert first[0] == again[0]
    assert len({tuple(sample) for sample in first[0]}) == 3
    assert [o.index for o in run(llm, [PROMPTS[0]], params)[0].outputs] == [0, 1, 2]


def test_engine_seed_repeats_unseeded_requests():
    def sampled(seed):
        with LLM(CONFIG, **ENGINE, enforce_eager=True, seed=seed) as other:
            # The same weights: only the draws differ.
            other.engine.seed = seed
            return tokens(run(other, PROMPTS[:2], SamplingParams(temperature=1.5, max_tokens=8)))

    assert sampled(0) == sampled(0)


def test_samples_share_their_prompt(llm):
    llm.reset_prefix_cache()
    queries, hits = metric(llm, "prefix_cache_queries"), metric(llm, "prefix_cache_hits")
    run(llm, [list(range(100, 139))], SamplingParams(n=4, max_tokens=4))
    assert metric(llm, "prefix_cache_queries") - queries == 4 * 39
    assert metric(llm, "prefix_cache_hits") - hits >= 3 * 36


def test_prefix_hits_are_reported(llm):
    prompt = list(range(60, 100))
    llm.reset_prefix_cache()
    assert run(llm, [prompt])[0].num_cached_tokens == 0
    assert run(llm, [prompt])[0].num_cached_tokens >= 36
    assert run(llm, [prompt], GREEDY.clone(skip_reading_prefix_cache=True))[0].num_cached_tokens == 0
    salted = {"prompt_token_ids": prompt, "cache_salt": "other"}
    assert run(llm, [salted])[0].num_cached_tokens == 0


def test_stop_token_ids_and_eos(llm):
    (plain,) = tokens(run(llm, [PROMPTS[0]], GREEDY.clone(ignore_eos=True)))[0]
    stop = plain[4]
    (output,) = run(llm, [PROMPTS[0]], GREEDY.clone(stop_token_ids=[stop], ignore_eos=True))
    ended = output.outputs[0]
    assert ended.token_ids == plain[: plain.index(stop) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)


def test_without_a_tokenizer_the_configs_eos_ends_a_sequence(llm):
    (output,) = run(llm, [PROMPTS[0]], GREEDY.clone(logit_bias={2: 100.0}))
    assert output.outputs[0].token_ids == [2]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_min_tokens_keeps_the_end_away(llm):
    (plain,) = tokens(run(llm, [PROMPTS[0]], GREEDY.clone(ignore_eos=True)))[0]
    stop = plain[1]
    params = GREEDY.clone(stop_token_ids=[stop], ignore_eos=True, min_tokens=6)
    (output,) = run(llm, [PROMPTS[0]], params)
    assert len(output.outputs[0].token_ids) >= 6
    assert stop not in output.outputs[0].token_ids[:6]


def test_logprobs_of_greedy_tokens(llm):
    (output,) = run(llm, [PROMPTS[0]], GREEDY.clone(logprobs=3))
    completion = output.outputs[0]
    assert len(completion.logprobs) == 12
    for token, entry in zip(completion.token_ids, completion.logprobs):
        assert entry[token].rank == 1 and len(entry) == 3
        values = [lp.logprob for lp in entry.values()]
        assert values == sorted(values, reverse=True) and values[0] <= 0
    total = sum(entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_equal_logprobs_of_generating_the_same(llm):
    """Greedy tokens given as a prompt have, as prompt tokens, the logprobs that they were generated with."""
    (generated,) = run(llm, [PROMPTS[1]], GREEDY.clone(logprobs=2))
    completion = generated.outputs[0]
    prompt = PROMPTS[1] + completion.token_ids
    (scored,) = run(llm, [prompt], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    assert len(scored.prompt_logprobs) == len(prompt) and scored.prompt_logprobs[0] is None
    for token, entry, scored_entry in zip(completion.token_ids, completion.logprobs, scored.prompt_logprobs[3:]):
        assert scored_entry[token].logprob == pytest.approx(entry[token].logprob, abs=1e-4)
        assert scored_entry[token].rank == entry[token].rank
    assert all(math.isfinite(lp.logprob) for e in scored.prompt_logprobs[1:] for lp in e.values())


def test_logit_bias_allowed_and_bad_words_ids(llm):
    (biased,) = tokens(run(llm, [PROMPTS[0]], GREEDY.clone(logit_bias={77: 100.0}, ignore_eos=True)))[0]
    assert set(biased) == {77}
    allowed = [90, 91, 92]
    (only,) = tokens(run(llm, [PROMPTS[0]], SamplingParams(allowed_token_ids=allowed, max_tokens=20, seed=1)))[0]
    assert set(only) <= set(allowed) and len(set(only)) > 1


def test_penalties_forbid_repetition(llm):
    params = SamplingParams(temperature=0, max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0, ignore_eos=True,
                            logit_bias={t: 3.0 for t in range(100, 104)})  # fmt: skip
    (plain,) = tokens(run(llm, [PROMPTS[0]], params.clone(frequency_penalty=0.0, presence_penalty=0.0)))[0]
    (penalised,) = tokens(run(llm, [PROMPTS[0]], params))[0]
    assert len(set(penalised)) > len(set(plain))
    assert run(llm, [PROMPTS[0]], params)[0].outputs[0].token_ids == penalised


def test_beam_search_beats_greedy(llm):
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    (output,) = llm.beam_search([{"prompt_token_ids": PROMPTS[0]}], params)
    assert len(output.sequences) == 4
    scores = [s.cum_logprob for s in output.sequences]
    assert scores == sorted(scores, reverse=True)
    (greedy,) = run(llm, [PROMPTS[0]], SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True))
    assert scores[0] >= greedy.outputs[0].cumulative_logprob - 1e-4
    assert all(s.tokens[:6] == PROMPTS[0] and len(s.tokens) == 12 for s in output.sequences)


def test_width_one_beam_is_greedy(llm):
    (output,) = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True))
    assert output.sequences[0].tokens[6:] == tokens(run(llm, [PROMPTS[0]], GREEDY.clone(ignore_eos=True)))[0][0]


BAD = [
    ([[]], GREEDY, "the prompt is empty"),
    ([[5, 211]], GREEDY, r"211 is not a token id of this model; ids are integers in 0\.\.210"),
    ([[5, -1]], GREEDY, "-1 is not a token id"),
    ([[3] * 256], GREEDY, "the prompt has 256 tokens, max_model_len is 256"),
    (
        [[3] * 250],
        GREEDY,
        "250 tokens and max_tokens is 12: 262 together, but max_model_len is 256; set max_tokens to at most 6",
    ),
    (["text"], GREEDY, "needs a tokenizer"),
    ([[5]], GREEDY.clone(logprobs=21), "max_logprobs is 20"),
    ([[5]], GREEDY.clone(stop_token_ids=[999]), "stop_token_ids: 999"),
    ([[5]], GREEDY.clone(logit_bias={400: 1.0}), "logit_bias: 400"),
    ([{"prompt_token_ids": [5], "multi_modal_data": {}}], GREEDY, "multi_modal_data"),
    ([[5], [6]], [GREEDY], "2 prompts but 1 sampling_params"),
    ([[5]], GREEDY.clone(allowed_token_ids=[2], min_tokens=3), "leave nothing to sample"),
]


@pytest.mark.parametrize("prompts, params, message", BAD, ids=[b[2][:30] for b in BAD])
def test_bad_requests_say_why(llm, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        run(llm, prompts, params)


def test_as_many_priorities_as_prompts(llm):
    with pytest.raises(RequestError, match="2 prompts but 1 priorities"):
        llm.generate([[5], [6]], GREEDY, priority=[1], use_tqdm=False)


def test_a_bad_prompt_among_good_ones_runs_none_and_leaves_nothing(llm):
    steps = metric(llm, "engine_steps")
    with pytest.raises(RequestError):
        run(llm, [PROMPTS[0], [9999], PROMPTS[1]])
    assert metric(llm, "engine_steps") == steps
    assert len(tokens(run(llm, [PROMPTS[0]]))[0][0]) == 12


def test_unknown_parameters_name_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'max_num_seqs'"):
        LLM(CONFIG, load_format="dummy", max_num_seq=4)
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        SamplingParams(temprature=0.5)


def test_unknown_family_and_unknown_config_key():
    with pytest.raises(ValueError, match="model_type 'mamba9' is not supported; supported: .*llama"):
        LLM({**CONFIG, "model_type": "mamba9"}, load_format="dummy")
    with pytest.raises(ValueError, match="twist_factor=3"):
        LLM({**CONFIG, "twist_factor": 3}, load_format="dummy")


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(llm, monkeypatch):
    expected = tokens(run(llm, [PROMPTS[0]]))
    real, calls = llm.engine.runner.dispatch, iter([False, False, True])

    def dispatch(batch):
        if next(calls, False):
            raise RuntimeError("the device is on fire")
        return real(batch)

    monkeypatch.setattr(llm.engine.runner, "dispatch", dispatch)
    (output,) = run(llm, [PROMPTS[0]])
    assert output.outputs[0].finish_reason == "error" and "on fire" in output.error
    assert tokens(run(llm, [PROMPTS[0]])) == expected


def test_ctrl_c_leaves_nothing_behind(llm, monkeypatch):
    expected = tokens(run(llm, [PROMPTS[0]]))
    real, calls = llm.engine.runner.collect, iter([False, True])

    def collect(handle):
        if next(calls, False):
            raise KeyboardInterrupt
        return real(handle)

    monkeypatch.setattr(llm.engine.runner, "collect", collect)
    with pytest.raises(KeyboardInterrupt):
        run(llm, PROMPTS)
    assert not llm.engine.has_work
    assert tokens(run(llm, [PROMPTS[0]])) == expected


def test_nan_weights_end_the_request_with_an_error(llm):
    import jax.numpy as jnp

    from jaxpaged.stage import abstract_decoder

    _, _, leaves = abstract_decoder(llm._built.decoder_config, "float32")
    tree = {path: jnp.full(s.shape, jnp.nan, s.dtype) for path, s in leaves.items()}
    with LLM(CONFIG, params=tree, **{**ENGINE, "load_format": "auto"}, enforce_eager=True) as broken:
        outputs = run(broken, PROMPTS[:2])
        assert [o.outputs[0].finish_reason for o in outputs] == ["error", "error"]
        assert all("not numbers" in o.error for o in outputs)
        assert metric(broken, "kv_pages_held") == 0
    assert len(jax.devices()) >= 1


def test_params_in_memory_equal_the_checkpoint(llm):
    leaves = dict(llm.engine.runner.leaves)
    with LLM(CONFIG, params=leaves, **{**ENGINE, "load_format": "auto"}, enforce_eager=True) as other:
        assert tokens(run(other, PROMPTS)) == tokens(run(llm, PROMPTS))


def test_what_has_been_closed_takes_no_memory_again():
    llm = LLM(CONFIG, **ENGINE, enforce_eager=True)
    llm.close()
    before = len(jax.live_arrays())
    with pytest.raises(RequestError, match="has been closed; build another one"):
        run(llm, PROMPTS)
    assert len(jax.live_arrays()) <= before


def test_cache_too_small_for_one_sequence_names_what_fits():
    with pytest.raises(
        RequestError, match=r"room for 28 tokens.*max_model_len to at most 28, or num_gpu_blocks_override=9 or more"
    ):
        LLM(CONFIG, **ENGINE, num_gpu_blocks_override=8, max_model_len=29)


def test_auto_length_is_what_the_cache_has_room_for():
    with LLM(CONFIG, **ENGINE, num_gpu_blocks_override=8, enforce_eager=True) as small:
        assert small.config.max_model_len == 28
        assert len(tokens(run(small, [PROMPTS[0]], GREEDY.clone(max_tokens=22)))[0][0]) == 22
        with pytest.raises(RequestError, match="max_model_len is 28"):
            run(small, [PROMPTS[0]], GREEDY.clone(max_tokens=23))


def test_vllms_arguments_that_ask_for_nothing_are_taken_and_others_refused():
    asked = {"tokenizer_mode": "auto", "quantization": None, "enable_lora": False, "tensor_parallel_size": 1}
    with LLM(CONFIG, **ENGINE, enforce_eager=True, **asked) as other:
        assert other.get_world_size() == 1
    with pytest.raises(RequestError, match="speculative_config={} is not supported"):
        LLM(CONFIG, **ENGINE, speculative_config={})


def test_default_sampling_params_come_from_the_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "top_p": 0.8}))
    with LLM(str(tmp_path), **ENGINE, enforce_eager=True, skip_tokenizer_init=True) as other:
        assert other.get_default_sampling_params() == SamplingParams(temperature=0.3, top_p=0.8)
    with LLM(str(tmp_path), **ENGINE, enforce_eager=True, skip_tokenizer_init=True, generation_config="vllm") as other:
        assert other.get_default_sampling_params() == SamplingParams()
