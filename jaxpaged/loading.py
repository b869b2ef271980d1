"""From a checkpoint, a pytree or nothing to the model's leaves on the device, quantised where that is asked for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxpaged import quantization, weights
from jaxpaged.checkpoint import Checkpoint
from jaxpaged.config import EngineConfig
from jaxpaged.gguf_file import GGUFCheckpoint
from jaxpaged.hf_config import HFConfig
from jaxpaged.models import standard
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.quantized import NO_FORMS, Form, Forms, all_products
from jaxpaged.models.spec import DecoderConfig
from jaxpaged.models.standard import Name
from jaxpaged.orbax_checkpoint import OrbaxCheckpoint
from jaxpaged.parallel import Parallel
from jaxpaged.request import RequestError
from jaxpaged.stage import abstract_decoder, local_decoder


class Loaded(NamedTuple):
    """leaves: {dotted path: array} of `runner.abstract_decoder(..., forms)`."""

    leaves: dict[str, jax.Array]
    forms: Forms


def scheme_of(config: EngineConfig, hf: HFConfig, checkpoint: Checkpoint | None) -> quantization.Scheme | None:
    """The scheme of a quantised checkpoint, from its config. RequestError if the user asks for another one."""
    given = hf.get("quantization_config")
    if not given:
        if not (config.quantization == "gguf" and isinstance(checkpoint, (GGUFCheckpoint, OrbaxCheckpoint))):
            _check_not_quantised(config)
        return None
    method = str(given.get("quant_method", "")).replace("_", "-")
    if config.quantization not in (None, method):
        raise RequestError(f"quantization={config.quantization!r}, but the checkpoint is quantised already ({method}); leave "
                           "it out.", "quantization")  # fmt: skip
    return quantization.scheme(given)


def _check_not_quantised(config: EngineConfig) -> None:
    if config.quantization not in (None, *quantization.ON_THE_FLY):
        raise RequestError(f"quantization={config.quantization!r} is a checkpoint's format, and this one is not quantised; "
                           f"leave it out, or quantise it as it is loaded: {', '.join(quantization.ON_THE_FLY)}.",
                           "quantization")  # fmt: skip


def load(config: EngineConfig, family: Any, parallel: Parallel, scheme: quantization.Scheme | None,
         checkpoint: Checkpoint | None, params: Any, progress: bool) -> Loaded:  # fmt: skip
    """family: the model's door. parallel: the model, and where it goes. scheme: how the checkpoint is quantised. params:
    weights in memory instead of a checkpoint."""
    decoder_config = parallel.sharding.config
    if params is None and checkpoint is not None and config.load_format != "dummy":
        p = prepare(config, family, decoder_config, scheme, checkpoint, parallel.local)
        _check_cut(config, parallel, p.forms)
        return Loaded(weights.load(p.checkpoint, p.leaves, p.names, parallel, progress, p.ignored, p.on_the_fly), p.forms)
    form = scheme.form if scheme else quantization.ON_THE_FLY.get(config.quantization or "")
    if params is not None:
        return _from_memory(config, parallel, form, params)
    forms = _everywhere(parallel.local, form)
    _, _, leaves = abstract_decoder(decoder_config, config.dtype)
    if config.load_format == "dummy":
        return Loaded(weights.dummy(leaves, config.seed, parallel, progress, forms), forms)
    raise RequestError("a model given as a config in memory needs params=..., or load_format='dummy'.", "params")


def _from_memory(config: EngineConfig, parallel: Parallel, form: Form | None, params: Any) -> Loaded:
    """A tree of floats, to be quantised in `form` if there is one; or one with quantised products."""
    if forms := weights.forms_of(params):
        _check_quantised(config, forms, "the tree")
        _check_cut(config, parallel, forms)
        _, _, leaves = abstract_decoder(parallel.sharding.config, config.dtype, forms)
        return Loaded(weights.from_tree(params, leaves, parallel), forms)
    forms = _everywhere(parallel.local, form)
    _, _, leaves = abstract_decoder(parallel.sharding.config, config.dtype)
    return Loaded(weights.from_tree(params, leaves, parallel, forms), forms)


class Prepared(NamedTuple):
    """What loading takes: the checkpoint to read, `weights.load`'s arguments, and the forms that the products will have.
    leaves: of the decoder's dtype; on_the_fly: the products that are quantised as they are read."""

    checkpoint: Checkpoint
    leaves: weights.Leaves
    names: Sequence[Name]
    ignored: tuple[str, ...]
    on_the_fly: Forms
    forms: Forms


