"""The command line as a user meets it: on a tiny model with a real tokenizer, in this process and in one of its own."""

import dataclasses
import inspect
import io
import json
import os
import subprocess
import sys
import time

import pytest
import tiny_tokenizers as tiny
from test_llm import CONFIG

import jaxpaged
from jaxpaged import bench, cli, demo, env, flags
from jaxpaged.chat import Conversation
from jaxpaged.config import EngineConfig

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder: config, tokenizer with a chat template; weights are random."""
    folder = tmp_path_factory.mktemp("model")
    backend = tiny.byte_level(400, **{"<|im_start|>": True, "<|im_end|>": True})
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    config = {**CONFIG, "vocab_size": backend.get_vocab_size(), "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ENGINE = {"load_format": "dummy", "enforce_eager": True, "max_num_seqs": 2, "max_num_batched_tokens": 32, "block_size": 4}


@pytest.fixture
def engine_flags(folder):
    return ["--model", str(folder), *(f"--{k.replace('_', '-')}={v}" for k, v in ENGINE.items() if v is not True),
            "--enforce-eager", "-q"]  # fmt: skip


@pytest.fixture(scope="module")
def llm(folder):
    with jaxpaged.LLM(str(folder), use_tqdm=False, **ENGINE) as llm:
        yield llm


def call(monkeypatch, capsys, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    """Status, standard output, standard error of `jaxpaged arguments`."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["jaxpaged", *arguments])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    status = 0
    try:
        cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


# -- help and mistakes -------------------------------------------------------------------------------------------------


def test_help_is_in_groups_and_loads_no_jax():
    code = ("import sys; from jaxpaged.cli import app; app(['generate', '--help'], standalone_mode=False); "
            "assert 'jax' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    for group in (flags.MODEL, flags.MEMORY, flags.SCHEDULING, flags.COMPILING, cli.SAMPLING):
        assert group in done.stdout
    assert "--max-num-batched-tokens" in done.stdout


def test_every_field_of_the_configuration_has_a_flag():
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    assert sorted(flags.HELP) == sorted(names)
    assert set(names) <= set(inspect.signature(cli.generate).parameters)


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"jaxpaged {jaxpaged.__version__}\n", "")


MISTAKES = [
    (["generate", "--temprature", "1", "x"], "--temperature"),
    (["generate", "--temperature", "7", "x"], "temperature must be a number in [0, 2], got 7.0."),
    (["generate", "--model", "/nowhere/at/all", "x"], "There is no file or folder /nowhere/at/all"),
    (["generate", "--max-model-len", "long", "x"], "max_model_len must be a number of tokens"),
    (["generate", "--hf-overrides", "{x", "x"], "--hf-overrides must be a JSON object"),
    (["generate", "--tensor-parallel-size", "2", "x"], "has 9 query heads, 3 key and value heads; sizes that work: 1, 3"),
    (["generate", "-f", "/nowhere.txt"], "/nowhere.txt cannot be read"),
    (["generate", "-f", "/nowhere.txt", "x"], "not both"),
    (["bench", "latency", "--input-len", "many"], "'--input-len'"),
    (["chat", "--top-p", "2"], "top_p must be a number in (0, 1], got 2.0."),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[" ".join(a[:2]) + m[:12] for a, m in MISTAKES])
def test_mistakes_are_said_and_end_with_status_2(monkeypatch, capsys, arguments, message):
    status, out, err = call(monkeypatch, capsys, *arguments)
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


def test_no_prompt_at_all(monkeypatch, capsys, engine_flags):
    status, _, err = call(monkeypatch, capsys, "generate", *engine_flags, stdin="")
    assert status == 2 and "there is no prompt" in err


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_prints_prompt_and_text(monkeypatch, capsys, engine_flags):
    status, out, _ = call(monkeypatch, capsys, "generate", "the cat", "a dog", "--max-tokens", "5", *engine_flags)
    assert status == 0
    first, second = out.split("> a dog")
    assert first.startswith("> the cat\n") and len(first.strip().splitlines()) > 1 and second.strip()


def test_generate_json_says_everything(monkeypatch, capsys, engine_flags, tmp_path):
    (tmp_path / "prompts").write_text("the cat\n\na dog\n")
    asked = "--json --n=2 --max-tokens=4 --temperature=1 --sampling-seed=3 --logprobs=1 --ignore-eos".split()
    status, out, _ = call(monkeypatch, capsys, "generate", "-f", str(tmp_path / "prompts"), *asked, *engine_flags)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["prompt"] for line in lines] == ["the cat", "a dog"]
    for line in lines:
        assert [len(o["token_ids"]) for o in line["outputs"]] == [4, 4] and line["error"] is None
        assert all(str(t) in entry for o in line["outputs"] for t, entry in zip(o["token_ids"], o["logprobs"]))


def test_generate_reads_standard_input_whole(monkeypatch, capsys, engine_flags):
    _, out, _ = call(monkeypatch, capsys, "generate", "--json", "--max-tokens", "1", *engine_flags, stdin="two\nlines\n")
    assert json.loads(out)["prompt"] == "two\nlines\n"


def test_a_prompt_that_is_too_long_says_the_numbers(monkeypatch, capsys, engine_flags):
    status, out, err = call(monkeypatch, capsys, "generate", "a b c d e f g h", "--max-tokens", "300", *engine_flags)
    assert status == 2 and out == "" and "max_model_len is 256" in err


