"""The rules of the house: imports go down, the control plane knows no JAX, files and functions stay small.

A new source file must be put on a floor of `HOUSE`, on purpose. See ARCHITECTURE.md.
"""

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"jaxpaged": "jaxpaged", "pallas_kernels": "pallas_kernels", "jaxpaged_server": "server"}  # name -> folder

# A line is a floor, the highest first: control plane | device plane. A module imports from lower floors only.
HOUSE = """
    cli ray                                                   |
    ray.batch ray.serving                                     |
    ray.front ray.replica ray.stage                           |
    ray.gather ray.parts ray.router                           |
    ray.calls ray.needed ray.routing ray.sizes                |
    cli_clients cli_convert cli_plan cli_serve                |
                                                              | serve_many
    server.run                                                | cluster
    server.app                                                |
    server.messages server.openapi server.operations          |
    server.page server.responses server.tokens                |
    server.answering server.live server.openapi_answers server.openapi_fields |
    server.openai_api                                         |
    server.chat server.messages_output server.responses_output |
    server.exchange server.prompting                          |
    server.completions server.parts server.service            |
    server.embeddings server.middleware server.options        |
    server.output_log server.summary server.tracing           |
    server.logprobs server.messages_input server.metrics      |
    server.params server.parsers server.replies               |
    server.responses_input server.usage                       |
    server.engine_metrics server.errors server.exposition server.parsers.chat |
    server.schemas server.sse                                 |
    server.blocks server.fields server.http_metrics           |
    server.parsers.formats server.request_times               |
    server.metric_names server.parsers.json_calls             |
    server.parsers.pythonic server.parsers.reasoning server.parsers.xml_calls |
    server.instruments server.parsers.output server.parsers.source server.parsers.values |
    bench_serve run_batch nodes                               |
    remote bench_report bench_datasets                        |
    demo env chat flags sampling_flags bench_options server   | bench
    jaxpaged watchdog                                         |
                                                              | plan_report simulate_plot
                                                              | plan simulate
                                                              | plan_advice plan_compile plan_times
                                                              | plan_model
                                                              | llm
    replicas stepping                                         | build_replicas
    async_engine follower                                     | build export
                                                              | convert
                                                              | loading
                                                              | beam cost lora memory on_host orbax_writer quantization runner
                                                              | stage
                                                              | cost_weights weights
                                                              | parallel programs
    leader                                                    |
    engine replay channel                                    | home kv_cache packing placement sampler sharding
    admission outputs wire                                    | models.*
    batch                                                     | models models.standard models.quantized models.adapters
                                                              | models.decoder
    scheduler                                                 | models.mla models.moe
    seating                                                   | models.layers
    publish waiting loras                                     |
                                                              | models.spec axis
                                                              | models.rope devices_compiler
    state tokenizer gguf_blocks scoring journal               | kernels
    pages gguf_tokenizer checkpoint residents                          | kernels.mosaic_gpu kernels.triton
    chat_template config reach gguf_file prompts              |
    orbax_checkpoint router simulate_traces                   | kernels.reference kernels.mosaic_gpu.attention
                                                              | kernels.triton.attention
                                                              | kernels.triton.decode kernels.triton.prefill
                                                              | kernels.triton.cache kernels.triton.matmul
    detokenizer devices folder gguf_config hf_config hub      | kernels.triton.tile kernels.triton.sampling
    request                                                   |
    adapter versioned                                         | kernels.mosaic_gpu.decode kernels.mosaic_gpu.prefill
                                                              | kernels.mosaic_gpu.prefill_kernel
                                                              | kernels.mosaic_gpu.tuning kernels.mosaic_gpu.interpret
                                                              | kernels.triton.blocks
                                                              | kernels.reference.attention kernels.reference.cache
                                                              | kernels.reference.matmul kernels.reference.sampling
                                                              | kernels.ops
                                                              | kernels.checks
"""
# These are how users come in. They start the device plane, but only from inside a function (or for type checkers).
DOORS = {"jaxpaged", "jaxpaged.cli", "jaxpaged.cli_clients", "jaxpaged.cli_convert", "jaxpaged.cli_plan", "jaxpaged.cli_serve",
         "jaxpaged.env", "jaxpaged.ray.replica", "jaxpaged.ray.stage"}  # fmt: skip
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers"}  # packages the control plane never imports


class Import(NamedTuple):
    module: str
    lazy: bool  # inside a function, or for type checkers


def full_name(name: str) -> str:
    short = {"kernels": "pallas_kernels", "server": "jaxpaged_server"}
    first, dot, rest = name.partition(".")
    name = short.get(first, first) + dot + rest
    return name if name.split(".")[0] in PACKAGES else f"jaxpaged.{name}"


def read_house(house: str) -> tuple[dict[str, int], set[str]]:
    """(module -> floor, modules of the control plane)."""
    lines = [line.split("|") for line in house.strip().splitlines()]
    floors, control = {}, set()
    for floor, sides in enumerate(reversed(lines)):
        for side, names in zip(("control", "device"), sides):
            for name in map(full_name, names.split()):
                assert name not in floors, f"{name} is on two floors"
                floors[name] = floor
                control |= {name} if side == "control" else set()
    return floors, control


