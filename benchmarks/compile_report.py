"""What the compilers make of every kernel, for GPUs that need not be here: registers, spills, shared memory, instructions.

    python -m benchmarks.compile_report [--only PATTERN] [--json FILE] [--markdown FILE]

Needs `make compile-target`. Nothing is run and nothing timed.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import target

PROCESSES = 2
QUANTIZED = {"fp8": "float8_e4m3fn", "int8": "int8"}


class Case(NamedTuple):
    """A call to compile. Names are `operation, what` in words; make: () -> (function of an Ops, specs, donated ones)."""

    name: str
    backend: str
    target: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]
    wgmma: tuple[str, ...] = ()  # kernels that must multiply with Hopper's instruction

    @property
    def id(self) -> str:
        return f"{self.name} | {self.backend} | {self.target}"


# -- cases -----------------------------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    return [*attention_cases(), *write_cases(), *helper_cases(), *step_cases()]


def attention_cases() -> Iterator[Case]:
    """Each model's heads with decodes and a chunk in one batch, which is every kernel of a backend."""
    from benchmarks.kernel_cases import SHAPES

    for shape in SHAPES:
        model, _, load = shape.name.partition(", ")
        if load != "32 decodes and a chunk":
            continue
        pages = (16, 32, 64) if model == "Llama-3-8B" else (shape.page_size,)
        for page_size in pages:
            name = f"attention, {model}, pages of {page_size}"
            sized = shape._replace(page_size=page_size)
            yield Case(name, "mosaic_gpu", "h200", partial(_attention, sized, None), ("paged_decode", "paged_prefill"))
            for kv in (None, *QUANTIZED) if page_size == 32 else (None,):
                for gpu in target.ARCHITECTURES:
                    if (kv, gpu) != ("fp8", "a100"):  # Ampere has no float8
                        full = name if kv is None else f"{name}, {kv} cache"
                        yield Case(
                            full, "triton", gpu, partial(_attention, sized, kv), ("paged_prefill",) if gpu == "h200" else ()
                        )


def _attention(shape: Any, kv: str | None) -> tuple[Any, ...]:
    from benchmarks.kernel_cases import attention_options, attention_specs

    specs, named = attention_specs(shape, QUANTIZED.get(kv or ""))

    def call(ops: Any) -> Callable[..., Any]:
        return lambda specs, named: ops.paged_attention(*specs, **named, **attention_options(shape))

    return call, (specs, named), ()


def write_cases() -> Iterator[Case]:
    for kv in ("bf16", *QUANTIZED):
        for gpu in target.ARCHITECTURES:
            if (kv, gpu) != ("fp8", "a100"):
                yield Case(f"write_kv, {kv} cache", "triton", gpu, partial(_write, kv))


def _write(kv: str) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    S, T, P, K, G, D = jax.ShapeDtypeStruct, 2048, 1000, 32, 8, 128
    pages, new, places = (
        S((P, K, G, D), jnp.dtype(QUANTIZED.get(kv, "bfloat16"))),
        S((T, G, D), jnp.bfloat16),
        S((T,), jnp.int32),
    )
    scales = {} if kv == "bf16" else dict.fromkeys(("k_scales", "v_scales"), S((P, K, G), jnp.float32))

    def call(ops: Any) -> Callable[..., Any]:
        return lambda k_pages, v_pages, scales, *rest: ops.write_kv(k_pages, v_pages, *rest, **scales)

    return call, (pages, pages, scales, new, new, places, places), (0, 1, 2)


LORA = (("A, rank 3 x 16", 4096, 48), ("B, rank 3 x 16", 48, 6144), ("A, rank 8", 4096, 8), ("B, rank 8", 8, 4096))


def helper_cases() -> Iterator[Case]:
    """Sampling, experts, adapters, quantised weights."""
    from benchmarks.kernel_cases import EXPERTS, SAMPLES, WEIGHTS

    for gpu in target.ARCHITECTURES:
        hopper = gpu == "h200"
        for R, V in SAMPLES:
            yield Case(f"sample, {R} rows of {V}", "triton", gpu, partial(_sample, R, V))
        for name, T, E, F, X in EXPERTS:
            wgmma = ("grouped_matmul",) if hopper and T >= 16384 else ()
            yield Case(f"grouped_matmul, {name}, {T} rows", "triton", gpu, partial(_grouped, T, E, F, X), wgmma)
        for name, E, F in LORA:
            yield Case(f"grouped_matmul, LoRA's {name}", "triton", gpu, partial(_grouped, 256, E, F, 4), ())
        for w in WEIGHTS:
            wgmma = ("quantized_matmul",) if hopper and w.T >= 64 else ()
            name = f"quantized_matmul, int{w.bits}, {w.F} outputs, {w.T} rows"
            yield Case(name, "triton", gpu, partial(_quantized, *w), wgmma)


def _sample(R: int, V: int) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    S, f32 = jax.ShapeDtypeStruct, jnp.float32
    specs = S((R, V), f32), S((R,), f32), S((R,), jnp.int32), S((R,), f32), S((R,), f32), S((R, 2), jnp.uint32)
    return lambda ops: ops.sample, specs, ()


def _grouped(T: int, E: int, F: int, X: int) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    S, bf16 = jax.ShapeDtypeStruct, jnp.bfloat16
    return lambda ops: ops.grouped_matmul, (S((T, E), bf16), S((X, F, E), bf16), S((X,), jnp.int32)), ()


