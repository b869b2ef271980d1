"""Every kernel, compiled for an H200, an A100 and an L40S that are not here: no spilled registers, the instructions that
were meant, within shared memory, caches in place. Where the compilers are not installed (make compile-target): skipped."""

import pytest

from benchmarks import target
from benchmarks.compile_report import Case, cases, compile_all, table

CASES = cases()
FIRST = [c for c in CASES if c.target == "h200" and ("Llama-3-8B, pages of 32" in c.name or "write_kv" in c.name)]
REST = [c for c in CASES if c not in FIRST]

pytestmark = pytest.mark.skipif(target.missing() is not None, reason=target.missing() or "")


@pytest.fixture(scope="session")
def first():
    return compile_all(FIRST)


@pytest.fixture(scope="session")
def rest():
    results = compile_all(REST)
    print("", *table(results), sep="\n")
    return results


def check(case: Case, found: dict) -> None:
    assert "error" not in found, found["error"]
    kernels = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert kernels
    for name, kernel in kernels.items():
        assert kernel["spills"] == 0, f"{name} spills {kernel['spills']} bytes"
        assert kernel["shared"] <= target.SHARED_MEMORY[case.target], f"{name} needs {kernel['shared']} bytes of shared memory"
    for name in case.wgmma:
        assert kernels[name]["wgmma"] > 0, f"{name} does not use the tensor cores as Hopper's do"
    assert found["aliased"] == found["donated"], "a cache is copied"
    assert found["temporaries"] <= 300e6


@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.id)
def test_compiles(case, first):
    check(case, first[case.id])


@pytest.mark.slow
@pytest.mark.parametrize("case", REST, ids=lambda case: case.id)
def test_compiles_for_every_model_and_gpu(case, rest):
    check(case, rest[case.id])


def test_every_generation_and_backend_has_cases():
    assert {(c.backend, c.target) for c in CASES} == {("mosaic_gpu", "h200"), *(("triton", t) for t in target.ARCHITECTURES)}
    assert len({c.id for c in CASES}) == len(CASES)


def test_a_compiler_that_fails_takes_no_other_result_along():
    good = next(c for c in FIRST if "write_kv, bf16" in c.name)
    unknown = good._replace(name="no such case")
    results = compile_all([good, unknown])
    assert "error" not in results[good.id] and "the compiler ended" in results[unknown.id]["error"]
