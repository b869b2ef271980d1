"""What the host packs is what the program sees, bit by bit, for every layout that the engine uses."""

import jax
import numpy as np
import pytest

from jaxpaged import packing
from jaxpaged.batch import Bucket, Edits, Sampling, Variant
from jaxpaged.programs import Dims, forward_layout, sample_layout

DIMS = Dims(num_slots=4, columns=(3,), num_pages=20, page_size=4, max_model_len=12, vocab_size=70, max_logprobs=5)
LAYOUTS = {
    "forward": forward_layout(Bucket(8, 3), DIMS),
    "forward of one token": forward_layout(Bucket(1, 1), DIMS),
    **{f"sample {variant.name.lower()}": sample_layout(3, variant, DIMS) for variant in Variant},
    "odd shapes": {
        "scalar": ((), np.dtype(np.float32)),
        "nothing": ((0, 3), np.dtype(np.uint32)),
        "flag": ((), np.dtype(np.bool_)),
        "cube": ((2, 3, 4), np.dtype(np.int32)),
    },
}


def noise(layout: packing.Layout) -> dict[str, np.ndarray]:
    """Every bit pattern may come, NaN of all kinds included."""
    rng = np.random.default_rng(0)

    def field(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if dtype == np.bool_:
            return rng.random(shape) < 0.5 if shape else np.array(True)
        return np.asarray(rng.integers(2**32, size=shape, dtype=np.uint32)).view(dtype)

    return {name: field(shape, dtype) for name, (shape, dtype) in layout.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_packed_comes_out_again(name):
    layout = LAYOUTS[name]
    fields = noise(layout)
    buffer = packing.pack(layout, fields)
    assert buffer.dtype == np.int32 and buffer.shape == (packing.size(layout),)
    found = jax.jit(lambda packed: packing.unpack(layout, packed))(buffer)
    assert set(found) == set(layout)
    for field, (shape, dtype) in layout.items():
        assert found[field].shape == shape and found[field].dtype == dtype
        assert np.asarray(found[field]).tobytes() == fields[field].tobytes(), field


def test_numbers_with_special_bits():
    layout = {"x": ((5,), np.dtype(np.float32)), "seed": ((2,), np.dtype(np.uint32))}
    x, seed = np.array([-0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32), np.array([2**32 - 1, 2**31], np.uint32)
    found = packing.unpack(layout, jax.numpy.array(packing.pack(layout, {"x": x, "seed": seed})))
    assert np.asarray(found["x"]).tobytes() == x.tobytes()
    assert found["seed"].tolist() == [4294967295, 2147483648]


def test_fields_may_lie_anyhow_in_memory_and_more_may_be_given():
    layout = {"table": ((3, 2), np.dtype(np.int32)), "flags": ((3,), np.dtype(np.bool_))}
    table, flags = np.arange(6, dtype=np.int32).reshape(2, 3).T, np.array([True, False, True, False, True])[::2]
    buffer = packing.pack(layout, {"table": table, "flags": flags, "unused": None})
    assert buffer.tolist() == [0, 3, 1, 4, 2, 5, 1, 1, 1]


@pytest.mark.parametrize("shape", [(4,), (3, 1), ()], ids=str)
def test_another_shape_is_refused_by_name(shape):
    layout = LAYOUTS["forward"]
    fields = noise(layout) | {"kv_lens": np.zeros(shape, np.int32)}
    with pytest.raises(ValueError) as error:
        packing.pack(layout, fields)
    assert str(error.value) == f"batch field kv_lens has shape {shape}, the bucket's program takes (3,)."


def test_layouts_have_what_the_sampler_takes():
    greedy, sample, full = (LAYOUTS[f"sample {name}"] for name in ("greedy", "sample", "full"))
    assert set(greedy) == {"slots", "samples"}
    assert set(sample) - set(greedy) == {*Sampling._fields, "kv_lens"}
    assert set(full) - set(sample) == {*Edits._fields, "carried"}
    assert full["allowed"][0] == (3, 3)  # 70 words: two words of 32 bits are not enough