def find_sources() -> dict[str, Path]:
    """Module -> file, of everything that is installed."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def fill_folders(floors: dict[str, int], modules: Iterable[str]) -> dict[str, int]:
    """`folder.*` stands for the modules of a folder that are on no other floor: adding a model family is adding a file."""
    folders = {name.removesuffix("*"): floor for name, floor in floors.items() if name.endswith(".*")}
    others = {m: floor for m in modules for folder, floor in folders.items() if m.startswith(folder) and m not in floors}
    return {name: floor for name, floor in floors.items() if not name.endswith(".*")} | others


FLOORS, CONTROL = read_house(HOUSE)
SOURCES = find_sources()
FLOORS = fill_folders(FLOORS, SOURCES)


def imports(source: str, modules: set[str]) -> list[Import]:
    """Every import of a source text. `from a import b` is of the module a.b if there is one, else of a."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(Import(name if name in modules else node.module, lazy) for name in whole)
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_type_checkers(node)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def package(module: str) -> str:
    return module.split(".")[0]


def not_below(module: str, source: str) -> list[str]:
    """Modules of the house that a module imports and that are not on a lower floor."""
    ours = {i.module for i in imports(source, set(FLOORS)) if package(i.module) in PACKAGES}
    return sorted(name for name in ours if FLOORS.get(name, 99) >= FLOORS[module])


def not_for_control(module: str, source: str) -> list[str]:
    """What a module of the control plane imports and must not."""
    device = lambda name: package(name) in HEAVY or (package(name) in PACKAGES and name not in CONTROL)
    allowed = lambda i: i.lazy and module in DOORS
    return sorted(i.module for i in imports(source, set(FLOORS)) if device(i.module) and not allowed(i))


each_module = pytest.mark.parametrize("module", SOURCES)


# -- floors and planes -----------------------------------------------------------------------------------------------------


def test_every_module_is_on_a_floor():
    homeless = sorted(set(SOURCES) - set(FLOORS))
    assert not homeless, f"put {homeless} on a floor of HOUSE in {Path(__file__).name} and of ARCHITECTURE.md"
    gone = sorted(set(FLOORS) - set(SOURCES))
    assert not gone, f"take {gone} off the floors: there is no such file"


@each_module
def test_imports_go_down(module):
    assert not (wrong := not_below(module, SOURCES[module].read_text())), f"{module} must not import {wrong}"


@pytest.mark.parametrize("module", [m for m in SOURCES if m in CONTROL])
def test_the_control_plane_imports_nothing_of_the_device_plane(module):
    wrong = not_for_control(module, SOURCES[module].read_text())
    assert not wrong, f"{module} is on the control plane and must not import {wrong}"


@each_module
def test_kernels_know_nothing_of_the_engine_and_the_server_only_its_control_plane(module):
    for name, _ in imports(SOURCES[module].read_text(), set(FLOORS)):
        if package(module) == "pallas_kernels":
            assert package(name) not in ("jaxpaged", "jaxpaged_server"), f"{module} imports {name}"
        if package(module) == "jaxpaged_server":
            assert package(name) != "pallas_kernels", f"{module} imports {name}"
            assert package(name) != "jaxpaged" or name in CONTROL, f"{module} imports {name}"


def test_torch_is_for_tests_and_benchmarks_only():
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in ("tests", "benchmarks", "build")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) >= len(SOURCES)
    for path in files:
        names = {package(i.module) for i in imports(path.read_text(), set(FLOORS))}
        assert "torch" not in names, f"{path.relative_to(ROOT)} imports torch"


LAYERS = """
import a_package, jax
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from jaxpaged.engine import Engine
class A:
    def f(self):
        from jaxpaged import llm, __version__
"""


def test_the_reader_sees_every_import():
    assert imports(LAYERS, set(FLOORS)) == [
        ("a_package", False), ("jax", False), ("typing", False), ("jaxpaged.engine", True), ("jaxpaged.llm", True),
        ("jaxpaged", True),
    ]  # fmt: skip


def test_the_rules_catch_what_they_are_for():
    assert not_below("jaxpaged.engine", LAYERS) == ["jaxpaged", "jaxpaged.engine", "jaxpaged.llm"]
    assert not_below("jaxpaged.cli", LAYERS) == []
    assert not_below("jaxpaged.pages", "import jaxpaged.nobody_knows_me") == ["jaxpaged.nobody_knows_me"]
    assert not_for_control("jaxpaged.engine", LAYERS) == ["jax", "jaxpaged.llm"]
    assert not_for_control("jaxpaged.cli", LAYERS) == ["jax"]
    assert not_for_control("jaxpaged.pages", "from pallas_kernels import ops") == ["pallas_kernels.ops"]
    with pytest.raises(AssertionError, match="on two floors"):
        read_house("a |\n b | a")


# -- what an import costs --------------------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


IMPORT_ALL = """
import importlib, sys
heavy, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
    loaded = sorted(set(heavy.split()) & set(sys.modules))
    assert not loaded, f"importing {module} imports {loaded}"
"""


def test_importing_the_control_plane_does_not_import_jax():
    python(IMPORT_ALL, " ".join(HEAVY), *(m for m in SOURCES if m in CONTROL and package(m) != "jaxpaged_server"))


def test_importing_jaxpaged_is_quick():
    code = "import time; t = time.perf_counter(); import jaxpaged; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


# -- sizes -----------------------------------------------------------------------------------------------------------------


def functions() -> dict[str, int]:
    """`module.function` -> its lines."""
    return {
        f"{module}.{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for module, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }


def test_files_have_at_most_450_lines():
    lines = {module: path.read_text().count("\n") for module, path in SOURCES.items()}
    assert not (long := {module: n for module, n in lines.items() if n > 450}), f"split these by idea: {long}"


def test_functions_are_small():
    sizes = functions()
    assert statistics.median(sizes.values()) <= 10
    long = {name: n for name, n in sizes.items() if n > 60 and package(name) != "pallas_kernels"}
    assert not long, f"functions of more than 60 lines: {long}"
