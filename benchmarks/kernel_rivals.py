"""Other people's kernels for the same cases, for the same numbers where their layouts allow it.

Attention without pages gets keys and values gathered beforehand, contiguous: it does less than ours, and shows what pages
cost. Rivals that need torch read JAX's arrays in place (DLPack).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.kernel_cases import Arguments, Case, Shape
from benchmarks.kernel_timing import Contender, jax_call

Sets = Sequence[Arguments]


@dataclass(frozen=True)
class Rival:
    """missing: why it cannot run here at all (None: it can). applies: whether it computes the case at all."""

    name: str
    missing: Callable[[bool], str | None]  # whether on a GPU
    applies: Callable[[Case], bool]
    build: Callable[[Case, Sets, bool], Contender]  # on a GPU?


def of(case: Case, on_gpu: bool) -> Iterator[Rival]:
    return (rival for rival in RIVALS if rival.applies(case) and rival.missing(on_gpu) is None)


def absent(on_gpu: bool) -> dict[str, str]:
    """Rivals that cannot run here -> why."""
    reasons = {rival.name: rival.missing(on_gpu) for rival in RIVALS}
    return {name: reason for name, reason in reasons.items() if reason}


# -- which cases -----------------------------------------------------------------------------------------------------------


def _shape(case: Case) -> Shape:
    assert case.shape is not None, f"{case.name} is no attention"
    return case.shape


def _rows(case: Case) -> tuple[tuple[int, int], ...]:
    return _shape(case).rows


def _plain(case: Case) -> bool:
    """Attention over a cache of the queries' dtype, without soft cap and sinks."""
    return case.shape is not None and not (case.kv_dtype or case.shape.soft_cap or case.shape.sinks)


def _decodes(case: Case) -> bool:
    return _plain(case) and _shape(case).window is None and all(n == 1 for _, n in _rows(case))


def _prompt(case: Case) -> bool:
    """One row, whole: causal as others understand it."""
    return _plain(case) and len(_rows(case)) == 1 and all(kv_len == n > 1 for kv_len, n in _rows(case))


def _even(case: Case) -> bool:
    """Rows of one length, so that a dense batch needs no mask; no row of padding."""
    return (_prompt(case) and _shape(case).window is None) or (_decodes(case) and len(set(_rows(case))) == 1)


def _used(case: Case, q: Array) -> Array:
    return q[: sum(n for _, n in _rows(case))]


# -- JAX -------------------------------------------------------------------------------------------------------------------

_JAX_PAGED = "jax.experimental.pallas.ops.gpu.paged_attention"


def _no_jax_paged(on_gpu: bool) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            importlib.import_module(_JAX_PAGED)
        except ImportError as error:
            return f"not in JAX {jax.__version__} ({error})"
    return None


