"""`jaxpaged ...`: the command line. Help and mistakes answer at once: JAX is imported when a model is built."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import jaxpaged
from jaxpaged import cli_clients, cli_convert, cli_plan, cli_serve
from jaxpaged.cli_clients import ApiKey, ModelName, Url
from jaxpaged.flags import engine_flags
from jaxpaged.request import RequestError, RequestOutput
from jaxpaged.sampling_flags import SAMPLING as SAMPLING
from jaxpaged.sampling_flags import MinP, Seed, Stop, Temperature, TopK, TopP, given_params, sampling

log = logging.getLogger("jaxpaged")


class _Root(TyperGroup):
    """Ends with 141, as a shell says it of other programs, when the reader of `jaxpaged ... | head` has gone. (typer by itself
    ends with 1, by which `plan` says something else.)"""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                print(end="", flush=True)  # what waits until now would find out too late
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(name="jaxpaged", help="vLLM re-thought for JAX.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False, cls=_Root)  # fmt: skip
bench_app = typer.Typer(help="Measure latency, throughput or start-up time.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no log.")]
OutputJson = Annotated[Path | None, typer.Option(help="Write the results to this file as JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"jaxpaged {jaxpaged.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")] = False,
) -> None:
    """vLLM re-thought for JAX: paged attention and continuous batching for language models."""


def _build(engine: dict[str, Any], quiet: bool) -> Any:
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("jax", "httpx", "huggingface_hub", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return jaxpaged.LLM(use_tqdm=not quiet, **engine)


@app.command()
@engine_flags
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to complete. Without any: standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A text file with a prompt in each line.")] = None,
    chat: Annotated[bool, typer.Option(help="Each prompt is a user's message: use the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt, a line each.")] = False,
    max_tokens: Annotated[int, sampling("Most tokens to generate.")] = 128,
    min_tokens: Annotated[int | None, sampling("Least tokens to generate.")] = None,
    n: Annotated[int | None, sampling("Samples a prompt.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    sampling_seed: Seed = None,
    presence_penalty: Annotated[float | None, sampling("For tokens of the output so far, -2..2.")] = None,
    frequency_penalty: Annotated[float | None, sampling("For each occurrence in the output, -2..2.")] = None,
    repetition_penalty: Annotated[float | None, sampling("> 1 discourages tokens of prompt and output.")] = None,
    stop: Stop = None,
    ignore_eos: Annotated[bool | None, sampling("Go on after the end-of-sequence token.")] = None,
    logprobs: Annotated[int | None, sampling("Logprobs of so many alternatives (with --json).")] = None,
    quiet: Quiet = False,
    **engine: Any,
) -> None:
    """Complete prompts, all at once."""
    texts = _prompts(prompts or [], file)
    given = given_params(
        max_tokens=max_tokens, min_tokens=min_tokens, n=n, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        seed=sampling_seed, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty, stop=stop or None, ignore_eos=ignore_eos, logprobs=logprobs,
    )  # fmt: skip
    with _build(engine, quiet) as llm:
        params = llm.get_default_sampling_params().clone(**given)
        if chat:
            outputs = llm.chat([[{"role": "user", "content": text}] for text in texts], params, use_tqdm=not quiet)
        else:
            outputs = llm.generate(texts, params, use_tqdm=not quiet)
    for text, output in zip(texts, outputs):
        print(_as_json(text, output) if as_json else _as_text(text, output))
    failed = [output.error for output in outputs if output.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(outputs)} prompts failed: {failed[0]}")


def _prompts(given: list[str], file: Path | None) -> list[str]:
    if given and file is not None:
        raise RequestError("give prompts or --file, not both.", "prompts")
    if file is not None:
        try:
            given = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{file} cannot be read: {error}", "file") from None
    elif not given and not sys.stdin.isatty():
        given = [text] if (text := sys.stdin.read()) else []
    if not given:
        raise RequestError('there is no prompt; for example: jaxpaged generate "The capital of France is"', "prompts")
    return given


def _as_text(prompt: str, output: RequestOutput) -> str:
    shown = [f"> {prompt}"]
    for completion in output.outputs:
        shown.append(f"[{completion.index}] {completion.text}" if len(output.outputs) > 1 else completion.text)
    return "\n".join(shown) + "\n"


def _as_json(prompt: str, output: RequestOutput) -> str:
    def one(completion: Any) -> dict[str, Any]:
        found = {name: getattr(completion, name) for name in ("index", "text", "token_ids", "finish_reason", "stop_reason")}
        if completion.logprobs is not None:
            found["logprobs"] = [
                {str(token): {"logprob": p.logprob, "rank": p.rank, "token": p.decoded_token} for token, p in entry.items()}
                for entry in completion.logprobs
            ]
        return found

    return json.dumps(
        {
            "prompt": prompt,
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "outputs": [one(completion) for completion in output.outputs],
            "error": output.error,
        },
        ensure_ascii=False,
    )


@app.command()
@engine_flags
def chat(
    system: Annotated[str | None, typer.Option("--system-prompt", help="A first message with the role system.")] = None,
    message: Annotated[str | None, typer.Option("--message", "--quick", "-q", help="Answer this one message and end.")] = None,
    url: Url = None,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    max_tokens: Annotated[int | None, sampling("Most tokens an answer. (default: as many as fit)")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    sampling_seed: Seed = None,
    stop: Stop = None,
    stats: Annotated[bool, typer.Option(help="Show tokens and speed below each answer.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no log.")] = False,
    **engine: Any,
) -> None:
    """Talk with a model in the terminal; answers stream as they are generated."""
    from jaxpaged import chat as repl
    from jaxpaged import remote

    given = given_params(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=sampling_seed, stop=stop or None)
    if url is not None:
        more = {} if max_tokens is None else {"max_tokens": max_tokens}
        cli_clients.refuse_engine_flags(engine)
        with remote.Server(url, model_name, api_key) as server:
            repl.talk(remote.RemoteConversation(server, {**given, **more}, system, stats), message)
    else:
        with _build(engine, quiet) as llm:
            params = llm.get_default_sampling_params().clone(max_tokens=max_tokens, **given)
            repl.talk(repl.Conversation(llm, params, system, stats), message)


@app.command()
@engine_flags
def demo(**engine: Any) -> None:
    """Fetch a small real model, answer several prompts at once, and show what happened."""
    from jaxpaged import demo as show

    show.run(lambda **defaults: _build({**defaults, **engine}, quiet=False))


@bench_app.command()
@engine_flags
def latency(
    batch_size: Annotated[int, typer.Option(help="Requests that run together.")] = 1,
    input_len: Annotated[int, typer.Option(help="Prompt tokens a request.")] = 128,
    output_len: Annotated[int, typer.Option(help="Output tokens a request.")] = 128,
    num_iters: Annotated[int, typer.Option(help="Runs that count; one more warms up.")] = 5,
    output_json: OutputJson = None,
    quiet: Quiet = False,
    **engine: Any,
) -> None:
    """Time of one batch of requests: to the first token, a token, and in all."""
    from jaxpaged import bench

    _bench(lambda llm: bench.latency(llm, batch_size, input_len, output_len, num_iters), engine, output_json, quiet)


@bench_app.command()
@engine_flags
def throughput(
    num_prompts: Annotated[int, typer.Option(help="Requests, all submitted at once.")] = 64,
    input_len: Annotated[int, typer.Option(help="Longest prompt in tokens; lengths are spread from an eighth of it.")] = 256,
    output_len: Annotated[int, typer.Option(help="Longest output in tokens; lengths are spread likewise.")] = 256,
    output_json: OutputJson = None,
    quiet: Quiet = False,
    **engine: Any,
) -> None:
    """Tokens a second of many requests at once."""
    from jaxpaged import bench

    _bench(lambda llm: bench.throughput(llm, num_prompts, input_len, output_len), engine, output_json, quiet)


@bench_app.command()
@engine_flags
def startup(
    num_iters: Annotated[int, typer.Option(help="Starts with a warm cache that count.")] = 3,
    output_json: OutputJson = None,
    **engine: Any,
) -> None:
    """Seconds until an engine is ready, by stage: with an empty compilation cache, then with a full one."""
    from jaxpaged import bench

    _write(bench.startup(engine, num_iters), output_json)


def _bench(measure: Callable[[Any], dict[str, Any]], engine: dict[str, Any], output_json: Path | None, quiet: bool) -> None:
    with _build(engine, quiet) as llm:
        _write(measure(llm), output_json)


def _write(result: dict[str, Any], path: Path | None) -> None:
    for name, value in result.items():
        print(f"{name + ':':<32} {value:,.4g}" if isinstance(value, float) else f"{name + ':':<32} {value}")
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@app.command("collect-env")
def collect_env() -> None:
    """Print versions, devices and settings, to paste into a bug report."""
    from jaxpaged import env

    print(env.report())


app.command(cls=cli_serve.ManyValues)(cli_serve.serve)
bench_app.command()(cli_clients.serve)
app.command()(cli_clients.complete)
app.command()(cli_convert.convert)
app.command()(cli_plan.plan)
app.command("run-batch")(cli_clients.run_batch)


def main() -> None:
    """Entry point: mistakes become one line on standard error and status 2; JAXPAGED_DEBUG=1 shows the traceback. (Ctrl-C
    is typer's: status 130.)"""
    try:
        app(prog_name="jaxpaged")
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        if os.environ.get("JAXPAGED_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
