"""`jaxpaged plan`: will a model fit on devices, and how fast should it be? Without a GPU and without weights.

What fits is exact arithmetic (and, where the compilers are, their own account of temporaries); how fast it is, a roofline. No
prediction of a time has been checked on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxpaged import plan_compile
from jaxpaged.config import EngineConfig
from jaxpaged.devices import Device
from jaxpaged.memory import MemoryPlan
from jaxpaged.plan_advice import Advice, advice
from jaxpaged.plan_compile import Compiled
from jaxpaged.plan_model import Setting, Source, fit, setting
from jaxpaged.plan_times import Speed, Step, room, speeds, typical_steps
from jaxpaged.request import RequestError

BATCHES: tuple[int | None, ...] = (1, 8, 32, 128, None)
PROMPTS = (128, 1024, 8192)
WORKED_OUT = ("max_model_len", "max_num_seqs", "max_num_batched_tokens")


@dataclass(frozen=True)
class Plan:
    """memory: None if it does not fit, then `why` says so and `advice` what would. compiled: None without compilers, or why
    they were not asked."""

    setting: Setting
    memory: MemoryPlan | None
    why: str
    advice: list[Advice]
    compiled: Compiled | None
    not_compiled: str
    steps: list[Step]
    speeds: list[Speed]
    seconds: float

    @property
    def command(self) -> str:
        """What to start on the devices."""
        return shlex.join(["jaxpaged", "serve", *serve_arguments(self.setting)])


def make(source: Source, config: EngineConfig, device: Device, batches: Sequence[int | None] = BATCHES,
         prompts: Sequence[int] = PROMPTS, compiles: bool = True, all_layers: bool = False) -> Plan:  # fmt: skip
    """compiles: where the compilers are; all_layers: not only with some of them. RequestError if there is no such model, or
    the sizes do not divide it."""
    start = time.perf_counter()
    given = setting(source, config, device)
    try:
        fitted, memory = fit(given)
    except RequestError as error:
        return Plan(given, None, error.message, advice(given), None, "", [], [], time.perf_counter() - start)
    compiled, why = plan_compile.compiled(fitted, memory, all_layers) if compiles else (None, "not asked for (--no-compile)")
    if compiled is not None:
        try:
            fitted, memory = fit(given, max(given.expected_temporaries, compiled.temporaries))  # as the engine does
        except RequestError as error:
            return Plan(given, None, error.message, advice(given), compiled, "", [], [], time.perf_counter() - start)
    context = min(1024, int(fitted.config.max_model_len or 0) - 1)
    steps = typical_steps(fitted, room(fitted, memory, context + 1), context)
    found = speeds(fitted, memory, batches, prompts)
    return Plan(fitted, memory, "", [], compiled, why, steps, found, time.perf_counter() - start)


def serve_arguments(given: Setting) -> list[str]:
    """The model, the sizes that were worked out, and what differs from that which `jaxpaged serve` takes by itself."""
    c = given.config
    plain = EngineConfig(model=c.model).resolve("gpu", given.decoder.max_positions)
    found = [c.model]
    for name in (f.name for f in dataclasses.fields(c) if f.name != "hf_token"):
        value = getattr(c, name)
        if name in WORKED_OUT or value != getattr(plain, name):
            found += _argument(name.replace("_", "-"), value)
    return found


def _argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in plain values."""
    s = plan.setting
    stages = [
        {"layers": [stage.layers.start, stage.layers.stop], "weights": s.weights(stage), "page_bytes": s.page_bytes(stage)}
        for stage in s.stages
    ]
    config = {f.name: getattr(s.config, f.name) for f in dataclasses.fields(s.config) if f.name != "hf_token"}
    return {
        "model": s.config.model, "device": dataclasses.asdict(s.device), "devices": s.sizes.devices, "config": config,
        "fits": plan.memory is not None, "why_not": plan.why, "advice": [one._asdict() for one in plan.advice],
        "memory": plan.memory and _memory(plan.memory), "memory_limit": s.memory_limit, "stages": stages,
        "compiled": plan.compiled and plan.compiled._asdict(), "not_compiled": plan.not_compiled,
        "steps": [_step(one) for one in plan.steps], "speeds": [one._asdict() for one in plan.speeds],
        "command": plan.command if plan.memory else None, "checked_on_a_gpu": False, "seconds": plan.seconds,
    }  # fmt: skip


def _memory(memory: MemoryPlan) -> dict[str, Any]:
    return {**dataclasses.asdict(memory), "cache": memory.cache, "sequences": (memory.num_pages - 1) / memory.per_sequence}


def _step(step: Step) -> dict[str, Any]:
    lines = [{**line.work._asdict(), "seconds": line.seconds, "bound": line.bound} for line in step.lines]
    return {**step._asdict(), "lines": lines}
