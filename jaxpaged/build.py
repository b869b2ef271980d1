"""`build_engine(config)`: the only file that knows everyone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxpaged import hub, kv_cache, loading, lora, memory
from jaxpaged.batch import Bucket, ladder
from jaxpaged.checkpoint import Checkpoint, open_checkpoint, read_json
from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.hf_config import HFConfig
from jaxpaged.loading import Loaded
from jaxpaged.loras import Loras
from jaxpaged.models import door
from jaxpaged.models.adapters import Slots
from jaxpaged.models.quantized import NO_FORMS, Forms
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.parallel import Parallel
from jaxpaged.programs import Dims
from jaxpaged.reach import Reach
from jaxpaged.request import RequestError
from jaxpaged.runner import ModelRunner
from jaxpaged.scheduler import Limits
from jaxpaged.stage import Blueprint
from jaxpaged.tokenizer import Tokenizer, load_tokenizer
from pallas_kernels.checks import QUANTIZED
from pallas_kernels.ops import Ops, backend

log = logging.getLogger(__name__)

CACHE_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}  # of kv_cache_dtype; the others are JAX's names
SAMPLING_KEYS = {key: key for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}  # of generation_config.json -> of SamplingParams


@dataclass(frozen=True)
class Built:
    """An engine and what it was made from. `seconds`: what starting took, by stage."""

    engine: Engine
    runner: ModelRunner
    config: EngineConfig  # resolved: no "auto" left
    decoder_config: DecoderConfig
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any]
    plan: memory.MemoryPlan
    seconds: dict[str, float]
    loras: Loras

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What the model's generation_config.json says about sampling (unless generation_config="vllm"), by SamplingParams'
        names."""
        if self.config.generation_config == "vllm":
            return {}
        given = {SAMPLING_KEYS[key]: value for key, value in self.generation_config.items() if key in SAMPLING_KEYS}
        return {name: value for name, value in given.items() if value is not None}


