"""Results in Parquet files that are there whole or not at all, and what a folder of them says is done.

A part is written under another name, put on the disk, and renamed; its name has a part of its SHA-256. A part that is cut
short or has other bytes than were written is noticed when the folder is opened: it is set aside, its rows are computed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpaged.ray.needed import need
from jaxpaged.request import RequestError

log = logging.getLogger(__name__)

JOB, LOCK = "_job.json", ".lock"  # readers of Parquet folders pass over names that begin with _ or .
PART, TEMPORARY, BROKEN = "part-", ".part-", ".broken-"


class Parts:
    """A folder of parts, owned by one process at a time. done: the ids of the rows that it has."""

    def __init__(self, folder: Path, id: str):
        self.folder, self.id = folder, id
        self.done: set[Any] = set()
        self._next = 0

    def read(self, retry_errors: bool = False) -> None:
        """Finds out what is done; with retry_errors, rows with an error are not, and are taken out."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            path.unlink()
        for path in sorted(self.folder.glob(f"{PART}*.parquet")):
            self._next = max(self._next, _number(path) + 1)
            table = self._whole(path)
            if table is not None:
                self._take(path, self._without_errors(path, table) if retry_errors else table)

    def write(self, table: Any) -> None:
        """One more part. Rows that are there already are left out."""
        ids = table[self.id].to_pylist()
        new = [i for i, id in enumerate(ids) if id not in self.done]
        if new:
            self._put(self._next, table.take(new) if len(new) < len(ids) else table)
            self._next += 1
            self.done.update(ids)

    def _whole(self, path: Path) -> Any:
        """The part, or None if it is not whole."""
        data = path.read_bytes()
        if path.name == _name(_number(path), data):
            return need("pyarrow.parquet").read_table(need("pyarrow").BufferReader(data))
        log.warning("%s is not what was written and is set aside; its rows will be computed again.", path)
        os.replace(path, path.with_name(BROKEN + path.name))
        return None

    def _take(self, path: Path, table: Any) -> None:
        if self.id not in table.column_names:
            raise RequestError(f"{path} has no column {self.id!r}, so it is no result of this job; take another folder.")
        ids = table[self.id].to_pylist()
        twice = self.done.intersection(ids)
        if twice or len(set(ids)) < len(ids):
            raise RequestError(f"{path} repeats rows, such as {min(map(str, twice or ids))}; somebody else has written into "
                               "this folder: take another one.")  # fmt: skip
        self.done.update(ids)

    def _without_errors(self, path: Path, table: Any) -> Any:
        good = table.filter(need("pyarrow.compute").equal(table["error"], ""))
        if good.num_rows < table.num_rows:
            path.unlink()  # first: killed here, its rows are done again; killed with both there, some would be there twice
            if good.num_rows:
                self._put(_number(path), good)
        return good

    def _put(self, number: int, table: Any) -> None:
        buffer = io.BytesIO()
        need("pyarrow.parquet").write_table(table, buffer)
        path = self.folder / _name(number, buffer.getvalue())
        temporary = path.with_name(f".{path.name}")
        with temporary.open("wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(self.folder)


def _name(number: int, data: bytes) -> str:
    return f"{PART}{number:08d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def _number(path: Path) -> int:
    number = path.stem.removeprefix(PART).partition("-")[0]
    if not number.isdigit():
        raise RequestError(f"{path} is no result of this job; take another folder.", "output_dir")
    return int(number)


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, for this process alone. RequestError if another one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error}.", "output_dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"{folder} is being written by another process; wait for its end, or take another folder.",
                               "output_dir") from None  # fmt: skip
        yield


def check_job(folder: Path, job: Mapping[str, Any]) -> None:
    """Remembers what the folder's results are of. RequestError if it has results of something else."""
    path = folder / JOB
    job = json.loads(json.dumps(job, default=str))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [f"{name} was {before.get(name)!r}, is {job.get(name)!r}" for name in sorted({*before, *job})
                 if before.get(name) != job.get(name)]  # fmt: skip
        if other:
            raise RequestError(
                f"{folder} has the results of another job: {'; '.join(other)}. Take another folder.", "output_dir"
            )
        return
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(job, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a crash of the machine."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
