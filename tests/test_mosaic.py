"""The backend mosaic_gpu as a whole, in its interpreter: a ragged batch of decodes and chunks against the dense oracle.

Both kernels on their own: test_mosaic_decode.py and test_mosaic_prefill.py. A call takes seconds: few shapes."""

import numpy as np
import pytest
from shapes import Shape
from test_paged_attention import Case, assert_right, assert_same_rows

pytestmark = pytest.mark.slow

HEADS = dict(H=4, G=2, D=64, page_size=16, dtype="bfloat16")
SHAPES = [
    Shape("mixed", rows=((17, 1), (1, 1), (40, 23)), **HEADS),
    Shape("decodes only", rows=((31, 1), (16, 1)), **HEADS),
    Shape("chunks only, all at once", rows=((15, 15), (50, 18)), window=20, soft_cap=3.0, sinks=True, alibi=True, **HEADS),
    Shape("one token", rows=((5, 1),), **HEADS),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_equals_the_dense_oracle(shape):
    assert_right(Case(shape), "mosaic_gpu")


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=lambda shape: shape.name)
def test_what_no_query_sees_changes_nothing(shape):
    """Pages of nobody, past a sequence's end, before a window."""
    case = Case(shape, 1)
    assert_same_rows(case, case.run("mosaic_gpu"), case.run("mosaic_gpu", np.nan))
