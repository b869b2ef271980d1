"""LoRA adapters: files of PEFT itself; every answer equals that of the model with the adapter merged into its weights."""

import json

import numpy as np
import pytest
import torch
from fakes import FakeRunner, paper_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_hf import TOLERANCE, errors, logits_of, prompts
from tiny_lora import ALL, ROWS, adapted
from tiny_lora import three as three

from jaxpaged import LLM, LoRARequest, PoolingParams, RequestError, SamplingParams, scheduler
from jaxpaged.adapter import Adapter
from jaxpaged.batch import ladder
from jaxpaged.engine import Engine
from jaxpaged.request import RequestOutputKind
from jaxpaged.scheduler import Limits

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
ENGINE = {"skip_tokenizer_init": True, "enforce_eager": True, "use_tqdm": False, "block_size": 16, "max_num_seqs": 4,
          "max_num_batched_tokens": 64, "max_model_len": 160, "enable_lora": True, "max_lora_rank": 8}  # fmt: skip


def check(output, model) -> None:
    """Greedy tokens and their logprobs are those of a full forward pass of `model`."""
    ids, tokens = output.prompt_token_ids, output.outputs[0].token_ids
    logprobs = torch.log_softmax(torch.as_tensor(logits_of(model, [ids + tokens])[0]), -1).numpy()[len(ids) - 1 : -1]
    assert tokens == logprobs.argmax(-1).tolist()
    found = np.array([entry[token].logprob for token, entry in zip(tokens, output.outputs[0].logprobs)])
    assert errors(found, logprobs.max(-1)) < TOLERANCE["float32"]