def _jax_paged(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """With its defaults: 16 splits of blocks of 8 pages. Its tables must be a multiple of those, and pages head first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        paged_attention = importlib.import_module(_JAX_PAGED).paged_attention
    rows, splits = len(_rows(case)), 16
    needed = -(-max(kv_len for kv_len, _ in _rows(case)) // _shape(case).page_size)
    unit = splits * min(8, 1 << (-(-needed // splits) - 1).bit_length())
    width = -(-needed // unit) * unit

    def arrange(arguments: Arguments) -> Arguments:
        (q, k, v, table, kv_lens, *_), _ = arguments
        table = jnp.pad(table[:rows], ((0, 0), (0, max(0, width - table.shape[1]))))[:, :width]
        return (q[:rows] * jnp.asarray(case.options["scale"], q.dtype), *(x.transpose(2, 0, 1, 3) for x in (k, v)), table,
                kv_lens[:rows]), {}  # fmt: skip

    call = lambda q, k, v, table, lens: paged_attention(
        q, k, v, table, lens, k_splits=splits, interpret=not on_gpu, num_stages=2 if _shape(case).D <= 128 else 1
    )
    return Contender("jax paged_attention", jax_call(call, [jax.jit(arrange)(a) for a in sets]))


def _dense(case: Case, arguments: Arguments) -> tuple[Array, Array, Array]:
    """q [B, N, H, D] and contiguous k, v [B, S, G, D]: B rows of N queries, S the longest row's tokens."""
    (q, k, v, table, *_), _ = arguments
    rows, S = len(_rows(case)), max(kv_len for kv_len, _ in _rows(case))
    ids = table[:rows, : -(-S // _shape(case).page_size)]
    gather = lambda pages: pages[ids].reshape(rows, -1, *pages.shape[2:])[:, :S]
    return _used(case, q).reshape(rows, -1, *q.shape[1:]), gather(k), gather(v)


def _cudnn(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """Off a GPU, XLA in its place."""
    prompt, window = _prompt(case), _shape(case).window

    def call(q: Array, k: Array, v: Array, lens: Array) -> Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=case.options["scale"], is_causal=prompt, implementation="cudnn" if on_gpu else "xla",
            key_value_seq_lengths=None if prompt else lens, local_window_size=(window - 1, 0) if window else None,
        )  # fmt: skip

    dense = jax.jit(lambda arguments: (*_dense(case, arguments), arguments[0][4][: len(_rows(case))]))
    return Contender("cuDNN, dense" if on_gpu else "XLA, dense", jax_call(call, [(dense(a), {}) for a in sets]), read=_tokens)


def _tokens(out: Array) -> Array:
    """[B, N, H, D] -> [T, H, D]"""
    return out.reshape(-1, *out.shape[2:])


def _top_k(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """The 64 highest logits by XLA, top-p among them."""

    def call(logits, temperature, top_k, top_p, min_p, bits):
        values, ids = jax.lax.top_k(logits, min(64, logits.shape[1]))
        chosen = _choose(values / temperature[:, None], jnp.minimum(top_k, 64), top_p, bits)
        return jnp.take_along_axis(ids, chosen, axis=1)[:, 0]

    return Contender("XLA top_k(64)", jax_call(call, sets), read=None)


def _sort(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """All words in order, with their ids."""

    def call(logits, temperature, top_k, top_p, min_p, bits):
        ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32)[None], logits.shape)
        negative, ids = jax.lax.sort((-logits / temperature[:, None], ids), num_keys=1)
        return jnp.take_along_axis(ids, _choose(-negative, top_k, top_p, bits), axis=1)[:, 0]

    return Contender("XLA sort", jax_call(call, sets), read=None)


def _choose(logits: Array, top_k: Array, top_p: Array, bits: Array) -> Array:
    """A place of each row of falling logits: int32 [R, 1]."""
    place = jnp.arange(logits.shape[1])[None]
    logits = jnp.where((place < top_k[:, None]) | (top_k[:, None] <= 0), logits, -jnp.inf)
    p = jax.nn.softmax(logits, axis=1)
    before = jnp.cumsum(p, axis=1) - p
    ends = jnp.cumsum(jnp.where(before < top_p[:, None], p, 0), axis=1)
    uniform = bits[:, 0].astype(jnp.float32)[:, None] * 2.0**-32
    return jnp.sum((ends <= uniform * ends[:, -1:]).astype(jnp.int32), axis=1, keepdims=True).clip(0, logits.shape[1] - 1)


def _ragged_dot(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """Weights inputs first, as it likes them."""
    turned = [((x, w.swapaxes(1, 2), sizes), {}) for (x, w, sizes), _ in sets]
    return Contender("XLA ragged_dot", jax_call(jax.lax.ragged_dot, turned))


def _bf16_matmul(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """The same product had the weights not been quantised."""
    (x, w, _), _ = sets[0]
    F, E = w.shape[0], x.shape[1]
    full = lambda i: jax.random.normal(jax.random.key(i), (F, E), x.dtype)
    plain = [((x, full(i)), {}) for i, ((x, *_), _) in enumerate(sets)]
    return Contender("XLA bf16 matmul", jax_call(lambda x, w: x @ w.T, plain), read=None)


# -- torch -----------------------------------------------------------------------------------------------------------------


def _no_torch(on_gpu: bool) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "not installed"
    import torch

    return None if torch.cuda.is_available() or not on_gpu else "torch sees no GPU"


def _no_module(name: str) -> Callable[[bool], str | None]:
    def missing(on_gpu: bool) -> str | None:
        if importlib.util.find_spec(name) is None:
            return "not installed"
        return _no_torch(on_gpu) if on_gpu else "needs a GPU"

    return missing


def _torch_call(name: str, call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], read: Callable[[Any], Any]) -> Contender:
    import torch

    def wait(out: Any) -> None:
        if out.is_cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        to_jax = lambda out: jnp.asarray(read(out).float().cpu().numpy())
        return Contender(name, torch.inference_mode()(lambda i: call(*sets[i % len(sets)])), wait, to_jax)


def _to_torch(x: Any) -> Any:
    import torch

    return torch.from_dlpack(jax.block_until_ready(x))


def _sdpa(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    import torch

    dense = jax.jit(lambda arguments: _dense(case, arguments))
    tensors = [tuple(_to_torch(x).transpose(1, 2) for x in dense(a)) for a in sets]
    call = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=_prompt(case), scale=case.options["scale"], enable_gqa=True
    )
    return _torch_call("torch SDPA, dense", call, tensors, lambda out: out.transpose(1, 2).flatten(0, 1))


def _flashinfer(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """Planned beforehand, as an engine does once a step for all layers. Pages lie as ours do (NHD)."""
    import flashinfer
    import torch

    shape, rows = _shape(case), len(_rows(case))
    K, only_decodes = shape.page_size, all(n == 1 for _, n in _rows(case))
    kind = flashinfer.BatchDecodeWithPagedKVCacheWrapper if only_decodes else flashinfer.BatchPrefillWithPagedKVCacheWrapper
    window = {"window_left": -1 if shape.window is None else shape.window - 1}
    int32 = lambda x: torch.tensor(np.asarray(x), dtype=torch.int32, device="cuda")

    space = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # of one call at a time

    def planned(arguments: Arguments) -> tuple[Any, ...]:
        (q, k, v, table, kv_lens, query_start, _), _ = arguments
        table, lens = np.asarray(table)[:rows], np.asarray(kv_lens)[:rows]
        pages = -(-lens // K)
        indices = np.concatenate([row[:n] for row, n in zip(table, pages)])
        where = [np.concatenate([[0], np.cumsum(pages)]), indices, lens - (pages - 1) * K]
        heads = shape.H, shape.G, shape.D, K
        q, dtype = _to_torch(_used(case, q)), getattr(torch, shape.dtype)
        types = {"q_data_type": dtype, "kv_data_type": dtype, "sm_scale": case.options["scale"]}
        wrapper = kind(space, "NHD", **({"use_tensor_cores": True} if only_decodes else {}))
        if only_decodes:
            wrapper.plan(*map(int32, where), *heads, **types, **window)
        else:
            starts = np.asarray(query_start)[: rows + 1]
            wrapper.plan(int32(starts), *map(int32, where), *heads, causal=True, **types, **window)
        return wrapper, q, (_to_torch(k), _to_torch(v))

    return _torch_call("FlashInfer", lambda wrapper, q, kv: wrapper.run(q, kv), [planned(a) for a in sets], lambda out: out)


def _vllm_kernel() -> Callable[..., Any]:
    """It has moved."""
    try:
        module = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    except ModuleNotFoundError:
        module = importlib.import_module("vllm.attention.ops.triton_unified_attention")
    return module.unified_attention


def _vllm(case: Case, sets: Sets, on_gpu: bool) -> Contender:
    """Its kernel for mixed batches; with 16 segments a sequence (its "3D" form) where it would choose that itself."""
    import torch

    kernel, shape, rows, threshold = _vllm_kernel(), _shape(case), len(_rows(case)), 128 // _shape(case).G
    segments = lambda *last: torch.empty((threshold, shape.H, 16, *last), dtype=torch.float32, device="cuda")
    options = {
        "max_seqlen_q": max(n for _, n in _rows(case)), "max_seqlen_k": max(kv_len for kv_len, _ in _rows(case)),
        "softmax_scale": case.options["scale"], "causal": True, "softcap": 0.0, "q_descale": None, "k_descale": None,
        "v_descale": None, "window_size": (shape.window - 1 if shape.window else -1, 0 if shape.window else -1),
        "seq_threshold_3D": threshold, "num_par_softmax_segments": 16, "softmax_segm_max": segments(),
        "softmax_segm_expsum": segments(), "softmax_segm_output": segments(1 << (shape.D - 1).bit_length()),
    }  # fmt: skip
    known = inspect.signature(kernel).parameters  # the segments are arguments since 2025
    options = {name: value for name, value in options.items() if name in known}

    def arrange(arguments: Arguments) -> tuple[Any, ...]:
        (q, k, v, table, kv_lens, query_start, _), _ = arguments
        q, k, v, table, lens, starts = map(
            _to_torch, (_used(case, q), k, v, table[:rows], kv_lens[:rows], query_start[: rows + 1])
        )
        return q, k, v, torch.empty_like(q), starts, lens, table

    def call(q, k, v, out, starts, lens, table):
        kernel(q=q, k=k, v=v, out=out, cu_seqlens_q=starts, seqused_k=lens, block_table=table, **options)
        return out

    return _torch_call("vLLM, Triton", call, [arrange(a) for a in sets], lambda out: out)


# -- the list --------------------------------------------------------------------------------------------------------------

_always = lambda on_gpu: None

RIVALS = (
    Rival("jax paged_attention", _no_jax_paged, _decodes, _jax_paged),
    Rival("cuDNN, dense", _always, lambda case: _decodes(case) or _prompt(case), _cudnn),
    Rival("torch SDPA, dense", _no_torch, _even, _sdpa),
    Rival("FlashInfer", _no_module("flashinfer"), _plain, _flashinfer),
    Rival("vLLM, Triton", _no_module("vllm"), _plain, _vllm),
    Rival("XLA top_k(64)", _always, lambda case: case.operation == "sample" and "top-k" in case.name, _top_k),
    Rival("XLA sort", _always, lambda case: case.operation == "sample", _sort),
    Rival("XLA ragged_dot", _always, lambda case: case.operation == "grouped_matmul", _ragged_dot),
    Rival("XLA bf16 matmul", _always, lambda case: case.operation == "quantized_matmul", _bf16_matmul),
)
