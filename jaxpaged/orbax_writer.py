"""Writes a tree of arrays as an Orbax checkpoint, one array at a time.

Orbax takes a whole tree of arrays and writes them all at once. Here the tree's leaves are promises (`Promise`), with a type
handler of our own that makes an array, lets Orbax's numpy handler write it, waits, and makes the next: the host holds one
array (and a block of its rows that TensorStore writes), never the model. What is written is what Orbax writes for a tree of
numpy arrays.
https://orbax.readthedocs.io/en/latest/guides/checkpoint/custom_types.html (type handlers)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.orbax_checkpoint import INSTALL, row_blocks

CHUNK_BYTES = 4 << 20  # that are read at once: small, so that a shard of a matrix reads little more than itself


class Promise:
    """An array that is made when it is written."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.make = shape, dtype, make

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def write(folder: Path, arrays: dict[str, Promise], done: Callable[[Promise], Any]) -> None:
    """folder: does not exist yet. arrays: by dotted path; they become a tree of dictionaries. done: called after each."""
    ocp = import_orbax()
    import jax

    registry = ocp.type_handlers.create_type_handler_registry(
        (Promise, _handler(ocp, done)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )  # arrays of JAX do not occur; without a handler for them Orbax warns
    tree = nested(arrays)
    settings = jax.tree.map(lambda promise: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(tree, save_args=settings))


def import_orbax() -> Any:
    """orbax.checkpoint; ValueError says how to install it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ValueError(f"{INSTALL}.") from None
    return ocp


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it does, and errors with a traceback before it raises them."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """{"a.b.c": x} -> {"a": {"b": {"c": x}}}."""
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        *parents, name = path.split(".")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = array
    return tree


def _handler(ocp: Any, done: Callable[[Promise], Any]) -> Any:
    class InBlocks(ocp.type_handlers.NumpyHandler):
        """Writes an array some rows at a time. (Where an Orbax has no such method, its own writes it all at once.)"""

        async def _open_and_write(self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any) -> None:
            import tensorstore as ts

            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for rows in row_blocks(store):
                source, target = (value[rows], store[rows]) if value.ndim else (value, store)
                await target.write(source, can_reference_source_data_indefinitely=True)

    numpy_handler = InBlocks(deepcopy_host_arrays=False)

    class Handler(ocp.type_handlers.TypeHandler):
        """Writes promises as numpy arrays."""

        def typestr(self) -> str:
            return numpy_handler.typestr()

        async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
            return await numpy_handler.metadata(infos)

        async def serialize(self, values: Sequence[Promise], infos: Sequence[Any], args: Sequence[Any] | None = None) -> list:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values)):
                for writing in await numpy_handler.serialize([value.make()], [info], [arg]):
                    _finish(writing)
                done(value)
            return []

        async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
            return await numpy_handler.deserialize(infos, args)

    return Handler()


def _finish(writing: Any) -> None:
    """Waits for Orbax's thread, also after a Ctrl-C: it would otherwise write into a folder that is being deleted."""
    try:
        writing.result()
    except BaseException:
        writing.result()
        raise
