"""Versioned containers are values: whatever is made from a version, and in whatever order versions are read."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.versioned import Array, Map

ROWS, COLUMNS = 4, 3
row = st.integers(0, ROWS - 1)
cell = st.tuples(row, st.integers(0, COLUMNS - 1))
indices = st.one_of(
    row,
    cell,
    st.tuples(row, st.slices(COLUMNS)),
    st.slices(ROWS),
    st.lists(row, unique=True).map(lambda rows: np.array(rows, np.int64)),
    st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array),
    st.lists(cell, unique=True, min_size=1).map(lambda cells: tuple(np.array(cells).T)),
)
# (of which version, where, the new value); then versions that are read, in any order
steps = st.lists(st.tuples(st.integers(0, 99), indices, st.integers(-9, 9)), max_size=12)
reads = st.lists(st.integers(0, 99), max_size=12)
DTYPES = st.sampled_from([np.int32, np.float32, np.object_, np.dtype([("a", np.int32), ("b", np.float32, 2)])])


@settings(max_examples=200, deadline=None)
@given(steps=steps, reads=reads, dtype=DTYPES)
def test_every_version_of_an_array_stays_what_it_was(steps, reads, dtype):
    start = np.zeros((ROWS, COLUMNS), dtype)
    versions, expected = [Array(start.copy())], [start]
    for of, index, value in steps:
        value = np.array((value, [value, -value]), dtype) if np.dtype(dtype).fields else value
        versions.append(versions[of % len(versions)].set(index, value))
        changed = expected[of % len(expected)].copy()
        changed[index] = value
        expected.append(changed)
    for i in [*reads, *range(len(versions)), *reversed(range(len(versions)))]:
        found = versions[i % len(versions)].read()
        np.testing.assert_array_equal(found, expected[i % len(versions)], strict=True)


changes = st.dictionaries(st.integers(0, 5), st.integers() | st.none(), max_size=3)
map_steps = st.lists(st.tuples(st.integers(0, 99), changes, st.lists(st.integers(0, 5), max_size=3)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(steps=map_steps, reads=reads)
def test_every_version_of_a_map_stays_what_it_was(steps, reads):
    versions, expected = [Map({1: 10, 2: None})], [{1: 10, 2: None}]
    for of, changes, deleted in steps:
        versions.append(versions[of % len(versions)].update(changes, deleted))
        rest = {key: value for key, value in expected[of % len(expected)].items() if key not in deleted}
        expected.append({**rest, **changes})
    for i in [*reads, *range(len(versions)), *reversed(range(len(versions)))]:
        found, right = versions[i % len(versions)], expected[i % len(versions)]
        assert dict(found.items()) == dict(found.read()) == right and len(found) == len(right)
        assert all((key in found) == (key in right) and found.get(key, "no") == right.get(key, "no") for key in range(7))


def test_an_array_is_read_only():
    array = Array(np.zeros(3))
    for version in (array, array.set(0, 1.0), array):
        with pytest.raises(ValueError, match="read-only"):
            version.read()[0] = 5
    with pytest.raises(TypeError):
        Map({1: 2}).read()[1] = 3


def test_a_set_that_fails_changes_nothing():
    array = Array(np.arange(4))
    for index, values in ((9, 1), ([0, 1], [1, 2, 3]), (0, "text"), ("name", 1)):
        with pytest.raises((IndexError, ValueError)):
            array.set(index, values)
    assert array.read().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        array.read()[0] = 5


def test_what_was_given_may_change_afterwards():
    values, array = np.array([7, 8]), Array(np.zeros(4, np.int64))
    newer = array.set([1, 2], values)
    values[:] = 0
    assert newer.read().tolist() == [0, 7, 8, 0] and array.read().tolist() == [0, 0, 0, 0]
    assert newer.read().tolist() == [0, 7, 8, 0]


def test_values_may_be_the_arrays_own():
    array = Array(np.arange(6))
    moved = array.set(slice(1, 6), array.read()[:5])
    assert moved.read().tolist() == [0, 0, 1, 2, 3, 4] and array.read().tolist() == [0, 1, 2, 3, 4, 5]


def test_long_histories_do_not_recurse():
    first = newest = Array(np.zeros(2, np.int64))
    oldest = latest = Map()
    for i in range(2 * sys.getrecursionlimit()):
        newest, latest = newest.set(0, i), latest.set(i % 5, i)
    assert first.read().tolist() == [0, 0] and len(oldest) == 0
    assert newest.read()[0] == i and latest[i % 5] == i


def test_no_change_is_the_same_map():
    empty = Map()
    assert empty.update({}) is empty and len(empty.delete(3)) == 0
    with pytest.raises(KeyError):
        empty[3]
