"""What would fit, or serve better: found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxpaged import sharding
from jaxpaged.devices import DEVICES
from jaxpaged.plan_model import Setting, fit, fits, setting
from jaxpaged.request import RequestError

MOST_DEVICES = 64  # that are tried


class Advice(NamedTuple):
    """flags: what to change. sequences: of max_model_len tokens that fit then, in an engine."""

    flags: str
    sequences: float


def advice(given: Setting) -> list[Advice]:
    """Single changes that make one longest sequence fit, the least of each kind; where there are none, pairs of them."""
    tried = [_least(given, kind) for kind in _kinds(given)]
    found = [one for one in tried if one is not None]
    length = _length(given)
    found += [length] if length else []
    if not found:
        found = [one for small in _quantized(given) if (one := _least(given, _more_devices(given, small))) is not None]
    other = _other_device(given)
    return [*found, *([other] if other else [])]


def _kinds(given: Setting) -> Iterator[list[dict[str, Any]]]:
    """Of each kind of change, candidates; those that cost least come first."""
    yield _more_devices(given, {})
    yield _quantized(given)
    if given.config.kv_cache_dtype == "auto":
        yield [{"kv_cache_dtype": name} for name in ("fp8", "int8") if name != "fp8" or given.device.float8]
    tokens = int(given.config.max_num_batched_tokens)
    yield [{"max_num_batched_tokens": tokens // n} for n in (2, 4, 8) if tokens // n >= int(given.config.max_num_seqs)]


def _more_devices(given: Setting, more: dict[str, Any]) -> list[dict[str, Any]]:
    size, sizes = given.config.tensor_parallel_size, []
    while (size := size * 2) <= MOST_DEVICES:
        try:
            sharding.check(given.decoder, size, given.config.enable_expert_parallel)
        except RequestError:
            continue
        sizes.append({"tensor_parallel_size": size, **more})
    return sizes


def _quantized(given: Setting) -> list[dict[str, Any]]:
    if given.forms:
        return []
    return [{"quantization": name} for name in ("fp8", "int8", "int4") if name != "fp8" or given.device.float8]


def _least(given: Setting, candidates: list[dict[str, Any]]) -> Advice | None:
    """The first that fits."""
    for changes in candidates:
        found = _try(given, changes)
        if found is not None:
            return Advice(as_flags(changes), found)
    return None


def _try(given: Setting, changes: dict[str, Any]) -> float | None:
    """Sequences that fit with these changes."""
    try:
        plan = fits(given.change(**changes))
    except (RequestError, ValueError):  # groups of inputs that do not divide, a cache that this model cannot have
        return None
    return plan and (plan.num_pages - 1) / plan.per_sequence


def _length(given: Setting) -> Advice | None:
    """The longest sequences that there is room for."""
    try:
        fitted, plan = fit(given.change(max_model_len="auto"))
    except RequestError:
        return None
    length = int(fitted.config.max_model_len or 0)
    if length >= int(given.config.max_model_len or 0):
        return None
    return Advice(as_flags({"max_model_len": length}), (plan.num_pages - 1) / plan.per_sequence)


def _other_device(given: Setting) -> Advice | None:
    """The smallest number of other devices, of the known kinds, that hold the model as it was asked for."""
    for size in (1, 2, 4, 8, 16):
        for name, device in DEVICES.items():
            if device.name == given.device.name or device.memory <= given.device.memory:
                continue
            try:
                plan = fits(setting(given.source, given.config.replace(tensor_parallel_size=size), device))
            except RequestError:
                continue
            if plan:
                flags = f"--device {name} {as_flags({'tensor_parallel_size': size})}"
                return Advice(flags, (plan.num_pages - 1) / plan.per_sequence)
    return None


def as_flags(values: dict[str, Any]) -> str:
    """As on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())
