"""Loading weights: safetensors against the Orbax checkpoint that `jaxpaged convert` makes of it: seconds and host memory.

    python -m benchmarks.loading --shape 1b --folder /tmp/loading --json results/loading.json

A dummy of random bfloat16 in a real model's shape is written to --folder (and removed at the end), converted, and loaded by
each way in a process of its own: cold (the page cache is told to forget the files first) and warm (read once before).
Columns:

seconds    from opening the checkpoint to the last array being on the device
in flight  most bytes of host memory at any time, beyond the process before loading and the arrays that are placed already:
           the leaf that is being read (on CPU its memory becomes the array; on a GPU it is freed), copies of it, buffers.
           Of anonymous memory (RssAnon, sampled every few ms): pages of mapped files are the page cache's.
in leaves  the same as a multiple of the largest leaf's bytes
peak       most anonymous memory of the whole process: on CPU the arrays are in it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks import common

SHAPES = {  # hidden, ffn, layers, heads, KV heads, vocabulary
    "tiny": (256, 1024, 4, 4, 2, 4096),
    "1b": (2048, 8192, 16, 32, 8, 128256),  # Llama 3.2 1B
    "3b": (3072, 8192, 28, 24, 8, 128256),  # Llama 3.2 3B
    "8b": (4096, 14336, 32, 32, 8, 128256),  # Llama 3.1 8B
}
SHARD_BYTES = 5_000_000_000
WAYS = ("safetensors", "orbax", "orbax restore")  # the last: Orbax's own, of the whole tree


def config_of(shape: str) -> dict:
    hidden, ffn, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip


def tensors_of(shape: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    hidden, ffn, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    kv = hidden // heads * kv_heads
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{i}.{name}.weight": size for name, size in sizes.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_model(folder: Path, shape: str) -> int:
    """A dummy as Hugging Face has it: config.json, safetensors in shards. Its bytes."""
    from jaxpaged.export import write_safetensors

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    shards: list[dict] = [{}]
    size, total = 0, 0
    for name, dims in tensors_of(shape).items():
        nbytes = 2 * int(np.prod(dims))
        if size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = (np.dtype(ml_dtypes.bfloat16), dims)
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for k, specs in enumerate(shards):
        file = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        with open(folder / file, "wb") as out:
            write_safetensors(out, specs, lambda name, specs=specs: _random(name, specs[name][1]))
        weight_map |= dict.fromkeys(specs, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def _random(name: str, dims: tuple[int, ...]) -> np.ndarray:
    """Bits of a bfloat16 about as large as weights are: it is only how many there are that counts."""
    bits = np.random.default_rng(abs(hash(name)) % 2**32).integers(0, 2**16, dims, np.uint16)
    return (bits & 0x80FF | 0x3C00).view(ml_dtypes.bfloat16)


class Watch:
    """Samples this process' anonymous memory."""

    def __init__(self) -> None:
        self.placed, self.in_flight, self.peak = 0, 0, 0
        self._before, self._stop = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def look(self) -> None:
        now = anonymous()
        self.peak = max(self.peak, now)
        self.in_flight = max(self.in_flight, now - self._before - self.placed)

    def finish(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.003):
            self.look()


def anonymous() -> int:
    """Bytes of anonymous memory this process has in RAM."""
    with open("/proc/self/status", "rb") as file:
        line = next(line for line in file if line.startswith(b"RssAnon"))
    return int(line.split()[1]) * 1024


def measure(way: str, model: Path, converted: Path) -> dict[str, float]:
    """In this process: one load."""
    import jax

    jax.block_until_ready(jax.device_put(np.ones(8), jax.devices()[0]))
    load = (lambda watch: _restore(converted)) if way == "orbax restore" else (
        lambda watch: _load(converted if way == "orbax" else model, watch))  # fmt: skip
    import orbax.checkpoint  # noqa: F401 - so that no way pays for the import
    import tensorstore  # noqa: F401

    import jaxpaged.loading  # noqa: F401

    watch, start = Watch(), time.perf_counter()
    arrays = load(watch)
    seconds = time.perf_counter() - start
    watch.finish()
    total, largest = sum(x.nbytes for x in arrays.values()), max(x.nbytes for x in arrays.values())
    in_flight = watch.in_flight if way != "orbax restore" else watch.peak - watch._before - total + largest
    return {"seconds": seconds, "GB/s": total / seconds / 1e9, "in_flight_bytes": in_flight, "in_leaves": in_flight / largest,
            "peak_bytes": watch.peak, "array_bytes": total, "largest_leaf_bytes": largest}  # fmt: skip


