"""A plan's programs, compiled for devices that are not here: the same ones that the engine would run.

The compilers want a process of their own (`devices_compiler`): this module is also that process's program. It reads a pickled
(Setting, pages) from standard input, which only `compiled` writes, and prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpaged import build, devices_compiler
from jaxpaged.batch import Variant
from jaxpaged.memory import MemoryPlan
from jaxpaged.plan_model import Setting
from jaxpaged.stage import Stage

TIMEOUT = 300.0
KINDS = ("all-reduce", "reduce-scatter", "all-gather", "ragged-all-to-all", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "f64": 8}


class Compiled(NamedTuple):
    """temporaries: bytes of the largest program. donated, aliased: bytes of the cache that steps are given, and that they
    update in place. collectives: of each program, by kind: how many, and bytes of what they give on a device. programs: what
    was compiled, and the seconds it took. layers: with how many layers; from two numbers the rest is extrapolated."""

    temporaries: int
    donated: int
    aliased: int
    collectives: dict[str, dict[str, tuple[int, int]]]
    programs: dict[str, float]
    layers: tuple[int, ...]
    seconds: float


def compiled(setting: Setting, memory: MemoryPlan, all_layers: bool = False, timeout: float = TIMEOUT
             ) -> tuple[Compiled | None, str]:  # fmt: skip
    """In a child process; or None, and why. all_layers: not only some of them."""
    if reason := devices_compiler.missing():
        return None, reason
    start, work = time.perf_counter(), pickle.dumps((setting, memory.num_pages, all_layers))
    environment = devices_compiler.environment()
    environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}:{Path(__file__).parents[1]}"
    try:
        run = subprocess.run(
            [sys.executable, "-m", __name__], input=work, capture_output=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None, f"the compiler was stopped after {timeout:.0f} s"
    line = next((text for text in reversed(run.stdout.decode().splitlines()) if text.startswith("{")), None)
    if run.returncode or line is None:
        last = (run.stderr.decode(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        return None, f"the compiler ended with {run.returncode}: {last[:300]}"
    found = json.loads(line)
    collectives = {step: {kind: tuple(of) for kind, of in kinds.items()} for step, kinds in found.pop("collectives").items()}
    found |= {"collectives": collectives, "layers": tuple(found["layers"]), "seconds": time.perf_counter() - start}
    return Compiled(**found), ""


# -- in the child ------------------------------------------------------------------------------------------------------------


def stages_of(setting: Setting, num_pages: int, devices: Sequence[Any]) -> list[Stage]:
    """The engine's stages on these devices. The seam between a plan and the engine: nothing else knows how it is built."""
    c = setting.config
    parallel = build.make_parallel(c, setting.decoder, devices)
    blueprint = build.make_blueprint(c, parallel, setting.forms)
    blueprint = dataclasses.replace(blueprint, dims=dataclasses.replace(blueprint.dims, num_pages=num_pages))
    return [Stage(blueprint, number) for number in range(len(parallel.layers))]


class Program(NamedTuple):
    """layers: of its stage. The others as of `Compiled`."""

    layers: int
    temporaries: int
    aliased: int
    collectives: dict[str, tuple[int, int]]
    seconds: float


def depths(setting: Setting, all_layers: bool) -> list[int]:
    """How many layers to compile with: so many that each stage has each kind, and twice as many. Compilers take time for each
    layer; collectives grow with layers in a straight line, and temporaries do not (tests/test_plan.py)."""
    layers, stages = setting.decoder.layers, setting.sizes.pipeline
    kinds = [len(set(layers[:n])) for n in range(len(layers) + 1)]
    least = max(2, kinds.index(kinds[-1])) * stages
    return [len(layers)] if all_layers or 2 * least >= len(layers) else [least, 2 * least]


