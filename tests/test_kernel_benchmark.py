"""The kernel benchmark: what it counts, what it calls wrong, what it makes of kernels that hang, and one run end to end."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import SHAPES, Shape

from benchmarks import gpu_check, kernel_report, kernels
from benchmarks.kernel_cases import (
    COPY,
    Target,
    attention,
    attention_arguments,
    attention_specs,
    attention_work,
    full_cases,
    issue_cases,
    tiny_cases,
)
from benchmarks.kernel_timing import Limits, errors
from pallas_kernels import reference

HEADS = dict(H=6, G=2, D=16, page_size=4, dtype="bfloat16")
ROWS = (5, 1), (8, 1), (9, 9), (21, 6)
QUIET = ["--interpret", "--no-rivals", "--backend", "triton,mosaic_gpu,reference"]


# -- cases -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_work_is_what_queries_see(window, kv_dtype):
    shape = Shape("", rows=ROWS, window=window, **HEADS)
    pairs, keys, pages, queries = 0, 0, 0, 0
    for kv_len, n in ROWS:
        seen = [t for x in range(kv_len - n, kv_len) for t in range(x + 1) if window is None or t > x - window]
        pairs, keys, pages, queries = pairs + len(seen), keys + len(set(seen)), pages + len({t // 4 for t in seen}), queries + n
    a_key = 2 * (16 * (1 if kv_dtype else 2) + (4 if kv_dtype else 0))  # of one kv head, with its scales
    expected = 2 * keys * a_key + 2 * queries * 6 * 16 * 2 + queries * 6 * 4 + 4 * pages + 8 * len(ROWS)
    assert attention_work(shape, kv_dtype) == (expected, 4 * 6 * 16 * pairs)


@pytest.mark.parametrize("kv_dtype", [None, "int8", "float8_e4m3fn"])
def test_specs_are_those_of_the_arguments(kv_dtype):
    shape = Shape("", rows=ROWS, sinks=True, **HEADS)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    arguments = attention_arguments(shape, np.random.default_rng(0), kv_dtype, pad_to=40)
    assert describe(arguments[0]) == describe(attention_specs(shape, kv_dtype, pad_to=40)[0])
    assert describe(arguments[1]) == describe(attention_specs(shape, kv_dtype, pad_to=40)[1])


def test_every_case_of_the_issue_and_every_real_shape_is_there():
    names = [case.name for case in full_cases()]
    assert len(set(names)) == len(names)
    assert {shape.name for shape in SHAPES if not shape.test} <= set(names)
    parts = {part for case in issue_cases() if case.target and case.target.kind == "parts" for part in case.target.of}
    assert parts <= set(names)
    mixed = next(case for case in issue_cases() if case.name.startswith("mixed"))
    assert {case.name for case in issue_cases() if case.group == mixed.group} >= parts  # measured side by side


# -- right and wrong -------------------------------------------------------------------------------------------------------


def test_not_a_number_is_wrong():
    error = errors({"out": jnp.array([1.0, jnp.nan])}, {"out": jnp.ones(2)}, {"out": Limits(1e9)})
    assert error["out"].is_wrong


def test_a_page_left_out_of_a_long_sequence_is_wrong():
    """Each output changes by less than bf16 rounds the largest ones."""
    case = attention("", Shape("", 4, 1, 64, 16, ((32768, 1),), dtype="bfloat16"))
    (q, k, v, table, *rest), _ = arguments = case.make(np.random.default_rng(0))
    run = lambda table: reference.paged_attention(q, k, v, table, *rest, **case.options)
    verdict = lambda found: errors(case.results(found, arguments), case.oracle(arguments), case.limits)["out"].is_wrong
    assert not verdict(run(table))
    assert verdict(run(table.at[0, 100].set(table[0, 101])))


def child(monkeypatch, backends):
    """A child with backends of ours, in this process; its messages."""
    monkeypatch.setattr(kernels.Child, "_backends", lambda self: (backends, {}))
    told = []
    job = {"skip": [], "dropped": [], "done": [], "ceilings": [1.0, 1.0]}
    return kernels.Child(kernels.options_of([*QUIET, "--rounds", "1"]), job, told.append)


def test_a_wrong_kernel_is_reported_and_not_timed(monkeypatch):
    good = reference.make(None, False)

    def off(*arguments, **options):
        out, lse = good.paged_attention(*arguments, **options)
        return out + jnp.bfloat16(0.1), lse

    def refuse(*arguments, **options):
        raise NotImplementedError("pages of 8")

    backends = {
        "triton": good._replace(paged_attention=off),
        "mosaic_gpu": good._replace(paged_attention=refuse),
        "reference": good,
    }
    wrong, refused, right = child(monkeypatch, backends).group(tiny_cases()[:1])
    assert wrong["status"] == "wrong" and wrong["max_error"] > 0.05 and "interpreter_ms" not in wrong
    assert (refused["status"], refused["reason"]) == ("refused", "pages of 8") and "interpreter_ms" not in refused
    assert right["status"] == "ok" and right["interpreter_ms"] > 0
    assert not any("device_ms" in row for row in (wrong, refused, right))  # an interpreter's time is no device's


# -- verdicts --------------------------------------------------------------------------------------------------------------


def row(case, milliseconds, implementation="triton", **fields):
    return {"case": case, "implementation": implementation, "status": "ok", "reason": "", "device_ms": milliseconds, **fields}


@pytest.mark.parametrize(
    "target, fields, expected",
    [
        (COPY, {"of_copy": 0.69}, "missed"),
        (COPY, {"of_copy": 0.71}, "bar reached"),
        (COPY, {"of_copy": 0.90}, "aim reached"),
        (Target("flops", {"triton": 350e12}, 600e12), {"flops_per_s": 360e12}, "bar reached"),
        (Target("rival", 1.2, 1.0, ("FlashInfer",)), {}, "bar reached"),  # 10 ms of 9
        (Target("rival", 1.2, 1.0, ("vLLM",)), {}, "not judged: vLLM not measured"),
        (Target("parts", 1.15, 1.05, ("a", "b")), {}, "aim reached"),  # 10 ms of 4 + 6
        (Target("parts", 1.03, None, ("a",)), {}, "missed"),
        (Target("parts", 2.6, None, ("a",)), {}, "bar reached"),
    ],
)
def test_verdicts(target, fields, expected):
    case = dataclasses.replace(issue_cases()[0], name="it", target=target)
    rows = [row("it", 10.0, **fields), row("it", 9.0, "FlashInfer"), row("a", 4.0), row("b", 6.0), row("a", 1.0, "mosaic_gpu")]
    kernel_report.judge(rows, [case])
    assert rows[0]["verdict"] == expected
    assert "verdict" not in rows[1]


# -- children that hang or die ---------------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
job = json.loads(sys.argv[sys.argv.index("--child") + 1])
tell = lambda **message: os.write(job["pipe"], (json.dumps(message) + "\\n").encode())
tell(machine={"device": "none"}, absent=dict.fromkeys(job["dropped"], "dropped"), method="none")
for case in CASES:
    if case in job["done"]:
        continue
    for name in ("triton", "mosaic_gpu"):
        tell(doing=[case, name, "first call"])
        if [case, name] in job["skip"] or name in job["dropped"]:
            continue
        if name == "mosaic_gpu" and MISHAP == "hang":
            time.sleep(60)
        if name == "mosaic_gpu" and MISHAP == "die":
            sys.exit("an illegal address")
    tell(rows=[{"case": case, "implementation": "triton", "status": "refused", "reason": ""}], group=case)
tell(end=True)
"""