class Stages:
    """Times the stages of a start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        log.info("%s: %.2f s", name, self.seconds[name])


def build_engine(config: EngineConfig, model: dict[str, Any] | None = None, params: Any = None,
                 progress: bool = True, devices: Sequence[jax.Device] | None = None,
                 least: Callable[[int], int] = lambda value: value) -> Built:  # fmt: skip
    """Builds an engine: finds the model, loads tokenizer and weights, plans memory, compiles, allocates.

    `model`: a Hugging Face config in memory, instead of `config.model`. `params`: weights in memory (a pytree with the
    decoder's paths), instead of the checkpoint's. devices: to use the first of; None: all that JAX has. least: where several
    processes build one engine, the least of what they all say.
    """
    stages, devices = Stages(), devices or memory.devices(config.gpu_memory_utilization)
    _use_compilation_cache(config.compilation_cache_dir)
    only_config = config.load_format == "dummy" or params is not None
    path = None
    if model is None:
        path = hub.resolve(config.model, config.revision, config.hf_token, weights=not only_config)
    stages.done("find the model")
    checkpoint = None if path is None or (only_config and path.is_dir()) else open_checkpoint(path)
    if model is None:
        model = checkpoint.config if checkpoint is not None else read_json(Path(str(path)) / "config.json")
    hf = HFConfig(model, config.hf_overrides, source=path or "the config")
    family = door(hf["model_type"], hf)
    decoder_config = family.decoder_config(hf)
    scheme = loading.scheme_of(config, hf, checkpoint)
    hf.finish()
    auto_length = config.max_model_len == "auto"
    config = config.resolve(devices[0].platform, decoder_config.max_positions)
    decoder_config = decoder_config.for_length(int(config.max_model_len or 0))
    parallel = make_parallel(config, decoder_config, devices)
    tokenizer = _tokenizer(config, path)
    stages.done("load the tokenizer")
    loaded = loading.load(config, family, parallel, scheme, checkpoint, params, progress)
    stages.done("load the weights")
    runner, plan, config = _runner(config, parallel, loaded, auto_length, progress, least)
    stages.done("compile")
    generation_config = _generation_config(path, checkpoint)
    eos_ids = _eos_ids(tokenizer, generation_config, hf)
    limits = make_limits(config, decoder_config, runner.blueprint.kv.reaches, plan.num_pages)
    engine = Engine(limits, runner, runner.buckets, tokenizer, eos_ids,
                    config.max_logprobs, config.async_scheduling, config.seed)  # fmt: skip
    log.info("%s", plan.table(int(config.block_size)))
    return Built(engine, runner, config, decoder_config, tokenizer, generation_config, plan, stages.seconds,
                 _loras(config, decoder_config, family))  # fmt: skip


def _loras(config: EngineConfig, decoder_config: DecoderConfig, family: Any) -> Loras:
    if not config.enable_lora:
        return Loras(None)
    target = lora.target(decoder_config, family.names(decoder_config), config.max_lora_rank, config.dtype)
    return Loras(lambda request, key: lora.read(request, key, target), config.max_cpu_loras or 0)


def _use_compilation_cache(folder: str | None) -> None:
    """Keeps compiled programs on disk between starts, unless the user has set JAX up otherwise already."""
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None or (folder == "auto" and chosen):
        return
    jax.config.update("jax_compilation_cache_dir", str(hub.cache_dir() / "compiled") if folder == "auto" else folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _generation_config(path: Path | None, checkpoint: Checkpoint | None) -> dict[str, Any]:
    if checkpoint is not None:
        return checkpoint.generation_config
    file = None if path is None else path / "generation_config.json"
    return read_json(file) if file is not None and file.exists() else {}


def _eos_ids(tokenizer: Tokenizer | None, generation_config: dict[str, Any], hf: HFConfig) -> frozenset[int]:
    """The ids that end a sequence: the tokenizer's and generation_config.json's; without these, config.json's."""
    listed = lambda ids: frozenset(() if ids is None else ids if isinstance(ids, list) else [ids])
    known = listed(generation_config.get("eos_token_id")) | (tokenizer.eos_token_ids if tokenizer else frozenset())
    return known or listed(hf.get("eos_token_id"))


def _tokenizer(config: EngineConfig, path: Path | None) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    place = hub.resolve(config.tokenizer, weights=False) if config.tokenizer else path
    if place is None:
        return None
    try:
        return load_tokenizer(place)
    except FileNotFoundError as error:
        raise RequestError(f"{error}; name another place with tokenizer=..., or set skip_tokenizer_init=True to work "
                           "with token ids.", "tokenizer") from error  # fmt: skip


def make_limits(config: EngineConfig, decoder_config: DecoderConfig, reaches: tuple[Reach, ...], num_pages: int) -> Limits:
    return Limits(
        max_num_seqs=int(config.max_num_seqs),
        max_num_batched_tokens=int(config.max_num_batched_tokens),
        page_size=int(config.block_size),
        num_pages=num_pages,
        max_model_len=int(config.max_model_len or 0),
        vocab_size=decoder_config.vocab_size,
        policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching and decoder_config.causal,
        long_prefill_token_threshold=config.long_prefill_token_threshold if decoder_config.causal else 0,
        reaches=reaches,
        max_loras=config.num_loras,
        whole_prompts=not decoder_config.causal,
        pipeline=config.pipeline_parallel_size,
    )


def _runner(config: EngineConfig, parallel: Parallel, loaded: Loaded, auto_length: bool, progress: bool,
            least: Callable[[int], int]) -> tuple[ModelRunner, memory.MemoryPlan, EngineConfig]:  # fmt: skip
    """Compiles with as many pages as should fit; if the compiler's own account of temporaries says otherwise, again
    with fewer. With `auto_length` the longest sequence may become shorter, so that one fits. Numbers that may differ
    from host to host go through `least`, so that all decide alike."""
    buckets = ladder(int(config.max_num_batched_tokens), int(config.max_num_seqs))
    limit = memory.device_limit(parallel.placements[0].own[0], config.gpu_memory_utilization)
    limit = None if limit is None else least(limit)
    temporaries = expected_temporaries(parallel, buckets, jnp.dtype(config.dtype).itemsize)
    blueprint = make_blueprint(config, parallel, loaded.forms)
    while True:
        account = limit, blueprint.weight_bytes, temporaries, blueprint.page_bytes
        if auto_length:
            config = _fit(config, make_limits(config, parallel.sharding.config, blueprint.kv.reaches, 0), *account)
            config = config.replace(max_model_len=least(int(config.max_model_len or 0)))
        limits = make_limits(config, parallel.sharding.config, blueprint.kv.reaches, 0)
        plan = memory.plan(config, limits, *account)
        plan = replace(plan, num_pages=least(plan.num_pages))
        blueprint = replace(blueprint, dims=_dims(config, limits, plan.num_pages))
        runner = ModelRunner(blueprint, loaded.leaves, buckets, config.enforce_eager)
        _compile(runner, progress)
        actual = runner.memory()
        most = -least(-actual.temporaries)
        known = most or temporaries  # nothing is compiled yet with enforce_eager
        if limit is None or config.num_gpu_blocks_override or actual.weights + actual.cache + most <= limit:
            runner.allocate()
            return runner, replace(plan, temporaries=known), config
        temporaries = known
        del runner  # what it holds (tables of adapters) makes room for the next one's


def make_parallel(config: EngineConfig, decoder_config: DecoderConfig, devices: Sequence[jax.Device]) -> Parallel:
    """RequestError, with what would work, if there are too few devices or the model cannot be divided as it should."""
    return Parallel.over(devices, decoder_config, config.tensor_parallel_size, config.pipeline_parallel_size,
                         config.enable_expert_parallel, config.all2all_backend == "ragged_all_to_all")  # fmt: skip


def make_blueprint(config: EngineConfig, parallel: Parallel, forms: Forms = NO_FORMS) -> Blueprint:
    """config: resolved. Without pages yet."""
    whole, page_size = parallel.sharding.config, int(config.block_size)
    kv = kv_cache.layout(whole, int(config.max_model_len or 0), page_size, not config.disable_hybrid_kv_cache_manager)
    ops = _kernels(config, parallel.placements[0].devices[0])
    dims = _dims(config, make_limits(config, whole, kv.reaches, 0), 0)
    return Blueprint(parallel, jnp.dtype(config.dtype), forms, kv, jnp.dtype(cache_dtype(config, whole)), ops, dims)


def _kernels(config: EngineConfig, device: jax.Device) -> Ops:
    try:
        return backend(config.kernel_backend, device, debug_checks=config.debug_checks)
    except (ValueError, NotImplementedError) as error:
        raise _refused(error) from error


def _refused(error: Exception) -> RequestError:
    """There is no such backend, or it cannot run this model here: for the user to change."""
    return RequestError(f"{error}; choose another one with kernel_backend.", "kernel_backend")


def _fit(config: EngineConfig, *account: Any) -> EngineConfig:
    fitted = memory.fitted(config, *account)
    if fitted is not config:
        log.warning("max_model_len: %s, which is what the KV cache has room for; the model could %s. Give the cache more "
                    "memory, or set max_model_len.", fitted.max_model_len, config.max_model_len)  # fmt: skip
    return fitted


def cache_dtype(config: EngineConfig, decoder_config: DecoderConfig) -> str:
    """The dtype of keys and values."""
    dtype = CACHE_DTYPES.get(config.kv_cache_dtype, config.kv_cache_dtype)
    if dtype == "auto":
        return config.dtype
    if dtype in QUANTIZED and any(not spec.attention.cached[2] for spec in decoder_config.layers):
        raise RequestError(f"kv_cache_dtype={config.kv_cache_dtype!r} is not supported for this model: its latent vectors "
                           "(MLA) are kept as they are; use 'auto'.", "kv_cache_dtype")  # fmt: skip
    return dtype


def _dims(config: EngineConfig, limits: Limits, num_pages: int) -> Dims:
    return Dims(limits.max_num_seqs, limits.columns, num_pages, limits.page_size, limits.max_model_len,
                limits.vocab_size, min(config.max_logprobs, limits.vocab_size),
                Slots(config.num_loras, config.max_lora_rank))  # fmt: skip


def expected_temporaries(parallel: Parallel, buckets: tuple[Bucket, ...], itemsize: int) -> int:
    """A first guess, replaced by the compiler's account: a few activations of the widest layer, two sets of logits."""
    (tokens, rows), size = buckets[-1], parallel.sharding.size
    widest, whole = parallel.local.widest, parallel.sharding.config
    logits = 2 * -(-rows // size) * whole.vocab_size * 4
    return 4 * tokens * max(widest, 2 * whole.embed_dim) * itemsize + logits


def _compile(runner: ModelRunner, progress: bool) -> None:
    with tqdm(total=runner.num_programs, desc="Compiling", unit="program", disable=not progress) as bar:

        def compiled(what: str, seconds: float) -> None:
            bar.set_postfix_str(f"{what}: {seconds:.1f} s")
            bar.update()

        try:
            runner.compile(compiled)
        except NotImplementedError as error:
            raise _refused(error) from error
