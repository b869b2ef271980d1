"""`jaxpaged serve`: the engine's flags and the server's, vLLM's names; then a socket, an engine, an application."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from jaxpaged.config import NOTHING_ASKED, EngineConfig, without_nothing_asked
from jaxpaged.flags import HELP, config_flags
from jaxpaged.nodes import NODES_HELP, Nodes, place
from jaxpaged.request import RequestError
from jaxpaged_server.options import ServerOptions

log = logging.getLogger("jaxpaged")

LISTENING, API, CHAT, LIMITS, OBSERVING = "Listening", "API", "Chat", "Limits", "Logs, metrics, traces"
SERVER_HELP: dict[str, tuple[str, str]] = {
    "host": (LISTENING, "Address to listen on; 0.0.0.0: every one of this machine."),
    "port": (LISTENING, "0: any free one."),
    "uds": (LISTENING, "A Unix socket instead of host and port."),
    "root_path": (LISTENING, "The path that a proxy strips."),
    "ssl_keyfile": (LISTENING, "TLS: the private key."),
    "ssl_certfile": (LISTENING, "TLS: the certificate."),
    "ssl_ca_certs": (LISTENING, "TLS: certificates that clients' ones are checked with."),
    "ssl_cert_reqs": (LISTENING, "TLS: 0, 1, 2: clients need no certificate, may have one, must have one."),
    "ssl_ciphers": (LISTENING, "TLS: OpenSSL's cipher list."),
    "served_model_name": (API, "Names that clients may call the model; several may follow."),
    "lora_modules": (API, "LoRA adapters to load: name=path, or a JSON object with name and path; several may follow."),
    "allow_runtime_lora_updating": (API, "Clients may load and unload LoRA adapters."),
    "api_key": (API, "A key that clients must send; several may follow. (or JAXPAGED_API_KEY)"),
    "allowed_origins": (API, "CORS: origins whose pages may call; several may follow, * for all."),
    "allowed_methods": (API, "CORS: methods."),
    "allowed_headers": (API, "CORS: headers."),
    "allow_credentials": (API, "CORS: with cookies."),
    "strict_fields": (API, "Refuse body fields that nobody defines, instead of logging them."),
    "override_generation_config": (API, "JSON object: default sampling parameters of requests."),
    "return_tokens_as_token_ids": (API, 'Logprobs name tokens "token_id:N".'),
    "enable_prompt_tokens_details": (API, "Usage with the number of cached prompt tokens."),
    "enable_force_include_usage": (API, "Every stream ends with its usage."),
    "stream_interval": (API, "Tokens that a chunk of a stream has at least."),
    "enable_request_id_headers": (API, "Answers carry X-Request-Id."),
    "default_chat_template_kwargs": (CHAT, "JSON object: variables of the chat template."),
    "trust_request_chat_template": (CHAT, "Requests may bring their own chat template (it runs in a sandbox)."),
    "response_role": (CHAT, "Role of the answer."),
    "tool_call_parser": (CHAT, "How the model writes tool calls: hermes, llama3_json, mistral, qwen3_coder, qwen, pythonic."),
    "enable_auto_tool_choice": (CHAT, "Taken for vLLM's sake: on whenever there is a tool call parser."),
    "exclude_tools_when_tool_choice_none": (CHAT, 'tool_choice "none" keeps the tools out of the prompt.'),
    "reasoning_parser": (CHAT, "How the model marks its reasoning: deepseek_r1, qwen3."),
    "max_num_queued_reqs": (LIMITS, "Requests that may wait; more get 503."),
    "max_body_size": (LIMITS, "Bytes of a request."),
    "max_num_prompts": (LIMITS, "Prompts of a completion request."),
    "shutdown_timeout": (LIMITS, "Seconds that running requests get at the end."),
    "watchdog_timeout": (LIMITS, "Seconds after which a step is said to hang; 0: never."),
    "slow_client_timeout": (LIMITS, "Seconds after which a client that does not read its stream is dropped; 0: never."),
    "enable_log_requests": (OBSERVING, "Log each request and its parameters."),
    "enable_log_outputs": (OBSERVING, "Log what is generated."),
    "max_log_len": (OBSERVING, "Most characters of a logged text."),
    "disable_uvicorn_access_log": (OBSERVING, "No line for each HTTP request."),
    "log_level": (OBSERVING, "critical, error, warning, info, debug."),
    "log_format": (OBSERVING, "text, or json: an object a line."),
    "metrics_prefix": (OBSERVING, "Of metric names; vllm: existing dashboards work."),
    "otlp_traces_endpoint": (OBSERVING, "Send OpenTelemetry traces there (needs jaxpaged[otel])."),
}
MANY = {f.name for f in fields(ServerOptions) if isinstance(f.default, tuple)}
# vLLM's flags that mean nothing here: taken, with a note. True: the flag has a value.
NOTED: dict[str, bool] = {
    "disable_log_requests": False, "disable_fastapi_docs": False, "enable_server_load_tracking": False,
    "api_server_count": True, "uvicorn_log_level": True, "enable_ssl_refresh": False, "headless": False,
    "disable_frontend_multiprocessing": False,
    "chat_template_content_format": True, "h11_max_incomplete_event_size": True, "h11_max_header_count": True,
    "use_v2_block_manager": False, "num_scheduler_steps": True, "max_seq_len_to_capture": True, "guided_decoding_backend": True,
    "numa_bind": False, "optimization_level": True, "performance_mode": True, "prefix_caching_hash_algo": True,
}  # fmt: skip


class ManyValues(TyperCommand):
    """A flag for several values takes all that follow it, as vLLM's do: --served-model-name a b."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {"--" + name.replace("_", "-") for name in MANY}
        spread: list[str] = []
        current: str | None = None
        count = 0
        for arg in args:
            if arg.startswith("-"):
                current, count = (arg, 0) if arg in flags else (None, 0)
                spread.append(arg)
            else:
                spread += [current, arg] if current is not None and count else [arg]
                count += 1
        return super().parse_args(ctx, spread)


