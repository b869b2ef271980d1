"""ServerOptions: everything the HTTP side can be told, with vLLM's flag names where vLLM has them. Frozen and checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpaged.request import RequestError


@dataclass(frozen=True)
class ServerOptions:
    """host, port, uds: where to listen (uds: a Unix socket instead of a port). root_path: the path a proxy strips.
    served_model_name: the names clients may ask for; the first one stands in answers.
    lora_modules: adapters that are loaded at the start, name=path or a JSON object each; clients ask for them as models.
    allow_runtime_lora_updating: clients may load and unload adapters (from folders that the server can read).
    api_key: keys of which a client must send one (Authorization: Bearer, or x-api-key).
    max_num_queued_reqs: requests that may wait for a slot; more get 503. max_body_size: bytes. max_num_prompts: a request.
    stream_interval: tokens that a chunk of a stream has at least.
    shutdown_timeout: seconds that running requests get after SIGTERM. watchdog_timeout: seconds after which a step is
    said to hang; 0: never. slow_client_timeout: seconds without reading after which a stream's client is dropped.
    enable_auto_tool_choice: taken for vLLM's sake: tool_choice "auto" works whenever there is a tool_call_parser.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    served_model_name: tuple[str, ...] = ()
    lora_modules: tuple[str, ...] = ()
    allow_runtime_lora_updating: bool = False
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    ssl_ciphers: str | None = None
    max_num_queued_reqs: int | None = None
    max_body_size: int = 32 * 2**20
    max_num_prompts: int = 1024
    shutdown_timeout: float = 0.0
    watchdog_timeout: float = 300.0
    slow_client_timeout: float = 30.0
    strict_fields: bool = False
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool = False
    exclude_tools_when_tool_choice_none: bool = False
    reasoning_parser: str | None = None
    override_generation_config: dict[str, Any] = field(default_factory=dict)
    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_request_id_headers: bool = False
    stream_interval: int = 1
    enable_log_requests: bool = False
    enable_log_outputs: bool = False
    max_log_len: int = 1000
    disable_uvicorn_access_log: bool = False
    log_level: str = "info"
    log_format: str = "text"
    metrics_prefix: str = "jaxpaged"
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_body_size", "max_num_prompts", "stream_interval"):
            _check(getattr(self, name) > 0, name, "a positive number", getattr(self, name))
        for name in ("shutdown_timeout", "watchdog_timeout", "slow_client_timeout"):
            _check(getattr(self, name) >= 0, name, "a number of seconds >= 0", getattr(self, name))
        limit = self.max_num_queued_reqs
        _check(limit is None or limit >= 0, "max_num_queued_reqs", "a number >= 0", limit)
        _check(0 <= self.port <= 65535, "port", "in 0..65535 (0: any free one)", self.port)
        _check((self.ssl_keyfile is None) == (self.ssl_certfile is None), "ssl_keyfile", "given together with ssl_certfile",
               self.ssl_keyfile)  # fmt: skip
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(self, name)
            _check(path is None or Path(path).is_file(), name, "a file that exists", path)
        _check(not self.root_path or self.root_path.startswith("/"), "root_path", "a path that begins with /", self.root_path)
        _check(all(self.api_key), "api_key", "non-empty", "")
        _check(self.log_format in ("text", "json"), "log_format", "text or json", self.log_format)
        levels = ("critical", "error", "warning", "info", "debug")
        _check(self.log_level in levels, "log_level", f"one of {', '.join(levels)}", self.log_level)
        self._check_parsers()
        known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "max_new_tokens")
        for name in self.override_generation_config:
            _check(name in known, "override_generation_config", f"an object of {', '.join(known)}", name)

    def _check_parsers(self) -> None:
        from jaxpaged_server.parsers import REASONING_PARSERS, TOOL_PARSERS

        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            given = getattr(self, name)
            if given is not None and given not in known:
                near = difflib.get_close_matches(given, known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise RequestError(f"{name} must be one of {', '.join(known)}; got {given!r}.{hint}", name)

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """override_generation_config by SamplingParams' names."""
        renamed = {"max_new_tokens": "max_tokens"}
        return {renamed.get(name, name): value for name, value in self.override_generation_config.items()}


def _check(ok: bool, name: str, rule: str, given: Any) -> None:
    if not ok:
        raise RequestError(f"{name} must be {rule}, got {given!r}.", name)