def prepare(config: EngineConfig, family: Any, decoder_config: DecoderConfig, scheme: quantization.Scheme | None,
            checkpoint: Checkpoint, local: DecoderConfig | None = None) -> Prepared:  # fmt: skip
    """How a checkpoint of any kind is loaded. config: its dtype and quantization are read. local: what each device will run,
    if that is not all of the model: what is quantised as it is loaded is divided so that its groups fit."""
    names, ignored, local = family.names(decoder_config), standard.ignored(family, decoder_config), local or decoder_config
    if isinstance(checkpoint, OrbaxCheckpoint):
        return _from_orbax(config, decoder_config, checkpoint, local)
    if config.quantization == "gguf" and isinstance(checkpoint, GGUFCheckpoint):
        checkpoint, plan = quantization.plan_gguf(checkpoint, names)
    elif scheme is not None:
        plan = quantization.plan(checkpoint, scheme, names)
    else:
        forms = _everywhere(local, quantization.ON_THE_FLY.get(config.quantization or ""))
        _, _, leaves = abstract_decoder(decoder_config, config.dtype)
        return Prepared(checkpoint, leaves, names, ignored, forms, forms)
    _, _, leaves = abstract_decoder(decoder_config, config.dtype, plan.forms)
    return Prepared(checkpoint, leaves, plan.names, ignored + plan.ignored, NO_FORMS, plan.forms)


def _from_orbax(config: EngineConfig, decoder_config: DecoderConfig, checkpoint: OrbaxCheckpoint,
                local: DecoderConfig) -> Prepared:  # fmt: skip
    """Its names are the leaves' paths, and its products are quantised already, if they are."""
    forms = {path: Form(**fields) for path, fields in checkpoint.forms.items()}
    if forms:
        _check_quantised(config, forms, str(checkpoint.folder), checkpoint.about.get("quantization"))
    else:
        _check_not_quantised(config)
    _, _, leaves = abstract_decoder(decoder_config, config.dtype, forms)
    on_the_fly = NO_FORMS if forms else _everywhere(local, quantization.ON_THE_FLY.get(config.quantization or ""))
    return Prepared(checkpoint, leaves, as_they_are(leaves), (), on_the_fly, forms or on_the_fly)


def as_they_are(leaves: Iterable[str]) -> list[Name]:
    """Rules for tensors that are called as the leaves are."""

    def pattern(path: str) -> str:
        number = itertools.count()
        return re.sub(r"\b\d+\b", lambda m: f"{{n{next(number)}}}", path)

    return [Name(p, p) for p in dict.fromkeys(map(pattern, leaves))]


def _check_quantised(config: EngineConfig, forms: Forms, what: str, name: str | None = None) -> None:
    """RequestError if products that are quantised already should be so in another way."""
    kinds = {name} if name else {form.kind for form in forms.values()}
    if config.quantization is not None and config.quantization not in kinds:
        raise RequestError(f"quantization={config.quantization!r}, but {what} is quantised already "
                           f"({', '.join(sorted(kinds))}); leave it out, or convert the original.", "quantization")  # fmt: skip


def _check_cut(config: EngineConfig, parallel: Parallel, forms: Forms) -> None:
    """RequestError, before anything is read, if devices would share a group of quantised numbers."""
    if forms and parallel.sharding.size > 1:
        local_decoder(parallel, config.dtype, forms)


def _everywhere(decoder_config: DecoderConfig, form: Form | None) -> Forms:
    if form is None:
        return NO_FORMS
    return all_products(nnx.eval_shape(lambda: Decoder(decoder_config)), form)
