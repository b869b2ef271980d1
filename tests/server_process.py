"""A server in a process of its own: signals, exit statuses and sockets as a user has them.

with running(scripted("Hello!", shutdown_timeout=5)) as server: ...        # no model: up within a second
with running(jaxpaged("serve", str(tiny_model(tmp_path)))) as server: ...  # the real thing, random weights
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from live_server import wait_until

UP = re.compile(r"serving .* at (\S+)")
START_SECONDS = 600.0  # a demo model that compiles for the first time, on a busy machine
STOP_SECONDS = 30.0


def environment() -> dict[str, str]:
    """As a user has it, one device and all: what a user has compiled is found again."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


class ServerProcess:
    """base_url: "" until the server has said where it is. log: what it has written so far."""

    def __init__(self, command: Sequence[str]):
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as out:
            self._lines.extend(out)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    @property
    def base_url(self) -> str:
        found = UP.search(self.log)
        return found[1].replace("localhost", "127.0.0.1") if found else ""

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        """Until the log has it."""
        over = lambda: text in self.log or self.process.poll() is not None
        wait_until(over, lambda: f"{text!r} in the log:\n{self.log}", seconds)
        assert text in self.log, f"the server has ended with status {self.process.returncode}:\n{self.log}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(STOP_SECONDS)
        self._reader.join()
        return status


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[ServerProcess]:
    """The server, from when it serves until the block is left."""
    with started(command) as server:
        server.wait_for("Application startup complete")
        yield server


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[ServerProcess]:
    """The process, which is ended with the block."""
    server = ServerProcess(command)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.wait()
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.wait()


def jaxpaged(*arguments: str) -> list[str]:
    """The command line, on any free port."""
    return [sys.executable, "-m", "jaxpaged.cli", *arguments, *(() if "--uds" in arguments else ("--port", "0"))]


def tiny_model(folder: Path) -> Path:
    """A model folder: two small layers, the tokenizer and the chat template of `scripted`. Its weights are to be random."""
    import scripted
    from tiny_checkpoints import CONFIG

    tokenizer = scripted.chat_tokenizer()
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    named = {"chat_template": scripted.TEMPLATE, "eos_token": scripted.END}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    config = CONFIG | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TINY = ("--load-format", "dummy", "--enforce-eager", "--max-num-seqs", "4", "--max-num-batched-tokens", "32")


# -- a server without a model ----------------------------------------------------------------------------------------------


def scripted(reply: str, seconds: float = 0.0, **options: Any) -> list[str]:
    """Serves what `scripted.scripted_service` makes of these, on any free port. The reply "die" ends the engine's thread."""
    given = {"port": 0, **options}
    return [sys.executable, __file__, json.dumps({"reply": reply, "seconds": seconds, "options": given})]


def _serve(reply: str, seconds: float, options: dict[str, Any]) -> int:
    from scripted import scripted_service

    from jaxpaged_server import run
    from jaxpaged_server.options import ServerOptions

    def die(prompt: str) -> str:
        raise SystemExit("the engine's thread ends")

    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    run.set_up_logs("text", "info")
    with run.listen(ServerOptions(**given)) as sock:
        return run.serve(scripted_service(die if reply == "die" else reply, seconds=seconds, **given), sock)


if __name__ == "__main__":
    sys.exit(_serve(**json.loads(sys.argv[1])))
