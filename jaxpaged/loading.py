"""From a checkpoint, a pytree or nothing to the model's leaves on the device, quantised where that is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxpaged import quantization, weights
from jaxpaged.checkpoint import Checkpoint
from jaxpaged.config import EngineConfig
from jaxpaged.gguf_file import GGUFCheckpoint
from jaxpaged.hf_config import HFConfig
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.quantized import NO_FORMS, Form, Forms, all_products
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import TIED
from jaxpaged.request import RequestError
from jaxpaged.runner import abstract_decoder


class Loaded(NamedTuple):
    """leaves: {dotted path: array} of `runner.abstract_decoder(..., forms)`."""

    leaves: dict[str, jax.Array]
    forms: Forms


def scheme_of(config: EngineConfig, hf: HFConfig, is_gguf: bool) -> quantization.Scheme | None:
    """The scheme of a quantised checkpoint, from its config. RequestError if the user asks for another one."""
    given = hf.get("quantization_config")
    if not given:
        if is_gguf and config.quantization == "gguf":
            return None
        if config.quantization is not None and config.quantization not in quantization.ON_THE_FLY:
            raise RequestError(
                f"quantization={config.quantization!r} is a checkpoint's format, and this one is not quantised; leave it "
                f"out, or quantise it as it is loaded: {', '.join(quantization.ON_THE_FLY)}.", "quantization",
            )  # fmt: skip
        return None
    method = str(given.get("quant_method", "")).replace("_", "-")
    if config.quantization not in (None, method):
        raise RequestError(f"quantization={config.quantization!r}, but the checkpoint is quantised already ({method}); leave "
                           "it out.", "quantization")  # fmt: skip
    return quantization.scheme(given)


def load(config: EngineConfig, family: Any, decoder_config: DecoderConfig, scheme: quantization.Scheme | None,
         checkpoint: Checkpoint | None, params: Any, progress: bool) -> Loaded:  # fmt: skip
    """family: the model's door. scheme: how the checkpoint is quantised. params: weights in memory instead of a checkpoint."""
    if params is None and checkpoint is not None and config.load_format != "dummy":
        return _from_checkpoint(config, family, decoder_config, scheme, checkpoint, progress)
    form = scheme.form if scheme else quantization.ON_THE_FLY.get(config.quantization or "")
    forms = _everywhere(decoder_config, form)
    _, _, leaves = abstract_decoder(decoder_config, config.dtype)
    if params is not None:
        return Loaded(weights.from_tree(params, leaves, forms=forms), forms)
    if config.load_format == "dummy":
        return Loaded(weights.dummy(leaves, config.seed, progress=progress, forms=forms), forms)
    raise RequestError("a model given as a config in memory needs params=..., or load_format='dummy'.", "params")


def _from_checkpoint(config: EngineConfig, family: Any, decoder_config: DecoderConfig, scheme: quantization.Scheme | None,
                     checkpoint: Checkpoint, progress: bool) -> Loaded:  # fmt: skip
    names, ignored = family.names(decoder_config), tuple(getattr(family, "IGNORED", ()))
    ignored += TIED if decoder_config.tie else ()
    if config.quantization == "gguf" and isinstance(checkpoint, GGUFCheckpoint):
        checkpoint, plan = quantization.plan_gguf(checkpoint, names)
        return _planned(config, decoder_config, checkpoint, plan, ignored, progress)
    if scheme is None:
        forms = _everywhere(decoder_config, quantization.ON_THE_FLY.get(config.quantization or ""))
        _, _, leaves = abstract_decoder(decoder_config, config.dtype)
        return Loaded(weights.load(checkpoint, leaves, names, progress=progress, ignore=ignored, forms=forms), forms)
    return _planned(config, decoder_config, checkpoint, quantization.plan(checkpoint, scheme, names), ignored, progress)


def _planned(config: EngineConfig, decoder_config: DecoderConfig, checkpoint: Checkpoint, plan: quantization.Plan,
             ignored: tuple[str, ...], progress: bool) -> Loaded:  # fmt: skip
    _, _, leaves = abstract_decoder(decoder_config, config.dtype, plan.forms)
    ignored += plan.ignored
    return Loaded(weights.load(checkpoint, leaves, plan.names, progress=progress, ignore=ignored), plan.forms)


def _everywhere(decoder_config: DecoderConfig, form: Form | None) -> Forms:
    if form is None:
        return NO_FORMS
    return all_products(nnx.eval_shape(lambda: Decoder(decoder_config)), form)
