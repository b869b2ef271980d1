"""How much of a device is used: what JAX takes when it starts, what is planned for, what is said where it is too little."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jaxpaged import memory
from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError
from jaxpaged.state import Limits

GIB = 2**30
LIMITS = Limits(
    num_pages=0, page_size=16, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, vocab_size=100,
)  # fmt: skip


def device(taken: int) -> SimpleNamespace:
    return SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": taken})


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in memory.POOL_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def started(code: str, **variables: str) -> str:
    """What a process of its own prints, with the variables set."""
    told = "".join(f"os.environ[{name!r}] = {value!r}; " for name, value in variables.items())
    code = f"import os; {told}from jaxpaged import memory; {code}; print(os.environ.get('XLA_CLIENT_MEM_FRACTION'))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_jax_starts_with_the_share_that_is_asked_for():
    assert started("memory.devices(0.5)") == "0.5"


def test_what_the_user_says_about_jax_stays():
    assert started("memory.devices(0.5)", XLA_CLIENT_MEM_FRACTION="0.8") == "0.8"
    assert started("memory.devices(0.5)", XLA_PYTHON_CLIENT_MEM_FRACTION="0.8") == "None"  # JAX refuses both


def test_jax_that_has_started_is_told_nothing():
    assert started("import jax; jax.devices(); memory.devices(0.5)") == "None"


@pytest.mark.parametrize("variable, said, asked", [
    ("XLA_CLIENT_MEM_FRACTION", "0.92", 0.92), ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9", 0.4), (None, "0.75", 0.5),
])  # fmt: skip
def test_the_limit_is_a_share_of_the_device(variable, said, asked, monkeypatch, caplog):
    if variable:
        monkeypatch.setenv(variable, said)
    found = memory.device_limit(device(int(float(said) * 80 * GIB)), asked)
    assert found == pytest.approx(0.95 * asked * 80 * GIB, rel=1e-6)
    assert not caplog.records


def test_more_than_jax_has_taken_cannot_be_used_and_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert memory.device_limit(device(60 * GIB), 0.92) == int(0.95 * 60 * GIB)
    assert "XLA_CLIENT_MEM_FRACTION=0.92 before" in caplog.text


def test_weights_that_leave_nothing_are_named_and_not_the_length():
    config = EngineConfig(model="x", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)
    with pytest.raises(RequestError, match=r"take 1,100 bytes on a device, 1,000 may be used.*tensor_parallel_size"):
        memory.plan(config, LIMITS, 1000, 1000, 100, 8)
    with pytest.raises(RequestError, match="set max_model_len to at most 32"):
        memory.plan(config, LIMITS, 1000, 900, 76, 8)
    assert memory.plan(config, LIMITS, 1000, 900, 60, 8).num_pages == 5


def test_the_cache_of_a_cpu_is_for_all_its_devices_together():
    """They share one memory."""
    many = {"max_model_len": 64, "max_num_seqs": 2**30, "max_num_batched_tokens": 2**30}
    pages = lambda **sizes: memory.plan(EngineConfig(**many, **sizes), LIMITS, None, 0, 0, 2**20).num_pages
    assert 4 * pages(tensor_parallel_size=2, data_parallel_size=2) == 2 * pages(pipeline_parallel_size=2) == pages() <= 1024