CASES = {
    "all of llama": ("llama", ALL, {}),
    "q and v alone, rank-stabilised": ("llama", ["q_proj", "v_proj"], {"use_rslora": True}),
    "alpha and rank by module": ("qwen3", ALL, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "up_proj": 7}}),
    "transposed matrices": ("gpt2", ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "fused by head": ("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h"], {}),
    "sliding window": ("gemma3", ALL, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_merged_model(tmp_path, case):
    name, targets, config = CASES[case]
    base, merged = adapted(ROWS[name], tmp_path, targets, **config)
    ids = prompts(100).tolist()
    with LLM(str(tmp_path / "model"), **ENGINE) as llm:
        request = LoRARequest("a", 1, str(tmp_path / "adapter"))
        with_it, without = llm.generate([ids, ids], GREEDY, lora_request=[request, None], use_tqdm=False)
        (again,) = llm.generate([ids], GREEDY, lora_request="a", use_tqdm=False)
    check(with_it, merged)
    check(without, base)
    check(again, merged)
    assert (with_it.lora_request.lora_name, without.lora_request) == ("a", None)
    assert with_it.outputs[0].token_ids != without.outputs[0].token_ids, "the adapter changes nothing: the test shows nothing"
    assert again.num_cached_tokens >= 96 and without.num_cached_tokens == 0  # pages are shared by version only


@pytest.mark.parametrize("max_loras", [1, 2, 3])
def test_many_adapters_in_one_batch(three, max_loras):
    """With fewer places than adapters some wait; nothing is compiled for any of them."""
    folder, models = three
    order = [None, "adapter", "b", "c", "adapter", None, "c", "b"]
    shared = prompts(8, 40)
    shared[:, :32] = shared[0, :32]
    with LLM(str(folder / "model"), max_loras=max_loras, **{**ENGINE, "enforce_eager": False}) as llm:
        before = count(llm, "compilations")
        requests = [name and LoRARequest(name, i, str(folder / name)) for i, name in enumerate(order)]
        outputs = llm.generate(shared.tolist(), GREEDY, lora_request=requests, use_tqdm=False)
        assert count(llm, "compilations") == before
        assert llm.list_loras() == ["adapter", "b", "c"]
    for name, output in zip(order, outputs):
        check(output, models[name])


def count(llm, name) -> float:
    return next(metric.value for metric in llm.get_metrics() if metric.name == name)


def test_a_new_version_takes_over_and_shares_nothing_with_the_old(three):
    folder, models = three
    ids = prompts(50).tolist()
    with LLM(str(folder / "model"), **ENGINE) as llm:
        llm.add_lora(LoRARequest("x", 1, str(folder / "b")))
        check(llm.generate([ids], GREEDY, lora_request="x", use_tqdm=False)[0], models["b"])
        with pytest.raises(RequestError, match="'x' is loaded already"):
            llm.add_lora(LoRARequest("x", 1, str(folder / "c")))
        llm.add_lora(LoRARequest("x", 1, str(folder / "c")), replace=True)
        (output,) = llm.generate([ids], GREEDY, lora_request="x", use_tqdm=False)
        check(output, models["c"])
        assert output.num_cached_tokens == 0
        llm.remove_lora("x")
        with pytest.raises(RequestError, match="there is no LoRA adapter 'x'; loaded: none"):
            llm.generate([ids], GREEDY, lora_request="x", use_tqdm=False)


def test_from_memory(three):
    """A pytree, nested or not, and no file."""
    folder, models = three
    tensors = load_file(folder / "c" / "adapter_model.safetensors")
    config = json.loads((folder / "c" / "adapter_config.json").read_text())
    nested: dict = {}
    for name, array in tensors.items():
        at = nested
        *path, last = name.removeprefix("base_model.model.").split(".")
        for part in path:
            at = at.setdefault(part, {})
        at[last] = array
    with LLM(str(folder / "model"), max_loras=2, **ENGINE) as llm:
        both = [LoRARequest("flat", tensors=tensors, config=config), LoRARequest("tree", tensors=nested, config=config)]
        for output in llm.generate([prompts(30).tolist()] * 2, GREEDY, lora_request=both, use_tqdm=False):
            check(output, models["c"])


def test_embeddings_and_scores(three):
    folder, models = three
    ids = prompts(2, 30).tolist()
    with LLM(str(folder / "model"), **ENGINE) as llm:
        request = LoRARequest("b", 1, str(folder / "b"))
        vectors = llm.embed(ids, PoolingParams(), lora_request=[request, None], use_tqdm=False)
        (score,) = llm.score(ids[0], ids[1], lora_request=request, use_tqdm=False)
    both = []
    for name, prompt, vector in zip(("b", None), ids, vectors):
        with torch.inference_mode():
            hidden = models[name].model(torch.as_tensor([prompt])).last_hidden_state[0, -1].numpy()
        assert errors(np.array(vector.outputs.embedding), hidden / np.linalg.norm(hidden)) < TOLERANCE["float32"]
        with torch.inference_mode():
            both.append(models["b"].model(torch.as_tensor([prompt])).last_hidden_state[0, -1].numpy())
    assert score.outputs.score == pytest.approx(both[0] @ both[1] / np.prod([np.linalg.norm(x) for x in both]), abs=1e-5)


def test_of_a_quantised_model(three):
    """An adapter of zeros changes nothing, to the bit; another one changes what the small weights give."""
    folder, _ = three
    tensors = load_file(folder / "b" / "adapter_model.safetensors")
    config = json.loads((folder / "b" / "adapter_config.json").read_text())
    zeros = LoRARequest("zeros", tensors={name: 0 * x for name, x in tensors.items()}, config=config)
    real = LoRARequest("real", tensors=tensors, config=config)
    with LLM(str(folder / "model"), quantization="int8", max_loras=2, **ENGINE) as llm:
        outputs = llm.generate([prompts(30).tolist()] * 3, GREEDY, lora_request=[None, zeros, real], use_tqdm=False)
    without, nothing, changed = ([e[t].logprob for t, e in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)] for o in outputs)
    assert without == nothing != changed


# -- what is wrong with one is said by name ------------------------------------------------------------------------------------


def broken(folder, tmp_path, tensors=lambda t: t, **config):
    """The adapter "b", changed."""
    (tmp_path / "broken").mkdir()
    save_file(tensors(load_file(folder / "b" / "adapter_model.safetensors")), tmp_path / "broken" / "adapter_model.safetensors")
    said = json.loads((folder / "b" / "adapter_config.json").read_text())
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return LoRARequest("broken", 1, str(tmp_path / "broken"))


