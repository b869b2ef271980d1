"""A model on devices, on paper: what `jaxpaged plan` reads, and how much memory that takes on each device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxpaged import build, hub, kv_cache, loading, memory, quantization, sharding
from jaxpaged.batch import Bucket, ladder
from jaxpaged.checkpoint import open_checkpoint, read_json
from jaxpaged.config import EngineConfig
from jaxpaged.cost import Sizes, StageCost, StepCost, make_stages
from jaxpaged.cost_weights import weight_bytes
from jaxpaged.devices import Device
from jaxpaged.hf_config import HFConfig
from jaxpaged.memory import MemoryPlan
from jaxpaged.models import door
from jaxpaged.models.adapters import Slots
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.quantized import NO_FORMS, Forms, all_products
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.parallel import Parallel
from jaxpaged.request import RequestError
from jaxpaged.stage import TABLE, abstract_decoder
from jaxpaged.state import Limits


@dataclass(frozen=True)
class Source:
    """A model's config, and how its products are kept where a file says so. hf: the Hugging Face config."""

    hf: dict[str, Any]
    path: Path | None = None
    forms: Forms | None = None


@dataclass(frozen=True)
class Setting:
    """A model on devices. config: without "auto". auto_length: max_model_len may become shorter, so that a sequence fits."""

    source: Source
    config: EngineConfig
    decoder: DecoderConfig
    forms: Forms
    device: Device
    auto_length: bool

    @property
    def sizes(self) -> Sizes:
        c = self.config
        return Sizes(c.tensor_parallel_size, c.pipeline_parallel_size, c.data_parallel_size, c.enable_expert_parallel)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return ladder(int(self.config.max_num_batched_tokens), int(self.config.max_num_seqs))

    @property
    def cache_dtype(self) -> str:
        return str(jnp.dtype(build.cache_dtype(self.config, self.decoder)))

    @cached_property
    def stages(self) -> list[StageCost]:
        return make_stages(self.decoder, self.sizes, self.config.dtype, self.cache_dtype, self.forms)

    @cached_property
    def cost(self) -> StepCost:
        return StepCost(self.stages, self.device)

    @cached_property
    def layout(self) -> kv_cache.Layout:
        c = self.config
        hybrid = not c.disable_hybrid_kv_cache_manager
        return kv_cache.layout(self.decoder, int(c.max_model_len or 0), int(c.block_size), hybrid)

    def limits(self, num_pages: int = 0) -> Limits:
        return build.make_limits(self.config, self.decoder, self.layout.reaches, num_pages)

    def weights(self, stage: StageCost) -> int:
        """Bytes on each device of a stage: weights, and room for adapters."""
        tables = sum(size for layer, size in self._tables if layer in stage.layers)
        return weight_bytes(stage.config, self.config.dtype, self.forms, stage.layers) + tables

    @cached_property
    def _tables(self) -> list[tuple[int, int]]:
        """(layer, bytes on a device that has it) of each table of LoRA adapters."""
        slots = Slots(self.config.num_loras, self.config.max_lora_rank)
        if not slots.num:
            return []
        _, _, leaves = abstract_decoder(self.stages[0].config, self.config.dtype, NO_FORMS, slots)
        return [(int(path.split(".")[1]), math.prod(leaf.shape) * leaf.dtype.itemsize)
                for path, leaf in leaves.items() if TABLE in path]  # fmt: skip

    def page_bytes(self, stage: StageCost) -> int:
        """Of a page, on each device of a stage."""
        layout = self.layout if len(self.stages) == 1 else self.layout.of(stage.layers)
        return kv_cache.page_bytes(stage.config, layout, int(self.config.block_size), self.cache_dtype)

    @property
    def memory_limit(self) -> int:
        return int(self.device.memory * memory.FILLED * self.config.gpu_memory_utilization)

    @property
    def expected_temporaries(self) -> int:
        """Until a compiler says it."""
        n = self.sizes
        parallel = Parallel(sharding.Sharding(self.decoder, n.tensor, n.experts), (), ())
        return build.expected_temporaries(parallel, self.buckets, jnp.dtype(self.config.dtype).itemsize)

    def change(self, **changes: Any) -> Setting:
        """With other fields of EngineConfig."""
        return setting(self.source, self.config.replace(**changes), self.device)


def read_source(config: EngineConfig) -> Source:
    """From config.model: a folder's config.json, a .gguf file's header; what is on the hub is downloaded, without weights."""
    path = hub.resolve(config.model, config.revision, config.hf_token, weights=False)
    if path.is_dir():
        return Source(read_json(path / "config.json"), path)
    checkpoint = open_checkpoint(path)
    forms = None
    if config.quantization == "gguf":
        hf = HFConfig(checkpoint.config)
        family = door(hf["model_type"], hf)
        forms = quantization.plan_gguf(checkpoint, family.names(family.decoder_config(hf)))[1].forms  # type: ignore[arg-type]
    return Source(checkpoint.config, path, forms)


def setting(source: Source, config: EngineConfig, device: Device) -> Setting:
    """RequestError if there is no such model, or devices cannot share it in this way."""
    hf = HFConfig(source.hf, config.hf_overrides, source=source.path or "the config")
    decoder = door(hf["model_type"], hf).decoder_config(hf)
    forms = _forms(source, config, hf, decoder)
    hf.finish()
    if not decoder.causal:
        raise RequestError("this model makes vectors of texts (it is not causal); plans are for models that generate.", "model")
    auto_length = config.max_model_len == "auto"
    config = config.resolve("gpu", decoder.max_positions)
    decoder = decoder.for_length(int(config.max_model_len or 0))
    found = Setting(source, config, decoder, forms, device, auto_length)
    sharding.check(decoder, found.sizes.tensor, found.sizes.experts)
    sharding.stages(len(decoder.layers), found.sizes.pipeline)
    return found


def _forms(source: Source, config: EngineConfig, hf: HFConfig, decoder: DecoderConfig) -> Forms:
    """How products are kept: as the checkpoint has them, or as they are quantised while it is loaded."""
    if source.forms is not None:
        hf.get("quantization_config")
        return source.forms
    scheme = loading.scheme_of(config, hf, None)
    form = scheme.form if scheme else quantization.ON_THE_FLY.get(config.quantization or "")
    return NO_FORMS if form is None else all_products(nnx.eval_shape(lambda: Decoder(decoder)), form)


def fit(setting: Setting, temporaries: int | None = None) -> tuple[Setting, MemoryPlan]:
    """Where the memory goes on a device, as `build` plans it: of each thing, where it takes most. With auto_length the longest
    sequence may become shorter. RequestError, with what would help, if not one longest sequence fits."""
    temporaries = setting.expected_temporaries if temporaries is None else temporaries
    weights, pages = max(map(setting.weights, setting.stages)), max(map(setting.page_bytes, setting.stages))
    account = setting.memory_limit, weights, temporaries, pages
    _check_room(weights + temporaries, setting.memory_limit, "weights and temporaries take")
    if setting.auto_length:
        setting = replace(setting, config=memory.fitted(setting.config, setting.limits(), *account))
    found = memory.plan(setting.config, setting.limits(), *account)
    _check_room(
        weights + temporaries + found.cache, setting.memory_limit, "weights, temporaries and the KV cache asked for take"
    )
    return setting, found


def _check_room(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise RequestError(
            f"{what} {size / 2**30:,.1f} GiB of a device, of which {limit / 2**30:,.1f} GiB may be used.", "device"
        )


def fits(setting: Setting) -> MemoryPlan | None:
    try:
        return fit(replace(setting, auto_length=False))[1]
    except RequestError:
        return None