def tolerated(command: Callable) -> Callable:
    """Adds vLLM's flags that ask for nothing here, hidden."""
    signature = inspect.signature(command)
    shown = [p for p in signature.parameters.values() if p.name != "notes"]
    names = {name: True for name in NOTHING_ASKED if name not in signature.parameters} | NOTED
    hidden = []
    for name, has_value in names.items():
        option = typer.Option("--" + name.replace("_", "-"), hidden=True)
        kind = Annotated[(str if has_value else bool) | None, option]
        hidden.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    def wrapper(**kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in names}
        notes = _notes({name: value for name, value in given.items() if value is not None})
        return command(notes=notes, **kwargs)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__signature__ = signature.replace(parameters=[*shown, *hidden])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in (*shown, *hidden)}
    return wrapper


def _notes(given: dict[str, Any]) -> list[str]:
    """What to say about them. RequestError for a value that asks for something that is not there."""
    for name in given.keys() & NOTHING_ASKED.keys():
        known = {str(one).lower(): one for one in NOTHING_ASKED[name]}
        without_nothing_asked({name: known.get(given[name].lower(), given[name])})
    return [f"--{name.replace('_', '-')} means nothing here and is not used" for name in given]


@tolerated
@config_flags({**HELP, **SERVER_HELP, **NODES_HELP}, EngineConfig, ServerOptions, Nodes)
def serve(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help='Like --model. (default: "demo")')] = None,
    model_flag: Annotated[
        str | None, typer.Option("--model", "-m", help=HELP["model"][1], rich_help_panel=HELP["model"][0])
    ] = None,
    notes: tuple[str, ...] = (),
    **flags: Any,
) -> None:
    """Serve a model with OpenAI's API (and Anthropic's), a page to try it, and metrics."""
    if model is not None and model_flag is not None:
        raise RequestError(f"give the model once, got {model!r} and --model {model_flag!r}.", "model")
    options = server_options(flags)
    engine = {f.name: flags[f.name] for f in fields(EngineConfig) if f.name in flags}
    engine["model"] = model or model_flag or engine.get("model", "demo")
    nodes = Nodes(**{f.name: flags[f.name] for f in fields(Nodes) if f.name in flags})
    raise typer.Exit(run(EngineConfig(**engine), options, notes, nodes))


def server_options(flags: dict[str, Any]) -> ServerOptions:
    """The server's part of the flags."""
    given = {f.name: flags[f.name] for f in fields(ServerOptions) if f.name in flags}
    for name in MANY & given.keys():
        given[name] = tuple(given[name])
    if not given.get("api_key") and os.environ.get("JAXPAGED_API_KEY"):
        given["api_key"] = (os.environ["JAXPAGED_API_KEY"],)
    if os.environ.get("JAXPAGED_ALLOW_RUNTIME_LORA_UPDATING") == "1":
        given.setdefault("allow_runtime_lora_updating", True)
    return ServerOptions(**given)


def run(config: EngineConfig, options: ServerOptions, notes: Sequence[str] = (), nodes: Nodes | None = None) -> int:
    """Listens, builds the engine (or engines), serves. The exit status. notes: for the log. nodes: processes of one engine."""
    from jaxpaged_server import run as server
    from jaxpaged_server.service import open_service

    server.set_up_logs(options.log_format, options.log_level)
    for note in notes:
        log.warning("%s", note)
    among = place(nodes or Nodes(), os.environ)
    if among is not None:
        from jaxpaged import serve_many

        serve_many.run(config, options, among)
    with server.listen(options) as sock:  # before JAX is imported: a port in use is said at once
        from jaxpaged.build_replicas import build_replicas

        built = build_replicas(config, progress=options.log_format == "text")
        return server.serve(open_service(built, options), sock)
