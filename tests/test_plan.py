"""`jaxpaged plan` as a user meets it, and what it says against the engine's own account and the compiler's."""

import dataclasses
import json
import shlex
import sys

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import MODELS, folder

from jaxpaged import build, cli, devices_compiler, plan, plan_compile, plan_report
from jaxpaged.config import EngineConfig
from jaxpaged.devices import DEVICES, device
from jaxpaged.plan_advice import advice
from jaxpaged.plan_model import Source, fit, fits, setting
from jaxpaged.plan_times import itl, least_itl, prompt_steps, room, speeds, ttft, typical_steps
from jaxpaged.request import RequestError

H200 = DEVICES["h200"]
compilers = pytest.mark.skipif(devices_compiler.missing() is not None, reason=devices_compiler.missing() or "")


def on(name: str, device_name: str = "h200", **config):
    return setting(Source(MODELS[name]), EngineConfig(model=name, **config), DEVICES[device_name])


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Status, standard output, standard error of `jaxpaged plan arguments`."""
    monkeypatch.setattr(sys, "argv", ["jaxpaged", "plan", *arguments])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    return status, *capsys.readouterr()


# -- memory ------------------------------------------------------------------------------------------------------------------


def test_memory_of_llama_3_8b_by_hand():
    fitted, memory = fit(on("Llama-3-8B"), temporaries=10**9)
    weights = 2 * 8_030_261_248
    limit = int(151_397_597_184 * 0.92 * 0.95)
    page = 32 * 128 * 1024
    assert (memory.weights, memory.page_bytes) == (weights, page)
    assert memory.num_pages == (limit - weights - 10**9) // page
    assert memory.per_sequence == 8192 // 32 and fitted.config.max_model_len == 8192
    assert room(fitted, memory, 8192) == (memory.num_pages - 1) // 256


def test_a_model_that_is_too_large_says_what_would_fit():
    given_ = on("Llama-3-70B", max_model_len=8192)
    with pytest.raises(RequestError, match="weights and temporaries take"):
        fit(given_)
    found = [one.flags for one in advice(given_)]
    assert found[0] == "--tensor-parallel-size 2" and "--quantization fp8" in found
    assert "--device b200 --tensor-parallel-size 1" in found
    assert not any("max-model-len" in flags for flags in found)  # the weights alone are too many


def test_advice_is_true():
    """Each change that is said to fit does, and what comes before it of its kind does not."""
    given_ = on("Llama-3-70B", "l40s", max_model_len=8192)
    assert fits(given_) is None and fits(given_.change(tensor_parallel_size=2)) is None
    found = {one.flags: one.sequences for one in advice(given_)}
    plan_ = fits(given_.change(tensor_parallel_size=4))
    assert plan_ and found["--tensor-parallel-size 4"] == (plan_.num_pages - 1) / plan_.per_sequence
    assert not any("quantization" in flags for flags in found)  # 70 billion numbers of 4 bits, and a 16-bit embedding
    assert not any(fits(given_.change(quantization=form)) for form in ("fp8", "int8", "int4"))


def test_a_length_that_fits_is_found():
    given_ = on("Gemma-3-27B", "a100", max_model_len=131072, gpu_memory_utilization=0.8)
    assert fits(given_) is None
    (flags,) = [one.flags for one in advice(given_) if one.flags.startswith("--max-model-len")]
    length = int(flags.split()[1])
    assert fits(given_.change(max_model_len=length)) and not fits(given_.change(max_model_len=2 * length))


def test_auto_length_gets_shorter_until_it_fits():
    shorter, memory = fit(on("Gemma-3-27B", "a100", gpu_memory_utilization=0.8))
    assert 0 < int(shorter.config.max_model_len or 0) < 131072 and memory.num_pages > memory.per_sequence


@given(st.sampled_from(["Llama-3-8B", "Llama-3-70B", "Qwen3-30B-A3B", "Gemma-3-27B"]), st.sampled_from([1, 2, 4]),
       st.sampled_from(["h100", "h200", "b200"]))  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_more_devices_hold_no_less(name, size, gpu):
    few, many = (on(name, gpu, tensor_parallel_size=n, max_model_len=4096) for n in (size, 2 * size))
    assert max(map(many.weights, many.stages)) < max(map(few.weights, few.stages))
    assert max(map(many.page_bytes, many.stages)) <= max(map(few.page_bytes, few.stages))
    plan_ = fits(few)
    if plan_ is not None:
        more = fits(many)
        assert more is not None and more.num_pages >= plan_.num_pages


def test_smaller_caches_hold_more():
    pages = [fit(on("Llama-3-8B", kv_cache_dtype=dtype))[1] for dtype in ("auto", "fp8")]
    assert pages[1].num_pages > 1.8 * pages[0].num_pages


# -- time --------------------------------------------------------------------------------------------------------------------


def test_prompts_are_computed_to_the_end():
    """Decodes of the prompts that are done come first; no step has more tokens than it may."""
    computed, done = 0, []
    for rows, ready in prompt_steps(5, 300, 256):
        assert rows.count.sum() <= 256 and (rows.count > 0).all()
        computed += int(rows.count[rows.start < 300].sum())
        done.append(ready)
    assert computed == 5 * 300 and done[-1] == 5 and done == sorted(done)


def test_times_of_a_pipeline():
    """Four stages, full batches: a token takes as long, four batches are on their way."""
    one, four = on("Llama-3-8B"), on("Llama-3-8B", pipeline_parallel_size=4)
    assert itl(four, 1, 100)[0] == pytest.approx(itl(one, 1, 100)[0], rel=0.1)
    assert itl(four, 256, 2000)[0] < 0.5 * itl(one, 256, 2000)[0]
    assert ttft(four, 16, 8000)[1] < 0.4 * ttft(one, 16, 8000)[1]


def test_speeds_are_in_order():
    given_, memory = fit(on("Llama-3-8B"))
    found = speeds(given_, memory, [1, 8, None], [128, 10**6])
    assert [one.prompt for one in found] == [128] * 3 + [8191] * 3 and found[-1].has_room
    assert all(one.itl > least_itl(given_) and one.ttft_last >= one.ttft_first for one in found)
    assert found[0].itl < found[2].itl and found[0].tokens_per_s < found[2].tokens_per_s


def test_the_shortest_length_has_times_too():
    given_, memory = fit(on("tiny", max_model_len=1))
    assert [one.prompt for one in speeds(given_, memory, [1], [128, 8192])] == [1]


def test_a_pipelines_steps_are_of_a_part_of_the_decodes():
    given_ = on("tiny", pipeline_parallel_size=4)
    decodes, _ = typical_steps(given_, 30, 100)
    assert (decodes.tokens, decodes.rows) == (8, 8)


ADAPTERS = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 32}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("name", ["tiny", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"])
def test_room_for_adapters_is_planned(name, sizes):
    tensor, pipeline = sizes
    given_ = on(name, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, **ADAPTERS)
    parallel = build.make_parallel(given_.config, given_.decoder, jax.devices())
    assert max(map(given_.weights, given_.stages)) == build.make_blueprint(given_.config, parallel).weight_bytes
    assert given_.weights(given_.stages[0]) > given_.change(enable_lora=False).weights(given_.stages[0])


def test_a_compiler_that_says_less_changes_nothing(monkeypatch):
    """The engine plans with its estimate, and again only if that was too little."""
    less, more = (plan_compile.Compiled(n, 1, 1, {}, {}, (2,), 1.0) for n in (1, 8 << 30))
    pages = {}
    for name, said in (("no", None), ("less", less), ("more", more)):
        monkeypatch.setattr(plan_compile, "compiled", lambda *_, said=said: (said, ""))
        pages[name] = plan.make(Source(MODELS["Llama-3-70B"]), EngineConfig(tensor_parallel_size=2), H200).memory.num_pages
    assert pages["less"] == pages["no"] > pages["more"]


# -- what the compiler says --------------------------------------------------------------------------------------------------

SMALL = {"max_num_seqs": 16, "max_num_batched_tokens": 1024, "max_model_len": 1024}


def with_layers(name: str, count: int, **config):
    found = on(name, **{**SMALL, **config})
    return dataclasses.replace(found, decoder=dataclasses.replace(found.decoder, layers=found.decoder.layers[:count]))


@compilers
def test_a_compiler_confirms_the_plan():
    given_, memory = fit(on("tiny", tensor_parallel_size=2, **SMALL))
    found, why = plan_compile.compiled(given_, memory)
    assert found is not None, why
    assert found.aliased == found.donated > 0 and 0 < found.temporaries < given_.expected_temporaries
    (stage,) = given_.stages
    planned = {work.name: work.messages for work in stage.collectives(1024, 16)[:-1]}
    assert {kind: count for kind, (count, _) in found.collectives["1024 tokens"].items()} == planned
    planned = {work.name: (work.messages, work.payload) for work in stage.collectives(16, 16)[:-1]}
    assert found.collectives["16 tokens"] == planned == {"all-reduce": (9, 9 * 256 * 16 * 2)}


@compilers
@pytest.mark.slow
@pytest.mark.parametrize("name, few", [("Llama-3-8B", (2, 4)), ("Qwen3-30B-A3B", (2, 4)), ("Gemma-3-27B", (6, 12))])
def test_a_straight_line_is_what_all_layers_give(name, few):
    """Some layers compiled, and a line through them, against three times as many."""
    given_ = with_layers(name, 3 * few[0], tensor_parallel_size=2)
    memory = fit(given_)[1]
    line, whole = plan_compile.compiled(given_, memory)[0], plan_compile.compiled(given_, memory, all_layers=True)[0]
    assert line is not None and whole is not None and (line.layers, whole.layers) == (few, (3 * few[0],))
    assert line.collectives == whole.collectives
    assert line.temporaries == pytest.approx(whole.temporaries, rel=0.1)  # which buffers share a place differs a little


def test_collectives_are_read_from_a_program():
    text = """
  %a = bf16[8,4]{1,0} all-reduce(%x), replica_groups={}
  %b = (bf16[2,4]{1,0}, f32[8]{0}) all-reduce-start(%y, %z), channel_id=1
  %c = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%y)
  %d = bf16[64]{0} all-gather-done(%c)
  %e = f32[3] add(%all-reduce, %q)"""
    assert plan_compile.collectives(text) == {"all-reduce": (2, 64 + 16 + 32), "all-gather": (1, 128)}


def test_without_compilers_a_plan_says_what_to_install(monkeypatch):
    monkeypatch.setattr(devices_compiler, "missing", lambda: "there is no ptxas")
    text = plan_report.text(plan.make(Source(MODELS["tiny"]), EngineConfig(model="tiny"), H200))
    assert "not compiled: there is no ptxas" in text and "pip install --no-deps --target" in text


# -- the command -------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, monkeypatch, capsys):
    model, out = folder(tmp_path, "Llama-3-8B"), tmp_path / "plan.json"
    status, text, _ = call(
        monkeypatch, capsys, str(model), "--no-compile", "--tensor-parallel-size", "2", "--json", str(out), "-q"
    )
    assert status == 0
    assert "on 2 x NVIDIA H200 (tensor 2" in text and "have not been checked on a GPU" in text
    assert f"jaxpaged serve {model} --max-model-len 8192 --max-num-seqs 256" in text and text.endswith(
        "--tensor-parallel-size 2\n"
    )
    said = json.loads(out.read_text())
    assert said["fits"] and said["devices"] == 2 and said["memory"]["weights"] == said["stages"][0]["weights"]
    assert {one["batch"] for one in said["speeds"]} >= {1, 8, 32, 128} and said["checked_on_a_gpu"] is False
    assert "hf_token" not in said["config"]


def test_the_command_that_is_printed_says_all_that_was_asked(tmp_path, monkeypatch, capsys):
    """Given to `plan` again, it gives the same plan."""
    model, out = folder(tmp_path / "a folder", "Gemma-3-27B"), tmp_path / "plan.json"
    asked = ("--no-compile", "-q", "--json", str(out))
    flags = ("--hf-overrides", '{"max_position_embeddings": 200000}', "--max-model-len", "150000", "--kv-cache-dtype", "int8",
             "--disable-hybrid-kv-cache-manager", "--no-enable-prefix-caching", "--enable-lora", "--quantization", "int8",
             "--scheduling-policy", "priority", "--seed", "5", "--tensor-parallel-size", "2")  # fmt: skip
    assert call(monkeypatch, capsys, str(model), *asked, *flags)[0] == 0
    first = json.loads(out.read_text())
    program, command, *arguments = shlex.split(first["command"])
    assert (program, command) == ("jaxpaged", "serve")
    assert call(monkeypatch, capsys, *arguments, *asked)[0] == 0
    again = json.loads(out.read_text())
    same = ("config", "memory", "command")
    assert [again[name] for name in same] == [first[name] for name in same]


def test_what_does_not_fit_ends_with_status_1(tmp_path, monkeypatch, capsys):
    model = folder(tmp_path, "Llama-3-70B")
    status, text, _ = call(monkeypatch, capsys, str(model), "--no-compile", "--device", "l40s", "-q")
    assert status == 1 and "It does not fit" in text and "--tensor-parallel-size 4" in text


def test_a_simulation_is_drawn(tmp_path, monkeypatch, capsys):
    model, png = folder(tmp_path, "tiny"), tmp_path / "s.png"
    status, text, _ = call(monkeypatch, capsys, str(model), "--no-compile", "-q", "--plot", str(png), "--rates", "5,50",
                           "--simulate", "synthetic:prompt=40,output=8,n=20", "--json", str(tmp_path / "p.json"))  # fmt: skip
    assert status == 0 and png.read_bytes()[:4] == b"\x89PNG" and "TTFT p50" in text
    assert [one["rate"] for one in json.loads((tmp_path / "p.json").read_text())["simulation"]] == [5, 50]


@pytest.mark.parametrize("flags, said", [
    (["--device", "h2000"], "device must be one of h100, h200"),
    (["--tensor-parallel-size", "3"], "sizes that work: 1, 2, 4, 8"),
    (["--pipeline-parallel-size", "9"], "pipeline_parallel_size=9"),
    (["--max-model-len", "4096"], "max_model_len=4096 is more than the 2048 positions"),
    (["--batch-sizes", "1,two"], "batch_sizes must be positive integers"),
    (["--rates", "1,-2"], "rates must be numbers above 0"),
    (["--simulate", "nowhere.jsonl"], "cannot be read as a trace"),
    (["--simulate", "synthetic:n=2", "--arrivals", "trace"], "has no times"),
    (["--quantization", "awq"], "is a checkpoint's format"),
])  # fmt: skip
def test_bad_input_is_one_clear_error(tmp_path, monkeypatch, capsys, flags, said):
    status, _, err = call(monkeypatch, capsys, str(folder(tmp_path, "tiny")), "--no-compile", "-q", *flags)
    assert status == 2 and said in err and err.count("\n") == 1


def test_a_device_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.toml").write_text('base = "h200"\nname = "half"\nmemory = 15e9\n')
    model = folder(tmp_path, "Llama-3-8B")
    status, text, _ = call(monkeypatch, capsys, str(model), "--no-compile", "-q", "--device", str(tmp_path / "mine.toml"))
    assert status == 1 and "1 x half" in text and "--quantization fp8" in text
    assert device(str(tmp_path / "mine.toml")).memory == 15 * 10**9


def test_the_demo_is_planned_from_its_header(demo_gguf, monkeypatch, capsys):
    for more in ([], ["--quantization", "gguf"]):
        status, text, _ = call(monkeypatch, capsys, str(demo_gguf), "--no-compile", "-q", *more)
        assert status == 0 and "30 layers, bfloat16" in text