def without_first(tensors):
    return dict(list(tensors.items())[1:])


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
WRONG = {
    "shape": (lambda t: {**t, FIRST: np.ones((8, 7), np.float32)}, {},
              r"down_proj has lora_A \[8, 7\] and lora_B \[48, 8\]; this model's has 80 inputs and 48 outputs"),
    "rank": (lambda t: {**t, FIRST: np.ones((9, 80), np.float32), FIRST.replace("_A", "_B"): np.ones((48, 9), np.float32)}, {},
             "down_proj has rank 9, max_lora_rank is 8; start with max_lora_rank=9"),
    "half": (without_first, {}, "1 tensors are missing: model.layers.0.*down_proj.lora_A"),
    "module": (lambda t: {**t, "base_model.model.model.wobble.lora_A.weight": np.ones((2, 2), np.float32)}, {},
               "1 modules cannot be adapted: model.wobble; linear layers of attention and MLPs can"),
    "layer": (lambda t: {**t, FIRST.replace(".0.", ".9."): np.ones((2, 2), np.float32)}, {}, "model.layers.9.mlp.down_proj"),
    "embedding": (lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 2), np.float32)}, {},
                  "lora_embedding_A' is not supported"),
    "dora": (lambda t: t, {"use_dora": True}, "use_dora=True in adapter_config.json is not supported"),
    "kind": (lambda t: t, {"peft_type": "LOHA"}, "peft_type='LOHA'"),
    "saved modules": (lambda t: t, {"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(three):
    with LLM(str(three[0] / "model"), **ENGINE) as llm:
        yield llm


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_adapter_is_refused(three, engine, tmp_path, case):
    change, config, message = WRONG[case]
    with pytest.raises(RequestError, match=message) as caught:
        engine.generate([[1, 2]], GREEDY, lora_request=broken(three[0], tmp_path, change, **config), use_tqdm=False)
    assert caught.value.status == 400 and engine.list_loras() == [] and not engine.engine.has_work


def test_a_pickle_is_never_opened(engine, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(RequestError, match="adapter_model.bin is a pickle.*safe_serialization=True"):
        engine.add_lora(LoRARequest("p", 1, str(tmp_path)))
    with pytest.raises(RequestError, match="is no folder with adapter_config.json"):
        engine.add_lora(LoRARequest("p", 1, str(tmp_path / "nowhere")))


def test_bad_requests(three, engine):
    with pytest.raises(RequestError, match="2 prompts but 1 lora_requests"):
        engine.generate([[1], [2]], GREEDY, lora_request=["a"], use_tqdm=False)
    with pytest.raises(RequestError, match="lora_request must be a LoRARequest or the name of a loaded adapter, got int"):
        engine.generate([[1]], GREEDY, lora_request=3, use_tqdm=False)
    with LLM(str(three[0] / "model"), **{**ENGINE, "enable_lora": False}) as llm:
        with pytest.raises(RequestError, match="LoRA adapters are off; start with enable_lora=True"):
            llm.generate([[1]], GREEDY, lora_request=LoRARequest("b", 1, str(three[0] / "b")), use_tqdm=False)
    with LLM(str(three[0] / "model"), max_cpu_loras=1, **ENGINE) as llm:
        llm.add_lora(LoRARequest("b", 1, str(three[0] / "b")))
        with pytest.raises(RequestError, match="1 LoRA adapters are loaded and max_cpu_loras is 1; unload one: b"):
            llm.add_lora(LoRARequest("c", 1, str(three[0] / "c")))


# -- scheduling, on paper -----------------------------------------------------------------------------------------------------

ADAPTERS = [None, *(Adapter(f"a{i}", f"a{i}@{i}", "", i, {}) for i in (1, 2, 3))]
FINAL = SamplingParams(temperature=0, output_kind=RequestOutputKind.FINAL_ONLY)
loads = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 12), st.integers(0, 4), st.integers(0, 3)),
    min_size=1, max_size=9,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(load=loads, overlap=st.booleans(), max_loras=st.integers(1, 3), num_pages=st.integers(10, 30),
       fail_at=st.sets(st.integers(1, 12), max_size=2))  # fmt: skip
def test_every_load_equals_the_oracle(load, overlap, max_loras, num_pages, fail_at):
    """Whichever adapters are in use, moved out, moved in again, or lost with a step that failed."""
    limits = Limits(max_num_seqs=3, max_num_batched_tokens=8, page_size=4, num_pages=num_pages, max_model_len=36, vocab_size=50,
                    max_loras=max_loras)  # fmt: skip
    e = Engine(limits, FakeRunner(limits, frozenset(fail_at)), ladder(8, 3), async_scheduling=overlap)
    outputs = {}
    for i, (prompt, output, pause, which) in enumerate(load):
        e.submit(str(i), prompt, FINAL.clone(max_tokens=output), adapter=ADAPTERS[which])
        for _ in range(pause):
            outputs |= {o.request_id: o for o in e.step()}
            scheduler.check(e.state)
    while e.has_work:
        outputs |= {o.request_id: o for o in e.step()}
        scheduler.check(e.state)
    assert e.stats().num_held_pages == 0
    for i, (prompt, output, _, which) in enumerate(load):
        if outputs[str(i)].error is None:
            assert outputs[str(i)].outputs[0].token_ids == paper_tokens(prompt, output, 50, adapter=which)
    assert fail_at or all(output.error is None for output in outputs.values())
