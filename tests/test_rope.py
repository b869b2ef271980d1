"""Rotary positions: float32 angles far out, what rotation keeps, and the kinds of scaling that are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.models.rope import Rope, make_rope, rotate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def rotated(x, positions, rope: Rope, dtype=jnp.float32):
    """x [T, D] -> [T, D], one head."""
    cos, sin = rope.tables(jnp.asarray(positions, jnp.int32))
    return np.asarray(rotate(jnp.asarray(x, dtype)[:, None], cos, sin)[:, 0].astype(jnp.float32))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_angles_are_exact_far_out(theta):
    """float32 knows an angle of 8,191 radians to 5e-4, and the frequency's own rounding adds as much at most."""
    positions = np.arange(8192)
    angles = positions[:, None] * theta ** -(np.arange(0, 128, 2) / 128)
    cos, sin = make_rope(128, theta).tables(jnp.asarray(positions, jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (8192, 64)
    assert np.abs(cos - np.cos(angles)).max() < 1e-3 and np.abs(sin - np.sin(angles)).max() < 1e-3


def test_bfloat16_vectors_turn_by_float32_angles():
    """4,097 is no bfloat16: its neighbours there are 4,096 and 4,128."""
    rope, x = make_rope(64, 10000.0), random(1, 64)
    assert np.abs(rotated(x, [4097], rope, jnp.bfloat16) - rotated(x, [4097], rope)).max() < 0.05
    assert np.abs(rotated(x, [4096], rope) - rotated(x, [4097], rope)).max() > 0.3


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["default", "llama3"])
def test_products_depend_on_the_distance_alone(scaling):
    rope = make_rope(64, 10000.0, scaling)
    q, k = random(2, 64)
    at = lambda i, j: float(rotated(q[None], [i], rope)[0] @ rotated(k[None], [j], rope)[0])
    assert at(3, 0) == pytest.approx(at(403, 400), abs=1e-3)
    assert abs(at(3, 0) - at(4, 0)) > 0.1
    assert np.linalg.norm(rotated(q[None], [500], rope)) == pytest.approx(np.linalg.norm(q), rel=1e-5)


def test_dimensions_beyond_the_rotated_ones_stay():
    x = random(3, 64)
    turned = rotated(x, [5, 6, 7], make_rope(16, 10000.0))
    assert np.array_equal(turned[:, 16:], x[:, 16:]) and not np.isclose(turned[:, :16], x[:, :16]).all()


def test_scale_multiplies():
    rope, x = make_rope(32, 10000.0), random(2, 32)
    assert np.allclose(rotated(x, [7, 9], Rope(rope.frequencies, 1.5)), 1.5 * rotated(x, [7, 9], rope), atol=1e-6)


def test_llama_cpps_factors_are_llama3_worked_out():
    plain, scaled = make_rope(128, 500000.0), make_rope(128, 500000.0, LLAMA3)
    factors = [p / s for p, s in zip(plain.frequencies, scaled.frequencies)]
    assert factors[0] == 1 and factors[-1] == 8 and any(1.5 < f < 7 for f in factors)
    again = make_rope(128, 500000.0, {"rope_type": "freq_factors", "factors": factors})
    assert np.allclose(again.frequencies, scaled.frequencies, rtol=1e-12)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["mrope", "proportional"])
def test_unknown_kinds_are_refused(kind, key):
    with pytest.raises(ValueError, match=f"kind '{kind}' is not supported; supported: default, dynamic, linear, llama3, yarn"):
        make_rope(64, 10000.0, {key: kind, "factor": 2.0})


@pytest.mark.parametrize("key", [key for key in LLAMA3 if key != "rope_type"])
def test_what_a_kind_needs_is_named(key):
    with pytest.raises(ValueError, match=f"rope_scaling .*llama3.* lacks the key '{key}'"):
        make_rope(64, 10000.0, {k: v for k, v in LLAMA3.items() if k != key})


@pytest.mark.parametrize("key, value", [("partial_rotary_factor", 0.5), ("mrope_section", [16, 24, 24])])
def test_keys_that_are_not_known_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"not known here and may change the rotation: {key}"):
        make_rope(64, 10000.0, {"rope_type": "default", key: value})
    assert make_rope(64, 10000.0, {"rope_type": "default", key: None, "finetuned": True}) == make_rope(64, 10000.0)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}


def test_longrope_stretches_only_for_sequences_longer_than_in_training():
    """Its scale, sqrt(1 + log(factor) / log(trained)), is that of the whole model: it does not depend on the length."""
    plain, rope = make_rope(16, 10000.0), make_rope(16, 10000.0, LONGROPE, 512)
    assert rope.for_length(128).frequencies == plain.frequencies
    assert np.allclose(rope.for_length(129).frequencies, np.divide(plain.frequencies, 4))
    assert rope.for_length(128).scale == rope.for_length(129).scale == pytest.approx(np.sqrt(1 + np.log(4) / np.log(128)))


def test_longrope_wants_a_factor_for_each_frequency():
    with pytest.raises(ValueError, match="long_factor has 7 numbers for 8 frequencies"):
        make_rope(16, 10000.0, {**LONGROPE, "long_factor": [4.0] * 7}, 512)
    with pytest.raises(ValueError, match="lacks the key 'short_factor'"):
        make_rope(16, 10000.0, {k: v for k, v in LONGROPE.items() if k != "short_factor"}, 512)


def test_a_fixed_alpha_makes_the_base_greater():
    plain, dynamic = make_rope(64, 10000.0), {"rope_type": "dynamic", "factor": 2.0}
    assert make_rope(64, 10000.0, dynamic).frequencies == plain.frequencies
    stretched = make_rope(64, 10000.0, {**dynamic, "alpha": 1000.0})
    assert np.allclose(stretched.frequencies, make_rope(64, 10000.0 * 1000 ** (64 / 62)).frequencies, rtol=1e-12)
    with pytest.raises(ValueError, match="may change the rotation: alpha"):
        make_rope(64, 10000.0, {"rope_type": "linear", "factor": 2.0, "alpha": 1000.0})
