"""Embeddings: on the paper cache, whatever the schedule and whoever runs beside them; and equal to transformers'."""

import asyncio

import numpy as np
import pytest
import test_llm
import tiny_hf as models
import torch
from fakes import EMBED_DIM, FakeRunner, paper_tokens, paper_vector
from families import Row, rows
from families.qwen import SLIDING
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import EOS, VOCAB, engine, final

from jaxpaged import LLM, EmbeddingRequestOutput, PoolingParams, RequestError, RequestOutput, SamplingParams, scheduler
from jaxpaged.async_engine import AsyncEngine

RAW = PoolingParams(use_activation=False)
MEAN = PoolingParams("mean", use_activation=False)


def drain(e) -> dict:
    """Steps until nothing is left to do, which must not take for ever."""
    outputs = {}
    for _ in range(1000):
        if not e.has_work:
            assert e.stats().num_held_pages == 0
            return outputs
        outputs |= {output.request_id: output for output in e.step()}
        scheduler.check(e.state)
    raise AssertionError(f"requests that are never served: {e.stats()}")


def vector(output: EmbeddingRequestOutput) -> np.ndarray:
    assert output.finished and output.error is None
    return np.asarray(output.outputs.embedding, np.float32)


# -- parameters ------------------------------------------------------------------------------------------------------------

REFUSED = {
    "pooling": ["first", None, 1, ["last"]],
    "use_activation": [None, 1, "true"],
    "dimensions": [0, -1, 1.5, True, "8"],
    "skip_reading_prefix_cache": [1, "no"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in REFUSED.items() for value in values], ids=str)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"^{name} must be ") as error:
        PoolingParams(**{name: value})
    assert error.value.param == name


def test_the_mean_never_reads_the_prefix_cache():
    assert PoolingParams("mean").skip_reading_prefix_cache and not PoolingParams("last").skip_reading_prefix_cache
    with pytest.raises(RequestError, match="skip_reading_prefix_cache must be None or True for the mean"):
        PoolingParams("mean", skip_reading_prefix_cache=False)


def test_unknown_parameters_name_the_nearest():
    with pytest.raises(RequestError, match="PoolingParams has no parameter 'dimension'; did you mean 'dimensions'"):
        PoolingParams(dimension=3)


# -- on paper --------------------------------------------------------------------------------------------------------------

loads = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=30),  # few words: many shared prefixes
        st.sampled_from(["last", "mean", "tokens"]),
        st.integers(1, 12),  # output, of those that generate
        st.integers(0, 4),  # steps before the next arrives
        st.integers(0, 2),  # priority
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=80, deadline=None)
@given(
    load=loads,
    overlap=st.booleans(),
    num_pages=st.integers(12, 40),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 20),
    page_size=st.sampled_from([4, 5, 16]),
    threshold=st.sampled_from([0, 3]),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
)
def test_every_mixed_load_equals_the_oracle(
    load, overlap, num_pages, max_num_seqs, budget, page_size, threshold, policy, caching
):
    e = engine(overlap=overlap, num_pages=num_pages, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, policy=policy,
               page_size=page_size, long_prefill_token_threshold=threshold, enable_prefix_caching=caching)  # fmt: skip
    outputs = {}
    for i, (prompt, kind, output, pause, priority) in enumerate(load):
        params = final(max_tokens=output) if kind == "tokens" else PoolingParams(kind, use_activation=False)
        e.submit(str(i), prompt, params, priority)
        for _ in range(pause):
            outputs |= {o.request_id: o for o in e.step()}
            scheduler.check(e.state)
    outputs |= drain(e)
    for i, (prompt, kind, output, _, _) in enumerate(load):
        if kind == "tokens":
            assert outputs[str(i)].outputs[0].token_ids == paper_tokens(prompt, output, VOCAB, EOS)
        else:
            assert vector(outputs[str(i)]).tolist() == paper_vector(prompt, kind).tolist()
    assert sum(e.counters.finished.values()) == len(load)
    assert e.counters.generated_tokens == sum(
        len(o.outputs[0].token_ids) for o in outputs.values() if isinstance(o, RequestOutput)
    )


