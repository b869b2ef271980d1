"""What the processes of one engine say to each other, as bytes: MessagePack of the types below and nothing else. No pickle:
bytes that are anything else are refused, and no type that is here runs code when it is read, but to check its values.

Arrays are raw little-endian numbers. A LoRA adapter goes over once, with the first request that names it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from jaxpaged.adapter import Adapter, Table
from jaxpaged.journal import Aborted, Added, Committed, Failed, Record, Reset, Scheduled
from jaxpaged.request import Request

MAX_ADAPTERS = 32  # that the receiver remembers
DTYPES = {name: np.dtype(name) for name in ("float32", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


class WireError(ValueError):
    """Bytes that are not a message, or one that does not fit to those before it."""


class _Tagged(msgspec.Struct, tag=True, array_like=True, forbid_unknown_fields=True):
    pass


# -- messages ------------------------------------------------------------------------------------------------------------


class Beat(_Tagged):
    """I am alive."""


class Facts(_Tagged):
    """What must be the same everywhere."""

    values: dict[str, str]


class Value(_Tagged):
    """An offer of a follower; the leader answers with the least of all."""

    value: int


class Trouble(_Tagged):
    """I end, with an error."""

    why: str


class Stop(_Tagged):
    """The leader ends, and all is well."""


class Step(_Tagged):
    """Records of the journal; the last one is Scheduled, but at the very end."""

    records: list[Add | Learn | Forget | Abort | Forgotten | Plan | Commit | Fail]


# -- records -------------------------------------------------------------------------------------------------------------


class Add(_Tagged):
    request: Request
    adapter: str  # key of one that is known; "": none


class Numbers(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Learn(_Tagged):
    name: str
    key: str
    source: str
    rank: int
    tables: dict[str, tuple[Numbers, Numbers]]


class Forget(_Tagged):
    """An adapter, by its key. Requests that are there keep theirs."""

    key: str


class Abort(_Tagged):
    ids: tuple[str, ...]


class Forgotten(_Tagged):
    """Reset."""


class Plan(_Tagged):
    """Scheduled."""


class Commit(_Tagged):
    tokens: bytes  # int32
    finite: bytes  # a byte each, 0 or 1
    ended: tuple[tuple[int, int], ...]


class Fail(_Tagged):
    cache_lost: bool


Message = Beat | Facts | Value | Trouble | Stop | Step
_ENCODER, _DECODER = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes | bytearray) -> Message:
    """WireError for anything that is not exactly one message."""
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise WireError(f"{len(data)} bytes are not a message: {error}") from None


# -- of records, and back ------------------------------------------------------------------------------------------------


class Writer:
    """Records -> a Step. Knows which adapters the receivers know."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, None] = OrderedDict()

    def step(self, records: Iterable[Record]) -> Step:
        return Step([entry for record in records for entry in self._entries(record)])

    def _entries(self, record: Record) -> list[Any]:
        match record:
            case Added(request):
                return self._added(request)
            case Aborted(ids):
                return [Abort(ids)]
            case Reset():
                return [Forgotten()]
            case Scheduled():
                return [Plan()]
            case Committed(tokens, finite, ended):
                return [Commit(tokens.astype("<i4").tobytes(), finite.astype("u1").tobytes(), ended)]
            case Failed(cache_lost):
                return [Fail(cache_lost)]

    def _added(self, request: Request) -> list[Any]:
        """Without what neither scheduler nor batch reads: the prompt's text, and what callers have attached."""
        params = replace(request.params, extra_args=None) if request.params.extra_args is not None else request.params
        adapter = request.adapter
        entry = Add(replace(request, params=params, prompt_text=None, adapter=None), "" if adapter is None else adapter.key)
        return [*([] if adapter is None else self._learn(adapter)), entry]

    def _learn(self, adapter: Adapter) -> list[Any]:
        if adapter.key in self._known:
            self._known.move_to_end(adapter.key)
            return []
        self._known[adapter.key] = None
        tables = {path: (_numbers(table.a), _numbers(table.b)) for path, table in adapter.tables.items()}
        learn = Learn(adapter.name, adapter.key, adapter.source, adapter.rank, tables)
        old = [Forget(self._known.popitem(last=False)[0])] if len(self._known) > MAX_ADAPTERS else []
        return [*old, learn]


class Reader:
    """A Step -> records. WireError where an entry does not fit to those before it."""

    def __init__(self) -> None:
        self._known: dict[str, Adapter] = {}

    def records(self, step: Step) -> list[Record]:
        found = [self._record(entry) for entry in step.records]
        return [record for record in found if record is not None]

    def _record(self, entry: Any) -> Record | None:
        match entry:
            case Learn():
                self._known[entry.key] = Adapter(entry.name, entry.key, entry.source, entry.rank, _tables(entry.tables))
            case Forget(key):
                self._known.pop(key, None)
            case Add(request, adapter):
                return Added(self._with_adapter(request, adapter))
            case Abort(ids):
                return Aborted(ids)
            case Forgotten():
                return Reset()
            case Plan():
                return Scheduled()
            case Commit():
                return _committed(entry)
            case Fail(cache_lost):
                return Failed(cache_lost)
        return None

    def _with_adapter(self, request: Request, key: str) -> Request:
        if request.adapter is not None:
            raise WireError(f"request {request.id!r} brings an adapter along; it must name one.")
        if key and key not in self._known:
            raise WireError(f"request {request.id!r} names an adapter that has not been sent.")
        return replace(request, adapter=self._known[key]) if key else request


def _committed(entry: Commit) -> Committed:
    if len(entry.tokens) != 4 * len(entry.finite):
        raise WireError(f"{len(entry.tokens)} bytes of tokens and {len(entry.finite)} flags do not fit together.")
    tokens = np.frombuffer(entry.tokens, "<i4").astype(np.int32)
    return Committed(tokens, np.frombuffer(entry.finite, np.uint8) != 0, entry.ended)


def _numbers(array: np.ndarray) -> Numbers:
    little = array if array.dtype.byteorder != ">" else array.astype(array.dtype.newbyteorder("<"))
    return Numbers(array.dtype.name, array.shape, np.ascontiguousarray(little).tobytes())


def _tables(tables: Mapping[str, tuple[Numbers, Numbers]]) -> dict[str, Table]:
    return {path: Table(_array(a), _array(b)) for path, (a, b) in tables.items()}


def _array(numbers: Numbers) -> np.ndarray:
    dtype, shape = DTYPES.get(numbers.dtype), numbers.shape
    if dtype is None or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(numbers.data):
        raise WireError(f"{len(numbers.data)} bytes are no array of {numbers.dtype!r} {shape}.")
    return np.frombuffer(numbers.data, dtype).reshape(shape)
