"""How a backend is chosen, what it refuses, and the checks of numbers at run time."""

import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import SHAPES
from test_paged_attention import Case, operations

import jaxpaged
import pallas_kernels
from pallas_kernels import mosaic_gpu
from pallas_kernels.ops import BACKENDS, Ops

H200, A100, L40S, T4 = (
    SimpleNamespace(platform="gpu", device_kind=f"NVIDIA {name}", compute_capability=capability)
    for name, capability in (("H200", "9.0"), ("A100", "8.0"), ("L40S", "8.9"), ("T4", "7.5"))
)
MIXED = next(shape for shape in SHAPES if shape.name == "mixed")


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kernel backend 'cuda' is unknown; known: auto, .*reference"):
        pallas_kernels.backend("cuda")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_a_named_backend_does_not_fall_back(name):
    with pytest.raises(NotImplementedError, match=f"no kernel backend runs on cpu: .*{name}.*needs an NVIDIA"):
        pallas_kernels.backend(name, jax.devices("cpu")[0])


@pytest.mark.parametrize("device, names", [
    (jax.devices("cpu")[0], "reference"), (T4, "reference"), (A100, "triton+reference"), (L40S, "triton+reference"),
    (H200, "triton+mosaic_gpu+reference"),
])  # fmt: skip
def test_auto_takes_what_the_device_supports_and_says_so(caplog, device, names):
    with caplog.at_level("INFO", logger="pallas_kernels.ops"):
        assert pallas_kernels.backend("auto", device).name == names
    (line,) = caplog.messages
    assert line.startswith(f"kernel backend: {names} (on {device.device_kind}")
    assert all(f"not {name}: it needs" in line for name in BACKENDS if name not in names)


def ops(name: str, answer) -> Ops:
    def call(x):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Ops(name, *[call] * 5)


@pytest.fixture
def backends(monkeypatch):
    """Puts backends {name: answer, or an exception} in the place of ours."""

    def put(**answers):
        monkeypatch.setattr(pallas_kernels.ops, "BACKENDS", tuple(answers))
        for name, answer in answers.items():
            module = types.ModuleType(name)
            module.supported = lambda device: None
            module.make = lambda device, interpret, name=name, answer=answer: ops(name, answer)
            monkeypatch.setitem(sys.modules, f"pallas_kernels.{name}", module)

    return put


def test_auto_goes_on_where_a_backend_cannot_and_says_so_once(backends, caplog):
    backends(first=NotImplementedError("first: no odd numbers"), second=7)
    with caplog.at_level("INFO", logger="pallas_kernels.ops"):
        chosen = pallas_kernels.backend("auto")
        assert [chosen.sample(1), chosen.sample(3)] == [7, 7]
    assert caplog.messages[1:] == ["sample: by second, as first: no odd numbers"]


def test_auto_does_not_hide_mistakes_and_names_every_limit(backends):
    backends(first=ValueError("wrong"), second=7)
    with pytest.raises(ValueError, match="wrong"):
        pallas_kernels.backend("auto").sample(1)
    backends(first=NotImplementedError("no odd"), second=NotImplementedError("no ones"))
    with pytest.raises(NotImplementedError, match="no odd; no ones"):
        pallas_kernels.backend("auto").sample(1)


# -- limits ----------------------------------------------------------------------------------------------------------------


def attention(backend: Ops, D: int = 64, dtype=jnp.bfloat16, kv_dtype=None, P: int = 4, page_size: int = 16,
              chunk: int | None = None):  # fmt: skip
    """Traces a call; nothing runs."""
    S, i = jax.ShapeDtypeStruct, jnp.int32
    pages = S((P, page_size, 2, D), kv_dtype or dtype)
    named = {name: S(pages.shape[:3], jnp.float32) for name in ("k_scales", "v_scales") if kv_dtype}
    static = dict(scale=1.0, chunk=chunk, implementation=backend)
    run = lambda *arrays, **named: pallas_kernels.paged_attention(*arrays, **named, **static)
    return jax.eval_shape(run, S((8, 4, D), dtype), pages, pages, S((2, 4), i), S((2,), i), S((3,), i), S((2,), i), **named)


@pytest.mark.parametrize("device, options, message", [
    (H200, dict(D=512), "triton: head_dim 512 is above 256; the backend reference can"),
    (H200, dict(dtype=jnp.float64), "triton: queries of float64"),
    (A100, dict(kv_dtype=jnp.float8_e4m3fn), r"triton: a float8 cache needs compute capability 8.9, .*\(8, 0\); int8 works"),
    (H200, dict(kv_dtype=jnp.int8, P=2**20), "triton: a cache of 2147483648 bytes a layer"),
])  # fmt: skip
def test_triton_names_what_it_cannot(device, options, message):
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=message):
        attention(pallas_kernels.backend("triton", device), **options)


@pytest.mark.parametrize("options, message", [
    (dict(D=80), "mosaic_gpu.*head"),
    (dict(dtype=jnp.float32), "mosaic_gpu.*float"),
    (dict(kv_dtype=jnp.int8), "mosaic_gpu has no quantised caches such as int8; the backend triton has"),
    (dict(page_size=5), "mosaic_gpu.*pages"),
    (dict(chunk=96), "mosaic_gpu has no attention within chunks of 96 positions; the backend triton has"),
])  # fmt: skip
def test_mosaic_names_what_it_cannot(options, message):
    with pytest.raises(NotImplementedError, match=message) as error:
        attention(pallas_kernels.backend("mosaic_gpu", H200), **options)
    assert "triton" in str(error.value)
    attention(pallas_kernels.backend("auto", H200), **options)  # another one can