@pytest.mark.parametrize("kind", ["last", "mean"])
@pytest.mark.parametrize("page_size", [4, 5])
def test_a_prompt_may_fill_the_model_and_the_cache(kind, page_size):
    """No place for a token to come: neither of max_model_len nor of the cache's pages."""
    e = engine(max_model_len=20, num_pages=1 + 20 // page_size, page_size=page_size)
    prompt = [i % 7 for i in range(20)]
    e.submit("a", prompt, PoolingParams(kind, use_activation=False))
    output = drain(e)["a"]
    assert vector(output).tolist() == paper_vector(prompt, kind).tolist()
    with pytest.raises(RequestError, match="the prompt has 21 tokens and max_model_len is 20") as error:
        e.submit("b", [*prompt, 1], RAW)
    assert error.value.param == "prompt" and not e.has_work


def test_a_prompt_that_the_cache_can_never_hold_is_refused():
    e = engine(num_pages=5)  # 16 tokens
    e.submit("a", [1] * 16, RAW)
    drain(e)
    with pytest.raises(
        RequestError, match=r"17 tokens need 5 pages.*the cache has 4.*shorten the prompt to at most 16"
    ) as error:
        e.submit("b", [1] * 17, RAW)
    assert error.value.param == "prompt"


def test_outputs_come_once_with_their_numbers():
    e = engine(max_num_batched_tokens=4)
    e.submit("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], RAW)
    found = [output for _ in iter(lambda: e.has_work, False) for output in e.step()]
    (output,) = found
    assert isinstance(output, EmbeddingRequestOutput) and output.prompt_token_ids == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (output.request_id, output.num_cached_tokens, output.outputs.hidden_size) == ("a", 0, EMBED_DIM)
    assert output.metrics.arrival_time <= output.metrics.scheduled_time and output.metrics.num_generation_tokens == 0
    assert e.counters.finished == {"stop": 1} and e.counters.prompt_tokens == 9 and e.counters.generated_tokens == 0


def test_the_last_token_is_all_that_a_prefix_hit_leaves_to_compute_and_the_mean_computes_all():
    e, prompt = engine(), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for name, params, cached in (
        ("a", MEAN, 0),
        ("b", RAW, 8),
        ("c", MEAN, 0),
        ("d", PoolingParams(use_activation=False, skip_reading_prefix_cache=True), 0),
    ):
        e.submit(name, prompt, params)
        output = drain(e)[name]
        assert output.num_cached_tokens == cached
        assert vector(output).tolist() == paper_vector(prompt, params.pooling).tolist()
    e.submit("e", [*prompt, 1], final(max_tokens=2, ignore_eos=True))
    assert drain(e)["e"].num_cached_tokens == 9  # an embedding's pages are as good as any, its tail too


def test_scaled_and_cut():
    raw = paper_vector([3, 1, 2], "last").astype(np.float64)
    for params, expected in (
        (PoolingParams(), raw / np.linalg.norm(raw)),
        (PoolingParams(dimensions=2), raw[:2] / np.linalg.norm(raw[:2])),
        (PoolingParams(dimensions=2, use_activation=False), raw[:2]),
        (PoolingParams(dimensions=EMBED_DIM), raw / np.linalg.norm(raw)),
    ):
        e = engine()
        e.submit("a", [3, 1, 2], params)
        assert vector(drain(e)["a"]).tolist() == expected.astype(np.float32).tolist()
    with pytest.raises(RequestError, match="dimensions=4 is more than the 3 numbers") as error:
        e.submit("b", [3, 1, 2], PoolingParams(dimensions=4))
    assert error.value.param == "dimensions"


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_nan_ends_its_own_request_only(kind):
    class Broken(FakeRunner):
        """NaN in the hidden states of token 5, which only one prompt has, and early in it."""

        def _pool(self, batch, num_rows):
            pooled = super()._pool(batch, num_rows)
            for row in range(num_rows):
                where = slice(batch.query_start[row], batch.query_start[row + 1])
                pooled[0, row] *= np.nan if 5 in batch.tokens[where] else 1
                pooled[1, row] *= np.nan if 5 in self.context(batch, row) else 1
            return pooled

    e = engine(max_num_batched_tokens=6)
    e.runner = Broken(e.limits)
    prompts = {"bad": [1, 5, *[1] * 14], "good": [2] * 10}
    for name, prompt in prompts.items():
        e.submit(name, prompt, PoolingParams(kind, use_activation=False))
    e.submit("tokens", [1, 5, 3], final(ignore_eos=True))
    outputs = drain(e)
    assert outputs["bad"].outputs is None and "not made of numbers" in outputs["bad"].error and outputs["bad"].finished
    assert vector(outputs["good"]).tolist() == paper_vector(prompts["good"], kind).tolist()
    assert outputs["tokens"].outputs[0].token_ids == paper_tokens([1, 5, 3], 8, VOCAB)
    assert e.counters.finished == {"error": 1, "stop": 1, "length": 1}


def test_abort_and_an_id_that_is_used_again():
    """What was computed of the first "a" does not count for the second one."""
    e = engine(max_num_batched_tokens=8)
    e.submit("a", [1] * 30, MEAN)
    e.step()
    e.step()
    e.abort("a")
    (aborted,) = e.step()
    assert aborted.outputs is None and aborted.error == "the request was aborted." and aborted.finished
    e.submit("a", [2] * 30, MEAN)
    assert vector(drain(e)["a"]).tolist() == paper_vector([2] * 30, "mean").tolist()
    assert e.counters.finished == {"abort": 1, "stop": 1}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_step_fails_its_own_requests_only(overlap):
    e = engine(frozenset({2}), overlap, max_num_seqs=2, max_num_batched_tokens=8)
    for i in range(4):
        e.submit(str(i), [i] * 20, MEAN)
    outputs = drain(e)
    assert "out of paper" in outputs["0"].error and outputs["0"].outputs is None
    for i in (2, 3):
        assert vector(outputs[str(i)]).tolist() == paper_vector([i] * 20, "mean").tolist()


def test_a_preempted_mean_counts_no_token_twice():
    e = engine(num_pages=13, max_num_batched_tokens=8, max_num_seqs=2, enable_prefix_caching=False)
    e.submit("old", [1] * 4, final(max_tokens=40, ignore_eos=True))
    e.submit("new", [i % 5 for i in range(30)], MEAN)
    for _ in range(3):
        e.step()
    e.state, request_id = scheduler._preempt_newest(e.state)
    assert request_id == "new"
    output = drain(e)["new"]
    assert vector(output).tolist() == paper_vector([i % 5 for i in range(30)], "mean").tolist()


def test_through_asyncio():
    async def run():
        asynchronous = AsyncEngine(engine())
        asynchronous.start()
        with asynchronous.submit("a", [1, 2, 3], MEAN) as stream, asynchronous.submit("b", [1, 2, 3], final()) as other:
            outputs = await stream.last(), await other.last()
        await asynchronous.close()
        return outputs

    embedded, completed = asyncio.run(run())
    assert vector(embedded).tolist() == paper_vector([1, 2, 3], "mean").tolist()
    assert completed.outputs[0].token_ids == paper_tokens([1, 2, 3], 8, VOCAB, EOS)


# -- a model ---------------------------------------------------------------------------------------------------------------

ENGINE = {"block_size": 16, "max_num_batched_tokens": 32, "max_num_seqs": 4, "max_model_len": 336}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, transformers' model) of a random model with sliding windows."""
    folder = tmp_path_factory.mktemp("model")
    return folder, models.make(folder, Row("", "Qwen3", {"attention_bias": True, **SLIDING}))


def load(folder, **changes) -> LLM:
    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "use_tqdm": False, **ENGINE, **changes}
    return LLM(str(folder), **settings)


@pytest.fixture(scope="module")
def llm(model):
    with load(model[0]) as llm:
        yield llm


def embed(llm, prompts, params) -> np.ndarray:
    return np.stack([vector(output) for output in llm.embed(prompts, params, use_tqdm=False)])


def hidden_states(model, tokens) -> np.ndarray:
    """transformers' outputs of the final norm: float64 [T, E]."""
    with torch.inference_mode():
        return model.model(torch.as_tensor([tokens]), use_cache=False).last_hidden_state[0].double().numpy()


PROMPTS = [row[:n].tolist() for row, n in zip(models.prompts(5, 336, seed=3), (336, 100, 33, 2, 1))]


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_equals_transformers(model, llm, kind):
    """Prompts of one chunk and of many, up to the longest that there can be, together in batches of four."""
    states = [hidden_states(model[1], prompt) for prompt in PROMPTS]
    wanted = np.stack([s[-1] if kind == "last" else s.mean(0) for s in states])
    assert models.errors(embed(llm, PROMPTS, PoolingParams(kind, use_activation=False)), wanted).max() < 1e-5
    scaled = embed(llm, PROMPTS, PoolingParams(kind))
    assert models.errors(scaled, wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).max() < 1e-5
    cut = wanted[:, :7] / np.linalg.norm(wanted[:, :7], axis=1, keepdims=True)
    assert models.errors(embed(llm, PROMPTS, PoolingParams(kind, dimensions=7)), cut).max() < 1e-5


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_a_prefix_hit_changes_nothing(llm, kind):
    params = PoolingParams(kind, use_activation=False)
    llm.reset_prefix_cache()
    first, again = (llm.embed([PROMPTS[0]], params, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (
        0,
        320 if kind == "last" else 0,
    )  # 20 pages; one token is always computed
    assert models.errors(vector(again), vector(first)) < 1e-5


def test_chunks_change_nothing(model, llm):
    with load(model[0], max_num_batched_tokens=512) as whole:
        for params in (RAW, MEAN):
            assert models.errors(embed(llm, PROMPTS, params), embed(whole, PROMPTS, params)).max() < 1e-5


def test_scores_are_cosines_of_pairs(llm):
    one, two, three = PROMPTS[1:4]
    vectors = embed(llm, [one, two, three], RAW)
    cosine = lambda i, j: vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
    scores = lambda *pair: [output.outputs.score for output in llm.score(*pair, use_tqdm=False)]
    assert scores(one, two) == pytest.approx([cosine(0, 1)], abs=1e-5)
    assert scores(one, [two, three, one]) == pytest.approx([cosine(0, 1), cosine(0, 2), 1.0], abs=1e-5)
    assert scores([one, three], [two, two]) == pytest.approx([cosine(0, 1), cosine(2, 1)], abs=1e-5)
    with pytest.raises(RequestError, match="score: 2 first texts and 3 second ones"):
        llm.score([one, two], [one, two, three])


def test_beside_generation_both_are_as_alone(llm):
    sampling = [SamplingParams(temperature=1.0, seed=i, max_tokens=9, ignore_eos=True) for i in range(3)]
    alone = [output.outputs[0].token_ids for output in llm.generate(PROMPTS[1:4], sampling, use_tqdm=False)]
    vectors = {id(params): embed(llm, PROMPTS, params) for params in (RAW, MEAN)}
    outputs = {}
    for i in range(len(PROMPTS)):
        llm.engine.submit(f"mean-{i}", PROMPTS[i], MEAN)
        llm.engine.submit(f"last-{i}", PROMPTS[i], RAW)
        if 1 <= i < 4:
            llm.engine.submit(f"tokens-{i}", PROMPTS[i], sampling[i - 1])
    while llm.engine.has_work:
        outputs |= {output.request_id: output for output in llm.engine.step()}
    for i in range(len(PROMPTS)):
        for name, params in (("last", RAW), ("mean", MEAN)):
            assert models.errors(vector(outputs[f"{name}-{i}"]), vectors[id(params)][i]) < 1e-5
    assert [outputs[f"tokens-{i}"].outputs[0].token_ids for i in range(1, 4)] == alone
    assert llm.engine.stats().num_held_pages == 0


def test_nothing_compiles_after_warm_up():
    with LLM(test_llm.CONFIG, **test_llm.ENGINE) as compiled:
        runner, num_programs = compiled._built.runner, compiled._built.runner.num_compilations
        for params in (RAW, MEAN, PoolingParams(dimensions=3)):
            embed(compiled, PROMPTS[1:], params)
        assert runner.num_compilations == num_programs == runner.num_programs


def test_nan_weights_end_the_request_with_an_error(llm):
    import jax.numpy as jnp

    (stage,) = llm.engine.runner.stages
    weights = stage.leaves
    stage.leaves = {path: jnp.full_like(leaf, jnp.nan) for path, leaf in weights.items()}
    try:
        outputs = llm.embed(PROMPTS[1:3], [RAW, MEAN], use_tqdm=False)
    finally:
        stage.leaves = weights
    assert all(output.outputs is None and "not made of numbers" in output.error for output in outputs)
    assert models.errors(embed(llm, PROMPTS[1:3], RAW), embed(llm, PROMPTS[1:3], RAW)).max() < 1e-5


def test_parameters_one_for_all_or_one_a_prompt(llm):
    default, each = embed(llm, PROMPTS[1:3], None), embed(llm, PROMPTS[1:3], [PoolingParams(), PoolingParams("mean")])
    assert np.linalg.norm(default, axis=1) == pytest.approx(1, abs=1e-6)
    assert models.errors(each[0], default[0]) < 1e-5 and models.errors(each[1], default[1]) > 0.1
    with pytest.raises(RequestError, match="2 prompts but 1 pooling_params"):
        llm.embed(PROMPTS[:2], [RAW])
    with pytest.raises(RequestError, match="pooling_params must be PoolingParams, got SamplingParams"):
        llm.embed(PROMPTS[:2], SamplingParams())
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams, got PoolingParams"):
        llm.generate(PROMPTS[:2], RAW)
    with pytest.raises(RequestError, match="dimensions=49 is more than the 48 numbers"):
        llm.embed(PROMPTS[:2], PoolingParams(dimensions=49))


# -- models that are not causal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Qwen2", "Llama", "GPTNeoX"])
def test_tokens_see_those_after_them(tmp_path, family):
    """is_causal=False: vectors equal those of transformers' own layers under a mask that hides nothing."""
    row = next(row for door in rows().values() for row in door if row.config == family)
    whole = models.make(tmp_path, row)
    prompts = [p[:100] for p in PROMPTS[1:]]
    with load(tmp_path, hf_overrides={"is_causal": False}, max_num_batched_tokens=128) as llm:
        found = {kind: embed(llm, prompts, PoolingParams(kind, use_activation=False)) for kind in ("last", "mean")}
        again = embed(llm, prompts[::-1], MEAN)[::-1]
        with pytest.raises(RequestError, match="this model is not causal: it makes vectors"):
            llm.generate(prompts, SamplingParams(), use_tqdm=False)
        long = [1] * (llm.config.max_num_batched_tokens + 1)
        with pytest.raises(RequestError, match=rf"has {len(long)} tokens and must be computed in one step, of at most"):
            llm.embed([long], RAW, use_tqdm=False)
    for i, prompt in enumerate(prompts):
        nothing = torch.zeros(1, 1, len(prompt), len(prompt))
        with torch.inference_mode():
            states = whole.base_model(torch.as_tensor([prompt]), attention_mask=nothing).last_hidden_state[0].numpy()
        assert models.errors(found["last"][i], states[-1]) < 1e-5
        assert models.errors(found["mean"][i], states.mean(0)) < 1e-5
    assert models.errors(again, found["mean"]).max() < 1e-5


def test_what_cannot_be_without_causality_is_refused(tmp_path):
    models.make(tmp_path, next(row for row in rows()["gemma"] if row.name == "gemma3"))
    with pytest.raises(ValueError, match="is_causal=False is not supported with sliding windows"):
        load(tmp_path, hf_overrides={"is_causal": False})
