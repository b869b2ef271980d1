"""What every test runs under: CPU, several devices, strict promotion of dtypes and ranks, shapes of annotated functions
checked, a compilation cache."""

import importlib.util
import os
import signal

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"


def pytest_configure() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background is started without it

    import jax
    from jaxtyping import install_import_hook

    if importlib.util.find_spec("beartype"):  # a machine with a GPU may have been given no more than JAX
        install_import_hook(
            [
                "jaxpaged.sampler",
                "jaxpaged.models.decoder",
                "jaxpaged.models.layers",
                "jaxpaged.models.moe",
                "jaxpaged.models.mla",
                "pallas_kernels.reference",
            ],
            "beartype.beartype",
        )
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/jaxpaged/tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def demo_gguf():
    from jaxpaged import hub

    return hub.resolve("demo")


@pytest.fixture(scope="session")
def gemma_gguf():
    from jaxpaged import hub

    return hub.resolve("demo-gemma3")


@pytest.fixture(scope="module")
def served():
    from fake_openai import FakeOpenAI, serving  # not on a machine that has no more than JAX

    fake = FakeOpenAI()
    with serving(fake) as url:
        yield fake, url


@pytest.fixture
def fake(served):
    """A server to talk to, as new for each test."""
    served[0].reset()
    return served[0]


@pytest.fixture
def url(served):
    """Where `fake` is."""
    return served[1]
