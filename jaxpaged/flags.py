"""The engine's command-line flags: one for each field of `EngineConfig`, in groups, and the YAML file that sets them.

A flag that is not given is not passed on, so that defaults have one home: `EngineConfig`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxpaged.config import ALL_TO_ALL, CACHE_DTYPES, DTYPES, LOAD_FORMATS, POLICIES, EngineConfig
from jaxpaged.request import RequestError, refuse_unknown

MODEL, MEMORY, SCHEDULING, LORA = "Model", "Memory", "Scheduling", "LoRA adapters"
COMPILING, DEVICES = "Compilation and device", "Many devices"

JSON_FIELDS = ("hf_overrides", "default_chat_template_kwargs", "override_generation_config")  # objects, given as JSON

HELP: dict[str, tuple[str, str]] = {
    "model": (MODEL, '"demo", "demo-gemma3", a Hugging Face id, a folder, or a .gguf file.'),
    "tokenizer": (MODEL, "Another place for the tokenizer."),
    "skip_tokenizer_init": (MODEL, "Work with token ids only."),
    "dtype": (MODEL, f"Of weights, activations and cache: {', '.join(DTYPES)}. auto: float32 on CPU, else bfloat16."),
    "load_format": (MODEL, f"{', '.join(LOAD_FORMATS)}. dummy: random weights from the config alone."),
    "revision": (MODEL, "Branch, tag or commit on the Hugging Face hub."),
    "hf_token": (MODEL, "Access token for the Hugging Face hub (or set HF_TOKEN)."),
    "hf_overrides": (MODEL, "JSON object of changes to the model's config.json."),
    "generation_config": (MODEL, "auto: default sampling parameters from the model; vllm: none."),
    "chat_template": (MODEL, "A Jinja chat template in the place of the model's."),
    "trust_remote_code": (MODEL, "Refused: code of a checkpoint is never run."),
    "max_model_len": (MEMORY, 'Longest sequence in tokens: 4096, "4k", "auto".'),
    "block_size": (MEMORY, "Tokens a page."),
    "gpu_memory_utilization": (MEMORY, "Share of the device's memory that may be used."),
    "kv_cache_memory_bytes": (MEMORY, "Exactly so many bytes for the KV cache."),
    "num_gpu_blocks_override": (MEMORY, "Exactly so many pages."),
    "quantization": (MODEL, "int8, int4 or fp8: quantise the weights as they are loaded."),
    "kv_cache_dtype": (MEMORY, f"Of keys and values: {', '.join(CACHE_DTYPES)}. fp8, int8: a byte a number, with scales."),
    "disable_hybrid_kv_cache_manager": (MEMORY, "Keep whole sequences also for layers that see a window only."),
    "max_num_seqs": (SCHEDULING, "Sequences that run at once."),
    "max_num_batched_tokens": (SCHEDULING, "Tokens a step."),
    "enable_prefix_caching": (SCHEDULING, "Share pages of equal prefixes."),
    "enable_chunked_prefill": (SCHEDULING, "Always on."),
    "long_prefill_token_threshold": (SCHEDULING, "Longest chunk of one prompt a step; 0: no limit."),
    "scheduling_policy": (SCHEDULING, f"{' or '.join(POLICIES)}."),
    "async_scheduling": (SCHEDULING, "Dispatch a step before the last one's tokens are read."),
    "max_logprobs": (SCHEDULING, "Most logprobs a token that a request may ask for."),
    "enable_lora": (LORA, "Requests may name LoRA adapters."),
    "max_loras": (LORA, "Adapters on the device at once; more wait for one to end."),
    "max_lora_rank": (LORA, "Largest rank of an adapter."),
    "max_cpu_loras": (LORA, "Adapters in host memory; none: as many as are loaded."),
    "seed": (SCHEDULING, "Of requests that bring no seed, and of dummy weights."),
    "enforce_eager": (COMPILING, "Compile a program when it is first needed, not all at the start."),
    "kernel_backend": (COMPILING, "Of attention and the other kernels: auto, triton, mosaic_gpu or reference."),
    "debug_checks": (COMPILING, "Check page ids and lengths in each step, on the device; slow."),
    "compilation_cache_dir": (COMPILING, 'Where compiled programs are kept; "none": nowhere.'),
    "tensor_parallel_size": (DEVICES, "Devices that share each layer."),
    "pipeline_parallel_size": (DEVICES, "Groups of devices that have some of the layers each."),
    "data_parallel_size": (DEVICES, "Engines, each on devices of its own, that share the requests."),
    "enable_expert_parallel": (DEVICES, "Devices have some of the experts each, not some of each expert."),
    "all2all_backend": (DEVICES, f"How tokens get to experts on other devices: {' or '.join(ALL_TO_ALL)}."),
    "disable_log_stats": (COMPILING, "No periodic statistics in the log."),
}


def engine_flags(command: Callable) -> Callable:
    """Gives a command that takes `**engine` one flag for each field of EngineConfig; those given arrive in `engine`."""
    return config_flags(HELP, EngineConfig)(command)


def config_flags(described: dict[str, tuple[str, str]], *kinds: Any) -> Callable[[Callable], Callable]:
    """Gives a command that takes `**values` one flag for each field of the dataclasses `kinds`; those given arrive there by
    name. described: field -> (group, text). A flag that the command declares itself is not made."""

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in own}
        flags = [_flag(f, described[f.name]) for kind in kinds for f in fields(kind) if f.name not in taken]

        @functools.wraps(command)
        def wrapper(**kwargs: Any) -> Any:
            values = {flag.name: kwargs.pop(flag.name) for flag in flags}
            kwargs.pop("config", None)
            return command(**kwargs, **{name: _value(name, v) for name, v in values.items() if v is not None})

        config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_CONFIG)
        wrapper.__signature__ = signature.replace(parameters=[*own, config, *flags])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*own, config, *flags)}
        return wrapper

    return decorate


def _flag(field: Any, described: tuple[str, str]) -> inspect.Parameter:
    name, (panel, text) = field.name, described
    default = field.default if field.default is not MISSING else None
    many = isinstance(default, tuple)
    kind = type(default) if isinstance(default, (bool, float)) or (type(default) is int) else list[str] if many else str
    shown = "none" if default in (None, (), "") else " ".join(default) if isinstance(default, tuple) else str(default)
    declared = "--" + name.replace("_", "-")
    names = [f"{declared}/--no-{declared[2:]}"] if kind is bool else [declared, *(["-m"] if name == "model" else [])]
    if name == "block_size":
        names.append("--page-size")
    option = typer.Option(*names, help=f"{text} (default: {shown})", rich_help_panel=panel, show_default=False)
    given = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=given)


def _value(name: str, given: Any) -> Any:
    """Text from the command line or the file as EngineConfig takes it."""
    if name in JSON_FIELDS:
        try:
            return json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} must be a JSON object, got {given!r} ({error}).", name) from None
    if isinstance(given, str) and given.lower() == "none":
        return None
    if isinstance(given, str) and given.lstrip("-").isdigit():
        return int(given)
    return given


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of this command's flags: what is given on the command line wins."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold a mapping of flags to values, not a {type(values).__name__}.")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    try:
        refuse_unknown(f"{path}: this command", values, [str(p.name) for p in context.command.params if p.name != "config"])
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None
    values = {
        key: json.dumps(value) if key in JSON_FIELDS and isinstance(value, dict) else value for key, value in values.items()
    }
    context.default_map = {**(context.default_map or {}), **values}
    return path


_CONFIG = Annotated[
    Path | None,
    typer.Option(help="YAML file with values for this command's flags.", is_eager=True, callback=_read_config),
]
