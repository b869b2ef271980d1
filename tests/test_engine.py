"""The engine on the paper cache: whatever the schedule, each request gets the tokens of the oracle."""

import pytest
from fakes import FakeRunner, paper_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged import scheduler
from jaxpaged.batch import ladder
from jaxpaged.engine import Engine
from jaxpaged.reach import Reach
from jaxpaged.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.scheduler import Limits

VOCAB = 50
EOS = frozenset({7})


def engine(fail_at=frozenset(), overlap=True, **changes) -> Engine:
    base = dict(max_num_seqs=4, max_num_batched_tokens=16, page_size=4, num_pages=40, max_model_len=64, vocab_size=VOCAB)
    limits = Limits(**{**base, **changes})
    buckets = ladder(limits.max_num_batched_tokens, limits.max_num_seqs)
    return Engine(limits, FakeRunner(limits, fail_at), buckets, None, EOS, async_scheduling=overlap)


def drain(e: Engine) -> dict:
    outputs = {}
    while e.has_work:
        for output in e.step():
            outputs[output.request_id] = output
        scheduler.check(e.state)
    assert e.stats().num_held_pages == 0
    return outputs


def final(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "output_kind": RequestOutputKind.FINAL_ONLY, **changes})


loads = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=30),  # few words: many shared prefixes
        st.integers(1, 20),  # output
        st.integers(1, 3),  # samples
        st.integers(0, 6),  # steps before the next arrives
        st.integers(0, 2),  # priority
    ),
    min_size=1,
    max_size=9,
)


# Groups of layers, those that see most first.
REACHES = [
    (Reach(),), (Reach(window=5),), (Reach(chunk=8),), (Reach(), Reach(window=7)), (Reach(window=17), Reach(window=3)),
    (Reach(), Reach(window=1), Reach(window=12), Reach(chunk=8)), (Reach(), Reach()),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    load=loads,
    overlap=st.booleans(),
    num_pages=st.integers(15, 40),
    max_num_seqs=st.integers(1, 5),
    budget=st.integers(5, 20),
    page_size=st.sampled_from([4, 5, 16]),
    threshold=st.sampled_from([0, 3]),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    reaches=st.sampled_from(REACHES),
    pipeline=st.sampled_from([1, 1, 2, 4]),
)
def test_every_load_equals_the_oracle(
    load, overlap, num_pages, max_num_seqs, budget, page_size, threshold, policy, caching, reaches, pipeline
):
    """Whatever the layers see: the oracle's token depends on what the layers see that see most."""
    e = engine(overlap=overlap, num_pages=num_pages * len(reaches), max_num_seqs=max_num_seqs, reaches=reaches,
               max_num_batched_tokens=budget, policy=policy, page_size=page_size,
               long_prefill_token_threshold=threshold, enable_prefix_caching=caching, pipeline=pipeline)  # fmt: skip
    outputs = {}
    for i, (prompt, output, n, pause, priority) in enumerate(load):
        params = final(max_tokens=output, n=n, temperature=1.0)
        e.submit(str(i), prompt, params, priority)
        for _ in range(pause):
            outputs |= {o.request_id: o for o in e.step()}
            scheduler.check(e.state)
    outputs |= drain(e)
    for i, (prompt, output, n, _, _) in enumerate(load):
        expected = paper_tokens(prompt, output, VOCAB, EOS, reaches[0])
        assert [o.token_ids for o in outputs[str(i)].outputs] == [expected] * n
        reason = "stop" if expected[-1] in EOS else "length"
        assert {o.finish_reason for o in outputs[str(i)].outputs} == {reason}


def test_overlap_dispatches_ahead_of_reading():
    e = engine()
    e.submit("a", [1, 2, 3], final(ignore_eos=True))
    e.step()
    assert e.runner.num_dispatched == 1 and not e.state.seats.num_known[0] > 3
    e.step()
    assert e.runner.num_dispatched == 2 and e.state.seats.num_known[0] == 4


def test_deltas_add_up_to_the_whole():
    e = engine()
    e.submit("a", [1, 2, 3], final(output_kind=RequestOutputKind.DELTA, n=2, temperature=1.0, ignore_eos=True, logprobs=0))
    e.submit("b", [1, 2, 3], final(output_kind=RequestOutputKind.CUMULATIVE, ignore_eos=True))
    parts, lengths, finished = {0: [], 1: []}, [], []
    while e.has_work:
        for output in e.step():
            for o in output.outputs:
                if output.request_id == "a":
                    parts[o.index] += o.token_ids
                    assert len(o.logprobs) == len(o.token_ids)
                else:
                    lengths.append(len(o.token_ids))
            finished += [output.request_id] * output.finished
    expected = paper_tokens([1, 2, 3], 8, VOCAB)
    assert parts == {0: expected, 1: expected}
    assert lengths == list(range(1, 9)) and sorted(finished) == ["a", "b"]


def test_logprobs_belong_to_their_tokens():
    e = engine(max_num_batched_tokens=5)
    prompt = [9, 8, 7, 6, 5, 4, 3, 2, 1]
    e.submit("a", prompt, final(logprobs=1, prompt_logprobs=0, ignore_eos=True))
    e.submit("b", [1] * 9, final(ignore_eos=True))
    out = drain(e)["a"]
    for token, entry in zip(out.outputs[0].token_ids, out.outputs[0].logprobs):
        assert entry[token].logprob == -token
    assert out.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in out.prompt_logprobs[1:]] == prompt[1:]
    assert all(entry[t].logprob == -t for t, entry in zip(prompt[1:], out.prompt_logprobs[1:]))


