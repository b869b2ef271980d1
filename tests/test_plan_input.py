"""What `jaxpaged plan` is given wrongly is said before it begins, and what it has found is not lost."""

import json
import os
import subprocess
import sys

import pytest
from plan_models import folder
from test_plan import call

from jaxpaged import cli, plan, simulate_plot

SIMULATED = ("--no-compile", "-q", "--simulate", "synthetic:prompt=40,output=8,n=5", "--rates", "5")
LINE = {"timestamp": 0, "input_length": 5, "output_length": 1}


@pytest.fixture
def model(tmp_path):
    return str(folder(tmp_path, "tiny"))


@pytest.fixture
def no_plan(monkeypatch):
    """What is found out after the plan is found out too late."""

    def begin(*_args, **_more):
        raise AssertionError("the plan was begun")

    monkeypatch.setattr(plan, "make", begin)


@pytest.mark.parametrize("flags, said", [
    (["--plot", "a.docx"], "plot must end in one of "),
    (["--plot", "{tmp}/tiny"], "tiny is a folder"),
    (["--plot", "{tmp}/tiny/config.json/a.png"], "config.json is no folder"),
    (["--plot", "{tmp}/a.png"], "a.png is a folder"),
    (["--json", "{tmp}"], "cannot be written"),
    (["--json", "{tmp}/tiny/config.json/a.json"], "config.json is no folder"),
    (["--simulate", "{tmp}/nan.jsonl"], "nan.jsonl, line 2: its time cannot be read"),
    (["--simulate", "nowhere.jsonl"], "cannot be read as a trace"),
    (["--simulate", "synthetic:n=1000000000000"], "n must be a positive integer of at most"),
    (["--arrivals", "trace"], "has no times"),
    (["--num-requests", "0"], "num_requests must be a positive integer, got 0"),
    (["--num-requests", "-1"], "num_requests must be a positive integer, got -1"),
    (["--rates", "1e-320"], "rates must be numbers above 0"),
    (["--prompt-lens", "²"], "prompt_lens must be positive integers"),
])  # fmt: skip
def test_mistakes_are_said_before_the_plan_is_made(tmp_path, monkeypatch, capsys, model, no_plan, flags, said):
    (tmp_path / "nan.jsonl").write_text("".join(json.dumps({**LINE, "timestamp": at}) + "\n" for at in (0.0, float("nan"))))
    (tmp_path / "a.png").mkdir()
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(monkeypatch, capsys, model, *SIMULATED, *flags)
    assert status == 2 and out == "" and said in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_folder_that_may_not_be_written_is_said_first(tmp_path, monkeypatch, capsys, model, no_plan, flag):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))  # root may do anything
    status, _, err = call(monkeypatch, capsys, model, *SIMULATED, flag, str(tmp_path / "new" / "a.png"))
    assert status == 2 and f"({tmp_path} is read-only)" in err


def test_without_matplotlib_nothing_is_begun(monkeypatch, capsys, model, no_plan):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = call(monkeypatch, capsys, model, *SIMULATED)
    assert status == 1 and out == "" and 'pip install "jaxpaged[plan]"' in err


def test_folders_are_made_for_what_is_written(tmp_path, monkeypatch, capsys, model):
    png, found = tmp_path / "a" / "s.png", tmp_path / "b" / "c" / "p.json"
    status, _, _ = call(
        monkeypatch, capsys, model, *SIMULATED, "--batch-sizes", "1, max ", "--plot", str(png), "--json", str(found)
    )
    assert status == 0 and png.read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads(found.read_text())["simulation"]) == 1


def fail(*_args):
    raise OSError("no space left")


@pytest.mark.parametrize("place, simulated", [("plot", True), ("simulate.sweep", False)])
def test_what_was_found_is_kept_when_the_rest_fails(tmp_path, monkeypatch, capsys, model, place, simulated):
    target = simulate_plot if place == "plot" else "jaxpaged.simulate"
    monkeypatch.setattr(*((target, "plot") if simulated else (f"{target}.sweep",)), fail)
    found = tmp_path / "p.json"
    status, _, err = call(monkeypatch, capsys, model, *SIMULATED, "--json", str(found), "--plot", str(tmp_path / "s.png"))
    assert status == 1 and "no space left" in err
    said = json.loads(found.read_text())
    assert said["fits"] and ("simulation" in said) == simulated


def test_wrong_kinds_in_a_config_are_one_clear_error(tmp_path, monkeypatch, capsys, model):
    for key, value, said in (("hidden_size", "256", "a positive integer"), ("quantization_config", [1], "an object")):
        status, _, err = call(monkeypatch, capsys, model, "--no-compile", "-q", "--hf-overrides", json.dumps({key: value}))
        assert status == 2 and f"{model}: {key} must be {said}, got {value!r}" in err and err.count("\n") == 1


def test_a_reader_that_has_gone_is_told_from_what_does_not_fit(model):
    """Status 141, as of other programs; 1 would mean that the model does not fit."""
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", cli.__name__, "plan", model, "--no-compile", "-q"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")