def _load(folder: Path, watch: Watch) -> dict:
    """As the engine loads."""
    import jax

    from jaxpaged import loading, weights
    from jaxpaged.checkpoint import open_checkpoint
    from jaxpaged.config import EngineConfig
    from jaxpaged.hf_config import HFConfig
    from jaxpaged.models import door

    checkpoint, device = open_checkpoint(folder), jax.devices()[0]
    family = door("llama")
    config = EngineConfig(dtype="bfloat16")
    p = loading.prepare(config, family, family.decoder_config(HFConfig(checkpoint.config)), None, checkpoint)

    def put(array: np.ndarray) -> jax.Array:
        placed = jax.block_until_ready(jax.device_put(array, device))
        watch.look()
        watch.placed += array.nbytes
        return placed

    return weights.load(p.checkpoint, p.leaves, p.names, put, progress=False, ignore=p.ignored)


def _restore(folder: Path) -> dict:
    import jax
    import orbax.checkpoint as ocp

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder / "params").item_metadata.tree
        wanted = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding), tree)
        arrays = checkpointer.restore(folder / "params", restore_args=wanted)
    return dict(enumerate(jax.tree.leaves(jax.block_until_ready(arrays))))


def forget(folder: Path) -> None:
    """Tells the page cache to forget a folder's files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Reads a folder's files, so that the page cache has them (if it has room)."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def child(task: str, model: Path, converted: Path) -> dict[str, float]:
    code = "import sys; from pathlib import Path; from benchmarks import loading; import json; " \
           "print(json.dumps(getattr(loading, sys.argv[1])(*sys.argv[2:3], *map(Path, sys.argv[3:]))))"  # fmt: skip
    arguments = ["convert", "-"] if task == "convert" else ["measure", task]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, str(model), str(converted)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def convert(_: str, model: Path, converted: Path) -> dict[str, float]:
    from jaxpaged.convert import convert as write

    watch, start = Watch(), time.perf_counter()
    write(model, converted, progress=False)
    seconds = time.perf_counter() - start
    watch.finish()
    return {"seconds": seconds, "in_flight_bytes": watch.in_flight, "peak_bytes": watch.peak}


def available() -> int:
    """Bytes of memory that processes may still take."""
    with open("/proc/meminfo", "rb") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"MemAvailable"))


def run(shape: str, folder: Path, ways: list[str]) -> dict:
    model, converted = folder / "model", folder / "converted"
    total = write_model(model, shape)
    print(f"{shape}: {total / 1e9:.2f} GB of bfloat16", flush=True)
    results: dict = {"shape": shape, "bytes": total, "convert": child("convert", model, converted)}
    made = results["convert"]
    print(f"convert: {made['seconds']:.1f} s, in flight {made['in_flight_bytes'] / 1e6:,.0f} MB", flush=True)
    print(f"{'':<16}{'':<6}{'seconds':>9}{'GB/s':>7}{'in flight MB':>14}{'in leaves':>11}{'peak MB':>10}")
    for way in ways:
        if way == "orbax restore" and 2.3 * total > available():
            print(f"{way:<16} not run: it may take {2.3 * total / 1e9:.0f} GB of memory, {available() / 1e9:.0f} are available")
            continue
        for state, prepare in (("cold", forget), ("warm", remember)):
            prepare(model if way == "safetensors" else converted)
            found = results[f"{way}, {state}"] = child(way, model, converted)
            print(f"{way:<16}{state:<6}{found['seconds']:>9.2f}{found['GB/s']:>7.2f}{found['in_flight_bytes'] / 1e6:>14,.0f}"
                  f"{found['in_leaves']:>11.2f}{found['peak_bytes'] / 1e6:>10,.0f}", flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", choices=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where the files are written: twice the model's bytes (default: a new one)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="loading-", dir=args.folder))
    try:
        common.write_json(args.json, {"results": run(args.shape, folder, args.ways)})
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