def test_a_yaml_file_sets_flags_and_the_command_line_wins(monkeypatch, capsys, folder, tmp_path):
    values = {**ENGINE, "model": str(folder), "max-tokens": 3, "ignore_eos": True, "quiet": True, "max-model-len": "64"}
    (tmp_path / "c.yaml").write_text(json.dumps(values))  # JSON is YAML
    base = ("generate", "the cat", "--json", "--config", str(tmp_path / "c.yaml"))
    _, out, _ = call(monkeypatch, capsys, *base)
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 3
    _, out, _ = call(monkeypatch, capsys, *base, "--max-tokens", "2")
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 2
    status, _, err = call(monkeypatch, capsys, *base, "--max-tokens", "90")
    assert status == 2 and "max_model_len is 64" in err


@pytest.mark.parametrize("text, message", [("max_num_seq: 3", "max_num_seqs"), ("- 1", "mapping"), ("a: [", "YAML")])
def test_a_bad_yaml_file_is_refused(monkeypatch, capsys, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    status, _, err = call(monkeypatch, capsys, "generate", "x", "--config", str(tmp_path / "c.yaml"))
    assert status == 2 and message in " ".join(err.split())


# -- chat --------------------------------------------------------------------------------------------------------------


def talk(llm, system=None, **params):
    lines: list[str] = []
    params = jaxpaged.SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True, **params})
    return Conversation(llm, params, system, stats=True, write=lines.append), lines


def test_chat_streams_keeps_the_turns_and_shares_their_pages(llm):
    conversation, lines = talk(llm, "be brief")
    first = conversation.answer("hello there")
    assert first in "".join(lines) and len(lines) > 3, "the answer came in pieces"
    lines.clear()
    second = conversation.answer("and now?")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[-1]["content"] == second and conversation.messages[2]["content"] == first
    cached = int("".join(lines).split(" of them cached")[0].split()[-1])
    assert cached > 8
    assert not llm.engine.has_work and llm.engine.stats().num_held_pages == 0


def test_chat_commands(llm, monkeypatch, capsys):
    conversation, lines = talk(llm)
    said = iter(["one", "two", "/undo", "/help", "", "/unknown", "three", "/quit", "never"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    conversation.run()
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["one", "three"]
    assert next(said) == "never" and sum("/reset" in line for line in lines) == 3
    conversation._take("/reset")
    assert conversation.messages == []


def test_chat_ends_at_the_end_of_input(llm, monkeypatch):
    def end(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    conversation, lines = talk(llm)
    conversation.run()
    assert conversation.messages == [] and len(lines) == 1, "the help, and no more"


def test_a_message_that_cannot_be_answered_is_said_and_not_kept(llm, monkeypatch):
    conversation, lines = talk(llm)
    said = iter(["word " * 400, "short", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    conversation.run()
    assert any("max_model_len is 256" in line for line in lines)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["short"]


def test_ctrl_c_ends_the_answer_and_keeps_what_came(llm, monkeypatch):
    conversation, _ = talk(llm, max_tokens=60)
    real, calls = llm.engine.runner.collect, iter([False] * 6 + [True])

    def collect(handle):
        if next(calls, False):
            raise KeyboardInterrupt
        return real(handle)

    monkeypatch.setattr(llm.engine.runner, "collect", collect)
    conversation.answer("tell me everything")
    assert conversation.messages[-1]["role"] == "assistant" and conversation.messages[-1]["content"]
    assert not llm.engine.has_work and llm.engine.stats().num_held_pages == 0
    assert conversation.answer("go on")


# -- demo, bench, environment ------------------------------------------------------------------------------------------


def test_the_demo_shows_texts_figures_and_what_comes_next(folder, capsys):
    demo.run(lambda **defaults: jaxpaged.LLM(str(folder), use_tqdm=False, **{**ENGINE, "max_model_len": 256}))
    out = capsys.readouterr().out
    assert all(f"> {question}" in out for question in demo.QUESTIONS)
    assert "tokens/s" in out and "0 held now" in out and "jaxpaged chat" in out
    shared = int(out.split("prefix cache: ")[1].split()[0])
    assert shared > 0, "the questions begin alike"


def test_bench_latency_and_throughput(llm):
    result = bench.latency(llm, 2, 8, 6, 1)
    assert 0 < result["ttft_s"] < result["total_s"] and result["tpot_s"] * 5 < result["total_s"]
    result = bench.throughput(llm, 6, 16, 8)
    assert result["output_tokens_per_s"] == pytest.approx(result["output_tokens"] / result["seconds"])
    assert 6 * 2 <= result["input_tokens"] <= 6 * 16 and llm.engine.stats().num_held_pages == 0
    with pytest.raises(jaxpaged.RequestError, match="max_model_len=256"):
        bench.latency(llm, 1, 200, 100, 1)


def test_bench_startup_times_its_stages_cold_and_warm(folder):
    began = time.perf_counter()
    result = bench.startup({"model": str(folder), **ENGINE}, 1)
    assert 0 < result["warm: ready (s)"] < time.perf_counter() - began
    assert result["cold: compile (s)"] >= 0 and result["cold: first token (s)"] > 0
    with pytest.raises(RuntimeError, match="(?s)did not start:.*no file or folder"):
        bench.startup({"model": "/nowhere/at/all"}, 1)


def test_the_environment_report_names_versions_and_hides_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    report = env.report()
    assert f"jax: {jaxpaged_version('jax')}" in report and "HF_TOKEN: (set)" in report
    assert "verysecret" not in report


def jaxpaged_version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)
