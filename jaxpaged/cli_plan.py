"""`jaxpaged plan`: will a model fit on devices, and how fast should it be? Without a GPU and without weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jaxpaged.config import EngineConfig
from jaxpaged.devices import DEVICES, device
from jaxpaged.flags import HELP, engine_flags
from jaxpaged.request import RequestError

PLAN, SIMULATION = "Plan", "Simulation"
POISSON, OWN = "poisson", "trace"


def _option(text: str, panel: str = PLAN, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


ModelFlag = Annotated[str | None, typer.Option("--model", "-m", help=HELP["model"][1], rich_help_panel=HELP["model"][0])]
DeviceName = Annotated[str, _option(f"{', '.join(DEVICES)}, or a .toml or .json file of one's own.", PLAN, "--device")]
Batches = Annotated[str, _option("Prompts that come together, for the table of speeds; max: as many as fit.")]
Prompts = Annotated[str, _option("Tokens of these prompts.")]
Compiles = Annotated[bool, _option("Compile the step, where the compilers are.", PLAN, "--compile/--no-compile")]
AllLayers = Annotated[bool, _option("Compile it with all layers, not with some and a straight line.", PLAN, "--all-layers")]
OutputJson = Annotated[Path | None, _option("Write everything to this file as JSON.", PLAN, "--json", "--output-json")]
Trace = Annotated[str | None, _option('Requests: a JSONL or CSV file, or "synthetic:prompt=512,output=128,n=500".', SIMULATION)]
Rates = Annotated[str | None, _option("Requests a second, such as 1,2,4. (default: around what should go)", SIMULATION)]
Arrivals = Annotated[str, _option(f"{POISSON}, or {OWN}: the trace's own times, stretched.", SIMULATION)]
Most = Annotated[int | None, _option("No more of the trace's requests than so many.", SIMULATION)]
Plot = Annotated[Path, _option("Where to draw TTFT, ITL and throughput against the rate.", SIMULATION)]


@engine_flags
def plan(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help='Like --model. (default: "demo")')] = None,
    model_flag: ModelFlag = None,
    device_name: DeviceName = "h200",
    batch_sizes: Batches = "1,8,32,128,max",
    prompt_lens: Prompts = "128,1024,8192",
    compiles: Compiles = True,
    all_layers: AllLayers = False,
    output_json: OutputJson = None,
    simulate: Trace = None,
    rates: Rates = None,
    arrivals: Arrivals = POISSON,
    num_requests: Most = None,
    plot: Plot = Path("simulation.png"),
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    **engine: Any,
) -> None:
    """Say what a model takes of a GPU's memory and how fast it should be, from its config alone: no GPU, no weights."""
    if model is not None and model_flag is not None:
        raise RequestError(f"give the model once, got {model!r} and --model {model_flag!r}.", "model")
    chosen, prompts = device(device_name), _integers("prompt_lens", prompt_lens)
    batches = [None if part.strip() == "max" else _integers("batch_sizes", part)[0] for part in batch_sizes.split(",")]
    asked_rates = None if rates is None else _rates(rates)
    if arrivals not in (POISSON, OWN):
        raise RequestError(f"arrivals must be {POISSON} or {OWN}, got {arrivals!r}.", "arrivals")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on a device here
    say = _say if not quiet else lambda line: None
    config = EngineConfig(**{**engine, "model": model or model_flag or engine.get("model", "demo")})
    if output_json is not None:
        _check_writable("output_json", output_json)
    load = None if simulate is None else _load(simulate, num_requests, asked_rates, arrivals == OWN, plot)
    found = _made(config, chosen, (batches, prompts, compiles, all_layers), say)
    results: list[Any] = []
    try:
        if load is not None and found.memory is not None:
            results = _simulated(found, load, say)
    finally:  # the plan at least
        if output_json is not None:
            _write(found, {"simulation": [one._asdict() for one in results], "trace": simulate} if results else {}, output_json)
    if load is not None and results:
        _draw(found, load, results)
    if found.memory is None:
        raise typer.Exit(1)


class _Load(NamedTuple):
    """What is asked of a simulation. recorded: requests a second of the trace itself. own: they come at its times."""

    trace: str
    requests: list[Any]
    recorded: float | None
    rates: list[float] | None
    own: bool
    plot: Path


def _load(trace: str, most: int | None, rates: list[float] | None, own: bool, plot: Path) -> _Load:
    """RequestError for all that would go wrong only when the long part is done."""
    from jaxpaged import simulate_plot, simulate_traces

    requests = simulate_traces.read(trace, most)
    recorded = simulate_traces.own_rate(requests)
    if own and recorded is None:
        raise RequestError(f"{trace} has no times; leave out --arrivals {OWN}.", "arrivals")
    simulate_plot.load_matplotlib()
    simulate_plot.check_format(plot)
    _check_writable("plot", plot)
    return _Load(trace, requests, recorded, rates, own, plot)


def _check_writable(name: str, path: Path) -> None:
    """RequestError if that file could not be written. Folders that are not there yet will be made."""
    path = path.absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if nearest.is_dir() == (nearest == path):
        why = f"{nearest} is {'a' if nearest.is_dir() else 'no'} folder"
    elif not os.access(nearest, os.W_OK):
        why = f"{nearest} is read-only"
    else:
        return
    raise RequestError(f"{name}: {path} cannot be written ({why}); give another file.", name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _made(config: EngineConfig, chosen: Any, wanted: tuple[Any, ...], say: Callable[[str], None]) -> Any:
    """The plan, printed. wanted: the last arguments of `plan.make`."""
    from jaxpaged import devices_compiler, plan_model, plan_report
    from jaxpaged import plan as plans

    if wanted[2] and devices_compiler.missing() is None:
        say(f"compiling for {chosen.name} ...")
    found = plans.make(plan_model.read_source(config), config, chosen, *wanted)
    print(plan_report.text(found))
    return found


def _simulated(found: Any, load: _Load, say: Callable[[str], None]) -> list[Any]:
    """At each rate, printed."""
    from jaxpaged import simulate

    s = found.setting
    rates = load.rates or simulate.rates_to_try(s, found.memory, load.requests)
    print(f"\nsimulated with {len(load.requests):,} requests of {load.trace}" +
          (f", which came at {load.recorded:.2f} a second" if load.recorded else "") + ":")  # fmt: skip
    results = simulate.sweep(s, found.memory, load.requests, rates, load.own, s.config.seed,
                             lambda line: print(f"  {line}", flush=True))  # fmt: skip
    if refused := results[0].refused:
        say(f"{refused} requests are longer than max_model_len={s.config.max_model_len} and were left out.")
    return results


def _draw(found: Any, load: _Load, results: list[Any]) -> None:
    from jaxpaged import simulate_plot

    s = found.setting
    title = f"{s.config.model} on {s.sizes.devices} x {s.device.name}, {load.trace}: predicted, not measured"
    simulate_plot.plot(results, title, load.plot)
    print(f"drawn: {load.plot}")


def _write(found: Any, more: dict[str, Any], path: Path) -> None:
    from jaxpaged import plan as plans

    text = json.dumps({**plans.as_json(found), **more}, indent=1, default=str) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _integers(name: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise RequestError(f"{name} must be positive integers with commas between them, got {text!r}.", name)
    return [int(part) for part in parts]


def _rates(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(1e-9 <= rate <= 1e9 for rate in found):  # beyond these no time is a number any more
        raise RequestError(f"rates must be numbers above 0 (1e-9 to 1e9) with commas between them, got {text!r}.", "rates")
    return found
