"""Serves an application with uvicorn: sockets, TLS, logs, and an end without haste."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxpaged.request import RequestError
from jaxpaged_server.app import create_app
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import Service
from jaxpaged_server.sse import ABORT

log = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, with a way for the application to drop a connection whose client has stopped reading (closing it would
    wait for what has not been sent)."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[typeddict-item]


class Server(uvicorn.Server):
    """At the first signal: no new requests, running ones get `shutdown_timeout` seconds, the rest is aborted; each client sees
    the end of its stream. At the second: at once."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service
        for engine in service.engine.engines:
            engine.on_death = self._die

    def _die(self, error: BaseException) -> None:
        self.should_exit = True  # a supervisor starts us again

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain = asyncio.create_task(self.service.engine.drain(self.service.options.shutdown_timeout))
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=0.1)
        drain.cancel()
        await super().shutdown(sockets)
        self._captured_signals.clear()  # uvicorn would raise them again, and the process end by them


def serve(service: Service, sock: socket.socket, app: Starlette | None = None) -> int:
    """Serves on a socket (see `listen`) until a signal comes. app: the service's, unless it is given. The exit status: 1 if
    the engine died."""
    options, sockets = service.options, [sock]
    config = uvicorn.Config(
        app or create_app(service), root_path=options.root_path, http=Protocol, ws="none", loop="auto",
        log_config=None, log_level=options.log_level, access_log=not options.disable_uvicorn_access_log,
        ssl_keyfile=options.ssl_keyfile, ssl_certfile=options.ssl_certfile, ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=options.ssl_cert_reqs, ssl_ciphers=options.ssl_ciphers or "TLSv1", server_header=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    local = "" if options.uds or options.host not in ("127.0.0.1", "localhost", "::1") else " (this machine only; see --host)"
    log.info("serving %s at %s%s", ", ".join(service.names), address(options, sockets[0]), local)
    _calm_collector()
    try:
        Server(config, service).run(sockets)
    finally:
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)
    return 1 if service.engine.error is not None else 0


def _calm_collector() -> None:
    """What is there when serving begins stays: the garbage collector need not look at it again. And it looks less often: a
    token makes dozens of objects, next to none of which is garbage that reference counts do not free."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def listen(options: ServerOptions) -> socket.socket:
    """The socket to listen on, opened before the model is loaded: a port in use is said at once."""
    if options.uds is not None:
        return _listen_unix(options.uds)
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=2048, reuse_port=False)
    except OSError as error:
        why = error.strerror or error
        raise RequestError(f"cannot listen on {options.host}:{options.port}: {why}; choose another one with --host and --port.",
                           "port") from None  # fmt: skip


def _listen_unix(path: str) -> socket.socket:
    """A stale socket of a server that has gone is replaced; one that somebody listens on, or another file, is not."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode) or _answers(path):
                raise OSError("it is in use" if stat.S_ISSOCK(os.stat(path).st_mode) else "there is a file that is no socket")
            os.unlink(path)
        sock.bind(path)
        sock.listen(2048)
        return sock
    except OSError as error:
        sock.close()
        raise RequestError(f"cannot listen on {path}: {error.strerror or error}.", "uds") from None


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def address(options: ServerOptions, sock: socket.socket) -> str:
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = sock.getsockname()[:2]
    scheme = "https" if options.ssl_certfile else "http"
    shown = "localhost" if host in ("0.0.0.0", "::", "127.0.0.1", "::1") else host
    return f"{scheme}://{shown}:{port}{options.root_path}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up_logs(form: str, level: str) -> None:
    """Logs go to standard error, as text or as JSON."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("jax", "httpx", "huggingface_hub", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
