"""`run_batch`: prompts of files or of a dataset through the stage, into a folder; what is there already is not done again.

The process that calls it writes the results, one part at a time, so that nobody needs a shared file system and a task that Ray
runs twice writes once. What was computed and not yet written when everything is killed is computed again.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpaged.config import EngineConfig
from jaxpaged.ray.needed import need
from jaxpaged.ray.parts import Parts, check_job, owned
from jaxpaged.ray.stage import Params, check_columns, generate_stage, sampling
from jaxpaged.request import RequestError

ROW = "row_number"  # the id of rows that bring none
READERS = {".jsonl": "read_json", ".json": "read_json", ".parquet": "read_parquet", ".csv": "read_csv", ".txt": "read_text"}
MEANING = ("model", "tokenizer", "revision", "dtype", "quantization", "kv_cache_dtype", "hf_overrides", "chat_template",
           "generation_config", "max_model_len", "load_format", "seed")  # fmt: skip  # of a config: what results depend on


@dataclass(frozen=True)
class Report:
    """rows: of the source. before: that the folder had when the call began. failed: that have an error, of this call's."""

    rows: int
    before: int
    failed: int


def run_batch(source: Any, output_dir: str | Path, config: EngineConfig | Mapping[str, Any], params: Params = None, *,
              prompt: str = "prompt", id: str | None = None, chat: bool = False, retry_errors: bool = False,
              batch_size: int = 256, **pool: Any) -> Report:  # fmt: skip
    """Generates for every row of `source` that output_dir has no result of; call it again to go on.

    source: a .jsonl, .parquet, .csv or .txt file (a prompt a line), a list of such, or a dataset of Ray Data.
    id: a column that tells rows apart, and stays the same from call to call; None: rows are numbered in order, which must be
      the same in each call. prompt, chat, batch_size and pool (concurrency, num_cpus, num_gpus): as for `generate_stage`.
    retry_errors: rows that have an error are done again.
    Each part has at most batch_size rows: input columns, id, and the stage's. A source without rows is done at once.
    RequestError if the folder belongs to another job or process, if ids repeat, if a column is missing, or if one is there
    that would be added.
    """
    engine = config if isinstance(config, EngineConfig) else EngineConfig(**config)
    stage = generate_stage(engine, params, prompt=prompt, chat=chat, batch_size=batch_size, **pool)
    folder, rows = _folder(output_dir), open_source(source)
    with owned(folder):
        rows, ids = numbered(rows) if id is None else (rows, read_ids(rows, id))
        if ids:  # Ray knows no columns where there are no rows
            check_columns(rows.columns(), prompt)
        check_job(folder, _job(engine, params, prompt, id, chat, len(ids)))
        parts = Parts(folder, id or ROW)
        parts.read(retry_errors)
        before = len(parts.done & ids)
        failed = _generate(stage, rows, parts, batch_size) if before < len(ids) else 0
        if not ids <= parts.done:
            raise RuntimeError(f"{len(ids - parts.done)} of {len(ids)} rows have no result; run it again to go on.")
        return Report(len(ids), before, failed)


def _generate(stage: Any, rows: Any, parts: Parts, batch_size: int) -> int:
    """Runs what is not done and writes it as it comes. How many have an error."""
    left = without(rows, parts.id, parts.done).repartition(target_num_rows_per_block=batch_size)
    outputs = stage(left.materialize())  # first this: engines may take all the CPUs, and tasks before them would wait forever
    outputs.context.execution_options.preserve_order = False  # what is there is written at once
    failed = 0
    for table in outputs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        failed += sum(1 for error in table["error"].to_pylist() if error)
        parts.write(table)
    return failed


def open_source(source: Any) -> Any:
    """A dataset, in an order that does not change. RequestError for what cannot be read."""
    data = need("ray.data")
    if isinstance(source, data.Dataset):
        dataset = source
    else:
        paths = [_absolute(str(one)) for one in ([source] if isinstance(source, (str, Path)) else source)]
        dataset = getattr(data, _reader(paths))(paths)
        dataset = dataset.rename_columns({"text": "prompt"}) if Path(paths[0]).suffix == ".txt" else dataset
    dataset.context.execution_options.preserve_order = True
    return dataset


def _absolute(path: str) -> str:
    """Workers, which open it, are in another folder."""
    return path if "://" in path else str(Path(path).absolute())


def _reader(paths: Sequence[str]) -> str:
    kinds = {Path(path).suffix for path in paths}
    if len(kinds) != 1 or not kinds <= READERS.keys():
        raise RequestError(
            f"source must be files of one kind, {', '.join(READERS)}, or a dataset; got {', '.join(paths)}.", "source"
        )
    for path in paths:
        if "://" not in path and not Path(path).exists():
            raise RequestError(f"there is no file {path}.", "source")
    return READERS[kinds.pop()]


def numbered(rows: Any) -> tuple[Any, set[int]]:
    """The rows with their numbers, and these. RequestError if they have such a column."""
    rows = rows.materialize()
    if not rows.count():
        return rows, set()
    if ROW in rows.columns():
        raise RequestError(f"the rows have a column {ROW!r} already; tell them apart by it (id={ROW!r}), or drop it first "
                           f"(dataset.drop_columns([{ROW!r}])).", "id")  # fmt: skip
    numbers = need("ray.data").range(rows.count()).rename_columns({"id": ROW})
    numbers.context.execution_options.preserve_order = True
    return rows.zip(numbers).materialize(), set(range(rows.count()))


def read_ids(rows: Any, id: str) -> set[Any]:
    """The ids. RequestError if some are missing, the same, or cannot be compared: lists, objects, NaN."""
    columns = rows.columns()
    if columns is not None and id not in columns:  # None: there are no rows
        raise RequestError(f"there is no column {id!r}; the rows have {', '.join(columns)}.", "id")
    ids = set[Any]()
    for table in rows.select_columns([id]).iter_batches(batch_size=None, batch_format="pyarrow"):
        for one in table[id].to_pylist():
            if one is None or not isinstance(one, Hashable) or one != one or one in ids:
                raise RequestError(f"the column {id!r} must tell rows apart by texts or numbers, each there once; "
                                   f"{reprlib.repr(one)} is there twice, or is neither.", "id")  # fmt: skip
            ids.add(one)
    return ids


def without(rows: Any, id: str, done: set[Any]) -> Any:
    """The rows whose id is not among these."""
    if not done:
        return rows
    known = need("ray").put(frozenset(done))  # once for all tasks

    def keep(table: Any) -> Any:
        found = need("ray").get(known)
        return table.filter(need("pyarrow").array([one not in found for one in table[id].to_pylist()], "bool"))

    return rows.map_batches(keep, batch_format="pyarrow", batch_size=None)


def _folder(given: str | Path) -> Path:
    if "://" in str(given):
        raise RequestError(f"output_dir must be a folder of this machine, got {str(given)!r}; copy its files afterwards.",
                           "output_dir")  # fmt: skip
    return Path(given).expanduser()


def _job(engine: EngineConfig, params: Params, prompt: str, id: str | None, chat: bool, rows: int) -> dict[str, Any]:
    """What results depend on. Without ids also the number of rows: with other rows the numbers would mean others."""
    made = sampling(params)
    job: dict[str, Any] = {name: getattr(engine, name) for name in MEANING}
    job |= {"sampling": None if made is None else _fields(made), "prompt": prompt, "id": id or ROW, "chat": chat}
    return job if id is not None else job | {"rows": rows}


def _fields(value: Any) -> dict[str, Any]:
    return (
        {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else vars(value)
    )