def test_mosaic_has_attention_and_writes_only():
    backend = pallas_kernels.backend("mosaic_gpu", H200)
    for operation in ("sample", "grouped_matmul", "quantized_matmul"):
        with pytest.raises(NotImplementedError, match=f"mosaic_gpu has no {operation}; the backends triton and reference have"):
            getattr(backend, operation)()


# -- numbers ---------------------------------------------------------------------------------------------------------------


def checked(meta) -> None:
    """Runs the case "mixed" with other numbers in its metadata, looked at."""
    case, backend = Case(MIXED), pallas_kernels.backend("reference", debug_checks=True)
    keys, values = case.cache(case.keys).pages, case.cache(case.values).pages
    run = jax.jit(lambda *a: pallas_kernels.paged_attention(*a, scale=1.0, implementation=backend))
    jax.block_until_ready(run(case.q, keys, values, *meta))
    jax.effects_barrier()


def test_debug_checks_let_right_numbers_pass():
    checked(Case(MIXED).meta)


WRONG = {
    "a page past the pool": (lambda m: m.page_table.__setitem__((2, 0), 99), r"page ids must be in 0..\d+; row 2 has \[99\]"),
    "a page of -1": (lambda m: m.page_table.__setitem__((1, 1), -1), r"page ids must be in 0..\d+; row 1 has \[-1\]"),
    "too long": (lambda m: m.kv_lens.__setitem__(0, 10**6), "kv_lens must be in 0.."),
    "more queries than tokens": (lambda m: m.kv_lens.__setitem__(-1 + m.counts[1], 2), "more queries than tokens"),
    "falling starts": (lambda m: m.query_start.__setitem__(3, 0), "query_start must not fall"),
    "chunks among the decodes": (lambda m: m.counts.__setitem__(0, 7), "the first 7 rows must have one query each"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_debug_checks_name_numbers_that_are_wrong(change, message):
    meta = Case(MIXED).meta
    change(meta)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        checked(meta)


@pytest.mark.parametrize("pages, offsets, message", [
    ([0, -1], [0, 0], r"pages must be >= 0, are \[ 0 -1\]"),
    ([0, 1], [0, 4], r"offsets must be in 0..3, are \[0 4\]"),
    ([1, 1], [2, 2], "two tokens are written to one place"),
    ([9, 9], [2, 2], None),
])  # fmt: skip
def test_debug_checks_of_writes(pages, offsets, message):
    backend = pallas_kernels.backend("reference", debug_checks=True)
    cache, new = jnp.zeros((3, 4, 2, 8)), jnp.zeros((2, 2, 8))

    def run():
        places = np.array(pages, np.int32), np.array(offsets, np.int32)
        write = jax.jit(lambda *a: pallas_kernels.write_kv(*a, implementation=backend))
        jax.block_until_ready(write(cache, cache, new, new, *places))
        jax.effects_barrier()

    if message is None:
        run()
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            run()


def test_interpreted_backends_need_no_gpu():
    assert operations("triton").name == "triton"


# -- in the engine ---------------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ENGINE = dict(load_format="dummy", max_num_seqs=4, max_num_batched_tokens=16, block_size=8, max_model_len=64, use_tqdm=False)


def engine(**options) -> jaxpaged.LLM:
    return jaxpaged.LLM(CONFIG, **ENGINE, **options)


@pytest.mark.parametrize("name, message", [
    ("cuda", "kernel backend 'cuda' is unknown; known: .*; choose another one with kernel_backend"),
    ("triton", "no kernel backend runs on cpu: .*triton.*needs an NVIDIA GPU.*; choose another one with kernel_backend"),
])  # fmt: skip
def test_the_engine_says_what_backend_it_lacks(name, message):
    with pytest.raises(jaxpaged.RequestError, match=message):
        engine(kernel_backend=name)


def test_the_engine_says_what_a_backend_cannot_do(monkeypatch):
    refuse = operations("reference")._replace(paged_attention=mosaic_gpu.make(H200, False).sample)
    monkeypatch.setattr("jaxpaged.build.backend", lambda *_, **__: refuse)
    with pytest.raises(jaxpaged.RequestError, match="mosaic_gpu has no sample; .*choose another one with kernel_backend"):
        engine()


def tokens(llm: jaxpaged.LLM) -> list[list[int]]:
    """Of prompts with a common beginning, longer than a step's budget: greedy ones, then drawn ones."""
    rng = np.random.default_rng(0)
    common = rng.integers(3, 90, 20).tolist()
    prompts = [{"prompt_token_ids": [*common, *rng.integers(3, 90, n).tolist()]} for n in (1, 5, 17)]
    greedy = jaxpaged.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    drawn = jaxpaged.SamplingParams(temperature=1, top_k=20, top_p=0.9, seed=5, max_tokens=6, ignore_eos=True)
    with llm:
        outputs = llm.generate([*prompts, *prompts], [greedy] * 3 + [drawn] * 3)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_the_engine_gives_the_same_tokens_with_interpreted_triton_kernels(monkeypatch):
    right = tokens(engine(debug_checks=True))
    monkeypatch.setattr("jaxpaged.build.backend", lambda *_, **__: operations("triton"))
    assert tokens(engine()) == right