def lowered(setting: Setting, stages: Sequence[Stage], first: bool) -> Iterator[tuple[str, int, Any]]:
    """Name, layers and lowered program: the largest step, one of decodes, and what samples. Of more than two stages, one
    between. first: else only what depends on the number of layers."""
    rows = setting.buckets[-1].num_rows
    small = next(b for b in setting.buckets if b.num_tokens >= rows and b.num_rows >= rows)
    for bucket in dict.fromkeys((setting.buckets[-1], *((small,) if first or setting.sizes.tensor > 1 else ()))):
        for stage in [*stages[:2], *stages[2:][-1:]]:
            what = f"stage {stage.number}, " if len(stages) > 1 else ""
            yield f"{what}{bucket.num_tokens} tokens", len(stage.model.layers), stage.lower_forward(bucket, False)
    for variant in (Variant.SAMPLE, Variant.FULL) if first else ():
        yield f"sampling {rows} rows ({variant.name.lower()})", 0, stages[-1].lower_sample(rows, variant)


def compile_depth(setting: Setting, num_pages: int, depth: int, first: bool) -> tuple[dict[str, Program], int]:
    """With the first `depth` layers. Also the bytes of the cache that the programs are given."""
    cut = dataclasses.replace(setting, decoder=dataclasses.replace(setting.decoder, layers=setting.decoder.layers[:depth]))
    devices = devices_compiler.paper_devices(setting.device, setting.sizes.tensor * setting.sizes.pipeline)
    stages, found, donated = stages_of(cut, num_pages, devices), {}, 0
    for name, layers, program in lowered(cut, stages, first):
        start = time.perf_counter()
        made = program.compile()
        memory, said = made.memory_analysis(), collectives(made.as_text())
        aliased = memory.alias_size_in_bytes if layers else 0
        found[name] = Program(layers, memory.temp_size_in_bytes, aliased, said, time.perf_counter() - start)
        number = int(match[1]) if (match := re.match(r"stage (\d+)", name)) else 0
        donated += cut.page_bytes(cut.stages[number]) * num_pages if layers else 0
    return found, donated


def compile_all(setting: Setting, num_pages: int, all_layers: bool) -> dict[str, Any]:
    """The fields of `Compiled`, but `seconds`."""
    tried = depths(setting, all_layers)
    made = [compile_depth(setting, num_pages, depth, depth == tried[0]) for depth in tried]
    first, last = made[0][0], made[-1][0]
    whole = {name: stretched(setting, name, one, last.get(name, one)) for name, one in first.items()}
    return {
        "temporaries": max(program.temporaries for program in whole.values()),
        "donated": sum(donated for _, donated in made), "layers": tried,
        "aliased": sum(program.aliased for found, _ in made for program in found.values()),
        "collectives": {name: program.collectives for name, program in whole.items() if program.collectives},
        "programs": {f"{name}, {depth} layers": program.seconds for depth, (found, _) in zip(tried, made)
                     for name, program in found.items()},
    }  # fmt: skip


def stretched(setting: Setting, name: str, few: Program, more: Program) -> Program:
    """What the program of all layers of its stage would be: collectives by a straight line through two."""
    match = re.match(r"stage (\d+)", name)
    layers = len(setting.stages[int(match[1]) if match else 0].layers)
    if few.layers == more.layers:
        return few
    line = lambda a, b: round(a + (b - a) * (layers - few.layers) / (more.layers - few.layers))
    kinds = {kind: (few.collectives.get(kind, (0, 0)), found) for kind, found in more.collectives.items()}
    grown = {kind: (line(a[0], b[0]), line(a[1], b[1])) for kind, (a, b) in kinds.items()}
    return more._replace(temporaries=max(few.temporaries, more.temporaries), collectives=grown)


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """Of an optimised program: kind -> how many there are, and the bytes of their results on one device."""
    found: dict[str, tuple[int, int]] = {}
    for result, kind, start in re.findall(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(", hlo):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        if start and kind != "all-reduce":  # (operands, results)
            shapes = shapes[len(shapes) // 2 :]
        size = sum(WIDTHS.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)
        count, whole = found.get(kind, (0, 0))
        found[kind] = count + 1, whole + size
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(*pickle.load(sys.stdin.buffer))))