@pytest.mark.parametrize("mishap, status, why", [("hang", "hung", "no progress"), ("die", "failed", "an illegal address")])
def test_a_kernel_that_hangs_or_dies_costs_only_itself(mishap, status, why, monkeypatch):
    arguments = ["--check", "--stall", "1", "--only", "^(decodes|chunks|mixed)$"]
    parent = kernels.Parent(kernels.options_of(arguments), arguments)
    fake = FAKE.replace("CASES", repr(list(parent.groups))).replace("MISHAP", repr(mishap))
    monkeypatch.setattr(parent, "program", (sys.executable, "-c", fake))
    result = parent.run()
    found = [(r["case"], r["implementation"], r["status"]) for r in result["rows"]]
    assert found.count(("decodes", "triton", "refused")) == 1
    lost = [r for r in result["rows"] if r["implementation"] == "mosaic_gpu"]
    assert [(r["case"], r["status"]) for r in lost] == [("decodes", status), ("chunks", status)]  # twice, then it is left out
    assert all(why in r["reason"] for r in lost)
    assert ("mixed", "triton", "refused") in found and result["not_reached"] == []
    assert result["absent"] == {"mosaic_gpu": "dropped"}


def test_a_run_ends_in_time_and_says_what_it_did_not_reach(monkeypatch):
    arguments = ["--check", "--stall", "30", "--seconds", "1.5", "--only", "^decodes$"]
    parent = kernels.Parent(kernels.options_of(arguments), arguments)
    monkeypatch.setattr(
        parent, "program", (sys.executable, "-c", FAKE.replace("CASES", "['decodes']").replace("MISHAP", "'hang'"))
    )
    assert parent.run()["not_reached"] == ["decodes"]


def test_without_a_gpu_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        kernels.main(["--quick"])
    assert str(stop.value).startswith("This benchmark needs a GPU, and JAX finds only cpu") and "\n" not in str(stop.value)
    assert capsys.readouterr().out == ""


# -- end to end ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interpreted_end_to_end(tmp_path):
    files = {option: tmp_path / f"kernels.{option}" for option in ("json", "plot", "markdown")}
    files["plot"] = files["plot"].with_suffix(".png")
    options = [word for option, path in files.items() for word in (f"--{option}", str(path))]
    program = [sys.executable, "-m", "benchmarks.kernels", "--interpret", "--backend", "reference", *options]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(files["json"].read_text())
    assert result["interpreted"] and result["not_reached"] == []
    assert {r["status"] for r in result["rows"]} == {"ok"}  # rivals too: same numbers through their layouts
    assert {r["case"] for r in result["rows"]} == {case.name for case in tiny_cases()}
    assert {"reference", "jax paged_attention", "XLA, dense", "torch SDPA, dense", "XLA sort"} <= {
        r["implementation"] for r in result["rows"]
    }
    assert all("interpreter_ms" in r and "device_ms" not in r for r in result["rows"])
    assert "no figures of a GPU" in files["markdown"].read_text()
    assert files["plot"].read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_gpu_check_end_to_end(tmp_path):
    gpu_check.main(["--interpret", "--out", str(tmp_path), "--stages", "machine,check,engine"])
    assert "| check | passed |" in (tmp_path / "summary.md").read_text()
    assert {r["status"] for r in json.loads((tmp_path / "check.json").read_text())["rows"]} <= {"ok", "refused"}


def test_gpu_check_reports_a_stage_that_fails_or_takes_too_long(tmp_path):
    run = gpu_check.Run(tmp_path, seconds=100, interpret=True)
    failed = run.command("a", [sys.executable, "-c", "print('so far'); raise SystemExit(3)"], 50)
    slow = run.command("b", [sys.executable, "-c", "import time; time.sleep(60)"], 2.5)
    assert (failed.status, slow.status) == ("failed", "out of time")
    assert "so far" in (tmp_path / "log.txt").read_text()