def test_abort_reports_what_there_is_and_frees_the_pages():
    e = engine()
    e.submit("a", [1, 2, 3], final(ignore_eos=True, max_tokens=40))
    e.submit("b", [2, 2, 3], final(ignore_eos=True))
    for _ in range(4):
        e.step()
    e.abort("a")
    e.abort("nobody")
    outputs = drain(e)
    (aborted,) = outputs["a"].outputs
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == paper_tokens([1, 2, 3], 40, VOCAB)[: len(aborted.token_ids)] and aborted.token_ids
    assert outputs["b"].outputs[0].token_ids == paper_tokens([2, 2, 3], 8, VOCAB)


def test_ids_are_unique_while_they_live():
    e = engine()
    e.submit("a", [1], final())
    with pytest.raises(RequestError, match="'a' is in use"):
        e.submit("a", [2], final())
    drain(e)
    e.submit("a", [2], final())
    assert drain(e)["a"].outputs[0].token_ids == paper_tokens([2], 8, VOCAB, EOS)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_step_fails_its_own_requests_only(overlap):
    e = engine(frozenset({3}), overlap, max_num_seqs=2)
    for i in range(4):
        e.submit(str(i), [i, 2, 3], final(ignore_eos=True))
    outputs = drain(e)
    reasons = [outputs[str(i)].outputs[0].finish_reason for i in range(4)]
    assert reasons == ["error", "error", "length", "length"]
    assert "out of paper" in outputs["0"].error and outputs["2"].error is None
    for i in (2, 3):
        assert outputs[str(i)].outputs[0].token_ids == paper_tokens([i, 2, 3], 8, VOCAB)


def test_a_request_that_can_never_fit_is_refused_at_once():
    e = engine(num_pages=5)
    with pytest.raises(RequestError, match="the cache has 4"):
        e.submit("a", [1] * 20, final(max_tokens=20))
    assert not e.has_work


def test_page_waste_is_at_most_one_partly_filled_page_a_sequence():
    e = engine(max_num_seqs=4)
    for i in range(4):
        e.submit(str(i), [i] * (3 + 2 * i), final(ignore_eos=True, max_tokens=20))
    while e.has_work:
        e.step()
        seats = e.state.seats
        waste = seats.num_pages * 4 - seats.num_computed
        assert (waste[seats.active] < 4).all()


@settings(max_examples=40, deadline=None)
@given(reports=st.lists(st.booleans(), min_size=1, max_size=40), n=st.integers(1, 3), aborted=st.booleans())
def test_what_is_not_reported_at_once_comes_with_the_next_report(reports, n, aborted):
    e = engine()
    params = SamplingParams(temperature=1, seed=1, n=n, max_tokens=12, output_kind=RequestOutputKind.DELTA)
    e.submit("a", [1, 2, 3], params)
    e.submit("b", [1, 2, 4], final())
    tokens, finals = {i: [] for i in range(n)}, []
    for number, report in enumerate(reports + [True] * 60):
        if aborted and number == 5:
            e.abort("b")
        e.advance()
        for output in e.take_outputs() if report else []:
            finals += [output.request_id] * output.finished
            for completion in output.outputs if output.request_id == "a" else ():
                tokens[completion.index] += completion.token_ids
    assert sorted(finals) == ["a", "b"] and not e.has_work
    assert all(found == paper_tokens([1, 2, 3], 12, VOCAB, EOS) for found in tokens.values())
    assert e.stats().num_held_pages == 0


def test_steps_in_a_pipeline_have_sequences_of_their_own():
    """8 sequences, 4 stages: each step has 2 of them, and 4 steps are on their way, of other sequences each."""
    e = engine(max_num_seqs=8, pipeline=4, num_pages=80)
    for i in range(8):
        e.submit(str(i), [i], final(max_tokens=30, ignore_eos=True))
    seen = []
    while e.has_work:
        e.step()
        in_flight = [set(step.plan.slots.tolist()) for step in e._in_flight]
        assert sum(map(len, in_flight)) == len(set().union(*in_flight))
        seen.append([len(slots) for slots in in_flight])
    middle = seen[20:60]
    assert all(sizes == [2, 2, 2] for sizes in middle), "a fourth was waited for, and is scheduled anew at once"


def test_a_long_prompt_in_a_pipeline_holds_up_no_decode_for_good():
    """It has a chunk in every step; the others take turns, and come as far as each other."""
    e = engine(max_num_seqs=4, pipeline=2, num_pages=400, max_model_len=1000, max_num_batched_tokens=16,
               long_prefill_token_threshold=4)  # fmt: skip
    e.submit("long", [1, 2] * 300, final(max_tokens=1))
    for name in "abc":
        e.submit(name, [ord(name) % VOCAB], final(max_tokens=200, ignore_eos=True))
    for _ in range(100):
        e.step()
    known = [int(e.state.seats.num_known[e.state.slot_of[f"{name}"]]) for name in "abc"]
    assert min(known) > 40 and max(known) - min(known) <= 3, known


def test_chunks_of_a_prompt_follow_each_other_through_a_pipeline():
    """Nothing has to come back before the next chunk can begin."""
    e = engine(pipeline=4, max_num_seqs=1)
    e.submit("a", list(range(30)) + [1] * 18, final(max_tokens=2))
    sizes = []
    for _ in range(3):
        e.step()
        sizes.append([int(step.plan.num_tokens.sum()) for step in e._in_flight])
    assert sizes == [[16], [16, 16], [16, 16, 16]]
