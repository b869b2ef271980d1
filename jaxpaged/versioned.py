"""Containers with value semantics at the cost of mutable ones: Baker's trick (1978; Conchon & Filliatre 2007).

The newest version owns the data. An older one holds the difference to a newer one, and takes the data back when it is
read ("re-rooting"). A chain of states that is only ever read at its newest end costs what each step changes; older
states stay true values, which costs only those who read them. Not for several threads at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

_ABSENT = object()


class _Versioned:
    """`_data` is the container, or None; then `_next` is a newer version and `_undo` leads from it back to this one."""

    __slots__ = ("_data", "_next", "_undo")
    _data: Any
    _next: Any
    _undo: Any

    def __init__(self, data: Any):
        self._data, self._next, self._undo = data, None, None

    def _own(self) -> Any:
        """The container in this version's state. Iterative: chains may be long."""
        if self._data is not None:
            return self._data
        chain, node = [], self
        while node._data is None:
            chain.append(node)
            node = node._next
        for older in reversed(chain):
            newer = older._next
            data, newer._data = newer._data, None
            newer._undo, newer._next = self._exchange(data, older._undo), older
            older._data, older._next, older._undo = data, None, None
        return self._data

    def _step(self, change: Any) -> Any:
        """A new version that owns the data with `change` applied; this one keeps the way back."""
        data = self._own()
        new = object.__new__(type(self))  # __init__ is for beginnings
        new._data, new._next, new._undo = data, None, None
        self._undo, self._next, self._data = self._exchange(data, change), new, None
        return new

    @staticmethod
    def _exchange(data: Any, change: Any) -> Any:
        """Applies `change`, returns what undoes it."""
        raise NotImplementedError


class Array(_Versioned):
    """A numpy array of fixed shape, which it takes over."""

    __slots__ = ()

    def __init__(self, data: np.ndarray):
        data.flags.writeable = False
        super().__init__(data)

    def read(self) -> np.ndarray:
        """The array, read-only, good until another version is made or read."""
        return self._own()

    def set(self, index: Any, values: Any) -> Array:
        """A version with `array[index] = values`. An index array must not name a place twice."""
        return self._step((index, values))

    @staticmethod
    def _exchange(data: np.ndarray, change: Any) -> Any:
        index, values = change
        old = data[index]
        old = old.copy() if isinstance(old, (np.ndarray, np.void)) else old  # a void is a view of a structured entry
        data.flags.writeable = True
        try:
            data[index] = values
        finally:
            data.flags.writeable = False
        return index, old


class Map(_Versioned):
    """A dictionary."""

    __slots__ = ()

    def __init__(self, data: dict | None = None):
        super().__init__({} if data is None else data)

    def read(self) -> Mapping[Any, Any]:
        """The dictionary, read-only, good until another version is made or read."""
        return MappingProxyType(self._own())

    def get(self, key: Hashable, default: Any = None) -> Any:
        return self._own().get(key, default)

    def __getitem__(self, key: Hashable) -> Any:
        return self._own()[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._own()

    def __len__(self) -> int:
        return len(self._own())

    def items(self) -> Iterator[tuple[Any, Any]]:
        return iter(list(self._own().items()))

    def update(self, changes: Mapping[Any, Any], deleted: Any = ()) -> Map:
        """A version with `changes` set and the keys `deleted` gone (those that are there)."""
        if not changes and not deleted:
            return self
        return self._step({**dict.fromkeys(deleted, _ABSENT), **changes})

    def set(self, key: Hashable, value: Any) -> Map:
        return self._step({key: value})

    def delete(self, key: Hashable) -> Map:
        return self.update({}, (key,))

    @staticmethod
    def _exchange(data: dict, change: Any) -> Any:
        undo = {key: data.get(key, _ABSENT) for key in change}
        for key, value in change.items():
            if value is _ABSENT:
                data.pop(key, None)
            else:
                data[key] = value
        return undo
