"""Keys and values in one byte a number: half the memory and less, near the same answers, whatever the schedule."""

import jax.numpy as jnp
import numpy as np
import pytest
from families import rows
from tiny_hf import make, prompts

from jaxpaged import LLM, RequestError, SamplingParams
from jaxpaged.kv_cache import spread

ROWS = {row.name: row for door_rows in rows().values() for row in door_rows}
ENGINE = {"skip_tokenizer_init": True, "enforce_eager": True, "use_tqdm": False, "block_size": 16, "max_num_seqs": 2,
          "max_model_len": 200, "max_num_batched_tokens": 128}  # fmt: skip
PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=0, prompt_logprobs=0)


@pytest.fixture(scope="module", params=["llama", "gemma3", "mpt"])
def folder(request, tmp_path_factory):
    """Dense; with a window and norms of q and k; with ALiBi."""
    folder = tmp_path_factory.mktemp(request.param)
    make(folder, ROWS[request.param])
    return folder


def run(folder, **changes) -> tuple[np.ndarray, float]:
    """Logprobs of a prompt's tokens, and bytes of the cache for a token."""
    ids = prompts(120, seed=5).tolist()
    with LLM(str(folder), **{**ENGINE, **changes}) as llm:
        (output,) = llm.generate([ids], PARAMS, use_tqdm=False)
        cost = llm.memory_plan.page_bytes / llm.config.block_size
    entries = zip(output.prompt_logprobs[1:], ids[1:])
    return np.array([entry[token].logprob for entry, token in entries]), cost


@pytest.mark.parametrize("kind, most", [("int8", 0.02), ("fp8", 0.1), ("fp8_e4m3", 0.1)])
def test_near_the_float_cache_in_a_third_of_its_memory(folder, kind, most):
    floats, cost = run(folder)
    small, small_cost = run(folder, kv_cache_dtype=kind)
    assert 0 < np.sqrt(np.mean((small - floats) ** 2)) < most
    assert small_cost <= cost / 3  # float32: 4 bytes a number; here heads of 12 or 16 numbers have a scale of 4 bytes each


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_chunks_change_nothing(folder, kind):
    whole, _ = run(folder, kv_cache_dtype=kind)
    chunks, _ = run(folder, kv_cache_dtype=kind, max_num_batched_tokens=24)
    assert np.abs(whole - chunks).max() < 3e-3  # a last bit decides here and there to which side a number is rounded


def test_latent_vectors_are_kept_as_they_are(tmp_path):
    make(tmp_path, next(row for name, row in ROWS.items() if row.config == "DeepseekV3"))
    with pytest.raises(RequestError, match="kv_cache_dtype='int8' is not supported for this model: its latent vectors"):
        LLM(str(tmp_path), **ENGINE, kv_cache_dtype="int8")


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_spreading_keeps_products_and_undoes_itself(size):
    x, y = np.random.default_rng(0).standard_normal((2, 5, size)).astype(np.float32)
    x[:, 3] = 100.0
    near, far = (np.asarray(spread(jnp.asarray(a))) for a in (x, y))
    np.testing.assert_allclose((near * far).sum(-1), (x * y).sum(-1), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(spread(jnp.asarray(near)), x, rtol=1e-4, atol=1e-4)
    assert np.abs(near).max() < np.abs(x).max() / 2  # one large number is no more