def _quantized(bits: int, T: int, E: int, F: int, size: int) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    S = jax.ShapeDtypeStruct
    w = S((F, E), jnp.int8) if bits == 8 else S((F, E // 2), jnp.uint8)
    scales = S((F, E // size), jnp.bfloat16)
    return lambda ops: lambda *arguments: ops.quantized_matmul(*arguments, None), (S((T, E), jnp.bfloat16), w, scales), ()


def step_cases() -> Iterator[Case]:
    """The decoder of Llama-3-8B over a full batch, with a cache of 84 GB."""
    for backend in ("triton", "mosaic_gpu"):
        yield Case("step, Llama-3-8B, 2048 tokens of 256 rows", backend, "h200", partial(_step, 2048, 256))


LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def _step(T: int, R: int) -> tuple[Any, ...]:
    import jax
    import jax.numpy as jnp

    from jaxpaged import kv_cache, packing, programs
    from jaxpaged.batch import Bucket
    from jaxpaged.hf_config import HFConfig
    from jaxpaged.models import door
    from jaxpaged.stage import abstract_decoder

    config = door("llama").decoder_config(HFConfig(LLAMA_3_8B))
    graph, treedef, abstract = abstract_decoder(config, jnp.bfloat16)
    dims = programs.Dims(num_slots=256, columns=(256,), num_pages=20000, page_size=32, max_model_len=8192, vocab_size=128256,
                         max_logprobs=20)  # fmt: skip
    kv = kv_cache.layout(config, dims.max_model_len, dims.page_size)
    caches = tuple(kv_cache.specs(config, kv, dims.num_pages, dims.page_size, jnp.bfloat16))
    bucket, layers, held = Bucket(T, R), range(len(config.layers)), (True,) * len(abstract)
    packed = jax.ShapeDtypeStruct((packing.size(programs.forward_layout(bucket, dims)),), jnp.int32)
    last_token = jax.ShapeDtypeStruct((dims.num_slots,), jnp.int32)
    model = lambda ops: programs.Model(graph, treedef, config, kv, ops, layers, held)
    call = lambda ops: programs.make_forward(model(ops), bucket, dims)
    return call, (tuple(abstract.values()), caches, last_token, packed), (1,)


# -- compiling -------------------------------------------------------------------------------------------------------------


def compile_case(case: Case) -> dict[str, Any]:
    """In a process of `target.environment()`."""
    import pallas_kernels

    call, specs, donate = case.make()
    ops = pallas_kernels.backend(case.backend, target.devices(case.target)[0])
    report = target.compile_for(case.target, call(ops), *specs, donate=donate)
    donated = sum(_bytes(specs[i]) for i in donate)
    return {"kernels": [k._asdict() for k in {k.name: k for k in report.kernels}.values()], "temporaries": report.temporaries,
            "aliased": report.aliased, "donated": donated}  # fmt: skip


def _bytes(tree: Any) -> int:
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_all(chosen: Sequence[Case], progress: Callable[[str], None] = lambda line: None) -> dict[str, dict[str, Any]]:
    """Case's id -> what `compile_case` says, or {"error": ...}. In child processes: XLA's flags are read at its start, and a
    compiler that aborts must not take the others' results along."""
    results: dict[str, dict[str, Any]] = {}

    def run(share: Sequence[Case]) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as names:
            names.write("\n".join(case.id for case in share))
            names.flush()
            command = [sys.executable, "-m", "benchmarks.compile_report", "--child", names.name]
            pipe, root = subprocess.PIPE, Path(__file__).parents[1]
            with (
                subprocess.Popen(command, env=target.environment(), stdout=pipe, stderr=pipe, text=True, cwd=root) as child,
                ThreadPoolExecutor(1) as reader,
            ):
                assert child.stdout and child.stderr
                errors = reader.submit(child.stderr.read)
                for line in child.stdout:
                    if line.startswith("{"):
                        found = json.loads(line)
                        results[found.pop("id")] = found
                        progress(line)
                last = errors.result()[-2000:]
            for case in share:
                results.setdefault(case.id, {"error": f"the compiler ended with {child.returncode}: {last}"})

    # Every other one: neighbours take about as long as each other.
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(run, [chosen[i::PROCESSES] for i in range(PROCESSES) if chosen[i::PROCESSES]]))
    return results


def child(names: Path) -> None:
    wanted = set(names.read_text().splitlines())
    for case in cases():
        if case.id in wanted:
            try:
                found = compile_case(case)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            print(json.dumps({"id": case.id, **found}), flush=True)


# -- the table -------------------------------------------------------------------------------------------------------------

COLUMNS = ("registers", "spills", "shared", "wgmma", "mma", "tma", "cp_async", "instructions")


def table(results: dict[str, dict[str, Any]], header: bool = True) -> Iterator[str]:
    """Markdown lines: a kernel of a case each. Spills and shared memory in bytes; then PTX instructions."""
    if header:
        yield "| case | backend | GPU | kernel | " + " | ".join(COLUMNS) + " |"
        yield "|---" * (len(COLUMNS) + 4) + "|"
    for case, found in results.items():  # an id has the first three columns
        if "error" in found:
            yield f"| {case} | {found['error'].splitlines()[0][:120]} |"
        for kernel in found.get("kernels", ()):
            yield f"| {case} | {kernel['name']} | " + " | ".join(str(kernel[c]) for c in COLUMNS) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of case names, as of files: '*70B*triton*'")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    if reason := target.missing():
        sys.exit(f"nothing can be compiled for GPUs here: {reason}")
    chosen = [case for case in cases() if fnmatch.fnmatch(case.id, options.only)]
    show = lambda line: print(*table({(found := json.loads(line)).pop("id"): found}, header=False), sep="\n", flush=True)
    results = compile_all(chosen, show)
    ordered = {case.id: results[case.id] for case in chosen}
    if options.json:
        options.json.write_text(json.dumps(ordered, indent=1))
    if options.markdown:
        options.markdown.write_text("\n".join(table(ordered)) + "\n")
    sys.exit(any("error" in found for found in results.values()))


if __name__ == "__main__":
    main()
