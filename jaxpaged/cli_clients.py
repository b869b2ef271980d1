"""The commands that talk to a server: `complete`, `run-batch`, `bench serve`; and the flags that say where it is."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from jaxpaged.bench_options import DatasetOptions, ReportOptions, TargetOptions, TrafficOptions
from jaxpaged.flags import engine_flags
from jaxpaged.request import RequestError
from jaxpaged.sampling_flags import MinP, Seed, Stop, Temperature, TopK, TopP, given_params, sampling

SERVER = "Server"


def _server_flag(*names: str, text: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=SERVER)


Url = Annotated[str | None, _server_flag(text="Use the server at this URL: http://localhost:8000.")]
ModelName = Annotated[str | None, _server_flag(text="Its model. (default: the first it has)")]
ApiKey = Annotated[str | None, _server_flag(text="Bearer token. (default: the environment's OPENAI_API_KEY)")]


def refuse_engine_flags(engine: dict[str, Any]) -> None:
    """RequestError if flags of an engine were given beside --url."""
    if engine:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in engine)
        raise RequestError(f"--url uses a server that has its model loaded: leave out {flags} (--model-name chooses one of its "
                           "models).", "url")  # fmt: skip


def complete(
    message: Annotated[str | None, typer.Option("--message", "--quick", "-q", help="Complete this prompt and end.")] = None,
    url: Url = None,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    max_tokens: Annotated[int, sampling("Most tokens to generate.")] = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    sampling_seed: Seed = None,
    stop: Stop = None,
    stats: Annotated[bool, typer.Option(help="Show tokens and speed below each text.")] = False,
) -> None:
    """Complete text on a server: of -q, of standard input, or a line at a time in the terminal."""
    if url is None:
        raise RequestError("complete uses a server: give --url http://localhost:8000, or use `jaxpaged generate`, which loads "
                           "a model itself.", "url")  # fmt: skip
    from jaxpaged import chat, remote

    given = given_params(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                         seed=sampling_seed, stop=stop or None)  # fmt: skip
    with remote.Server(url, model_name, api_key) as server:
        answer = lambda prompt: chat.show(server.complete(prompt, **given), chat.say, stats)
        if message is not None:
            answer(message)
        elif not sys.stdin.isatty():
            answer(sys.stdin.read())
        else:
            chat.read_lines(answer, "/quit (or Ctrl-D) ends, Ctrl-C stops a text.", chat.say)


@engine_flags
def run_batch(
    input_file: Annotated[Path, typer.Option("--input-file", "-i", help="Requests in OpenAI's batch format, a line each.")],
    output_file: Annotated[Path, typer.Option("--output-file", "-o", help="Where answers go; what is there is not redone.")],
    url: Url = None,
    api_key: ApiKey = None,
    max_concurrency: Annotated[int, typer.Option(help="Most requests under way.")] = 256,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in the requests. (default: --model)")
    ] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Send again what failed in an earlier run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log.")] = False,
    **engine: Any,
) -> None:
    """Answer a file of requests with a model, or with the server at --url; go on where an earlier run ended."""
    from jaxpaged import run_batch as batch

    if url is not None:
        refuse_engine_flags(engine)
    app = lambda: _open_app(engine, served_model_name or [], quiet)
    client = lambda: batch.in_process(app()) if url is None else batch.at_url(url, api_key)
    batch.say(batch.run(input_file, output_file, client, max_concurrency, retry_errors, quiet), output_file)


@asynccontextmanager
async def _open_app(engine: dict[str, Any], names: list[str], quiet: bool) -> AsyncIterator[Any]:
    """The server's application, without a server, over an engine with these flags."""
    from jaxpaged.build_replicas import build_replicas
    from jaxpaged.config import EngineConfig
    from jaxpaged_server.app import create_app
    from jaxpaged_server.options import ServerOptions
    from jaxpaged_server.service import open_service

    built = build_replicas(EngineConfig(**engine), progress=not quiet)
    app = create_app(open_service(built, ServerOptions(served_model_name=tuple(names))))
    async with app.router.lifespan_context(app):
        yield app


def option_groups(command: Callable) -> Callable:
    """Turns a command whose parameters are dataclasses (bench_options.py) into one with a flag for each of their fields."""
    groups = get_type_hints(command)
    groups.pop("return", None)

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        return command(**{name: group(**{f.name: given[f.name] for f in fields(group)}) for name, group in groups.items()})

    flags = [_option(group, f.name, f.default) for group in groups.values() for f in fields(group)]
    wrapper.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {flag.name: flag.annotation for flag in flags}
    return wrapper


def _option(group: type, name: str, default: Any) -> inspect.Parameter:
    hint = get_type_hints(group, include_extras=True)[name]
    kind, text = hint.__origin__, hint.__metadata__[0]
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []
    annotation = Annotated[kind, typer.Option(*names, help=text, rich_help_panel=group.__doc__)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@option_groups
def serve(target: TargetOptions, data: DatasetOptions, traffic: TrafficOptions, report: ReportOptions) -> None:
    """Load of many clients on a running server: latencies and tokens a second, as `vllm bench serve` reports them."""
    from jaxpaged import bench_serve

    if bench_serve.run(target, data, traffic, report).interrupted:
        raise typer.Exit(130)
