"""`jaxpaged serve demo` for tests, started once for all of them: `pytest_plugins = ["demo_server"]`."""

from collections.abc import Iterator

import pytest
from server_process import jaxpaged, running

FLAGS = ("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--tool-call-parser", "hermes")


@pytest.fixture(scope="session")
def demo_url() -> Iterator[str]:
    """Where the server is, without a path."""
    with running(jaxpaged("serve", "demo", *FLAGS)) as server:
        yield server.base_url
