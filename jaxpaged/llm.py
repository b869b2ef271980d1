"""Offline use: `LLM(model).generate(prompts)`. The names, defaults and outputs are vLLM's."""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tqdm import tqdm

from jaxpaged import beam
from jaxpaged.adapter import Adapter, LoRARequest
from jaxpaged.build_replicas import build_replicas
from jaxpaged.config import EngineConfig, without_nothing_asked
from jaxpaged.engine import Engine
from jaxpaged.prompts import ParsedPrompt, parse_prompts
from jaxpaged.replicas import router_of, share_numbers
from jaxpaged.request import (
    BeamSearchParams,
    EmbeddingRequestOutput,
    EngineOutput,
    PoolingParams,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from jaxpaged.scoring import ScoringRequestOutput, parse_pairs, score
from jaxpaged.stepping import outputs_of
from jaxpaged.tokenizer import Tokenizer

LoRA = LoRARequest | str | None | Sequence[LoRARequest | str | None]
"""An adapter or its name, for all prompts or one a prompt."""


class Metric(NamedTuple):
    """A number about the engine: `kind` is "counter" (grows) or "gauge"."""

    name: str
    value: float
    kind: str


class LLM:
    """A language model and the engine that runs it, or with data_parallel_size the engines that share the prompts.

    model: "demo", "demo-gemma3", a Hugging Face id, a folder, a .gguf file, or a Hugging Face config as a dictionary.
    params: weights in memory instead of the checkpoint's: a pytree (nested dictionaries, or an NNX state) with the
      decoder's paths. Everything else: `EngineConfig`'s fields.
    Raises ValueError (RequestError) for what cannot be: it says what was given, what is allowed and what to do.

    Use it as a context manager, or call `close()`, to free the device memory at once. `engine`: the first one.
    """

    def __init__(self, model: str | dict[str, Any] = "demo", *, params: Any = None, use_tqdm: bool = True, **kwargs: Any):
        in_memory = model if isinstance(model, dict) else None
        kwargs = without_nothing_asked(kwargs)
        config = EngineConfig(model="<in memory>" if in_memory is not None else str(model), **kwargs)
        self._all_built = build_replicas(config, in_memory, params, progress=use_tqdm)
        self._built = self._all_built[0]
        self.engines: list[Engine] = [built.engine for built in self._all_built]
        self.engine = self.engines[0]
        share_numbers(self.engines)
        self._router = router_of(self.engines)
        self.config: EngineConfig = self._built.config
        self.memory_plan = self._built.plan
        self._ids = itertools.count()

    # -- generating --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: LoRA = None,
    ) -> list[RequestOutput]:
        """Completes one prompt or a list: strings, lists of token ids, or {"prompt" | "prompt_token_ids", "cache_salt"}.

        sampling_params: one for all, or one a prompt; None: `get_default_sampling_params()`. lora_request: an adapter for all,
        or one a prompt (None: none): a LoRARequest, read when its name is first used, or the name of one that is loaded.
        Outputs are in the order of the prompts. RequestError if any of them cannot be served: then none is run. A request that
        fails while it runs ends with finish_reason "error" and `.error` says why; the others go on.
        """
        parsed = parse_prompts(prompts)
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        each = _one_each("sampling_params", SamplingParams, params, len(parsed))
        each = [p.clone(output_kind=RequestOutputKind.FINAL_ONLY) for p in each]
        return self._run(parsed, each, _priorities(priority, len(parsed)), use_tqdm, lora_request)

    def embed(
        self,
        prompts: Any,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: LoRA = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector a prompt: `output.outputs.embedding`. Prompts and errors are those of `generate`; a prompt may have all
        max_model_len tokens. pooling_params: one for all, or one a prompt; None: the last token's hidden state, length 1."""
        parsed = parse_prompts(prompts)
        params = PoolingParams() if pooling_params is None else pooling_params
        each = _one_each("pooling_params", PoolingParams, params, len(parsed))
        return self._run(parsed, each, _priorities(priority, len(parsed)), use_tqdm, lora_request)

    def score(
        self,
        data_1: Any,
        data_2: Any,
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike texts are: `output.outputs.score`, the cosine of their vectors (as of `embed`). data_1: a prompt for all of
        data_2, or as many as data_2 has."""
        parsed, pairs = parse_pairs(data_1, data_2)
        each = _one_each("pooling_params", PoolingParams, pooling_params or PoolingParams(), len(parsed))
        vectors = self._run(parsed, each, _priorities(None, len(parsed)), use_tqdm, lora_request)
        return [score(vectors[i], vectors[j]) for i, j in pairs]

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        lora_request: LoRA = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"}) or a list of conversations, with the model's chat
        template."""
        tokenizer = self.get_tokenizer()
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = []
        for conversation in conversations:
            options = {"add_generation_prompt": add_generation_prompt, "tools": tools,
                       "continue_final_message": continue_final_message,
                       "chat_template": chat_template or self.config.chat_template}  # fmt: skip
            options |= chat_template_kwargs or {}
            text = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(conversation, tokenize=True, **options)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority, lora_request=lora_request)

    def beam_search(
        self, prompts: Any, params: BeamSearchParams, *, lora_request: LoRARequest | str | None = None
    ) -> list[beam.BeamSearchOutput]:
        """The `beam_width` most probable continuations of each prompt that beam search finds."""
        if 2 * params.beam_width > self.config.max_logprobs:
            raise RequestError(
                f"beam_width={params.beam_width} needs {2 * params.beam_width} logprobs a token, max_logprobs is "
                f"{self.config.max_logprobs}; start the engine with max_logprobs={2 * params.beam_width}.", "beam_width",
            )  # fmt: skip
        return [self._beam_search(prompt, params, lora_request) for prompt in parse_prompts(prompts)]

    def _beam_search(self, prompt: ParsedPrompt, params: BeamSearchParams, lora_request: LoRA) -> beam.BeamSearchOutput:
        tokenizer = self.engine.tokenizer
        ids = prompt.content
        if isinstance(ids, str):
            ids = self.get_tokenizer().encode(ids)
        output = beam.beam_search(
            lambda prompts, step: self.generate(prompts, step, use_tqdm=False, lora_request=lora_request),
            ids, params, self.engine.eos_ids,
        )  # fmt: skip
        if tokenizer is not None:
            texts = [tokenizer.decode(s.tokens, skip_special_tokens=params.skip_special_tokens) for s in output.sequences]
            output.sequences = [replace(s, text=text) for s, text in zip(output.sequences, texts)]
        return output

    def _run(self, prompts: list[ParsedPrompt], params: Sequence[Any], priority: Sequence[int], use_tqdm: bool,
             lora_request: LoRA = None) -> list[Any]:  # fmt: skip
        loras = self._adapters(lora_request, len(prompts))
        ids = [str(next(self._ids)) for _ in prompts]
        outputs: dict[str, EngineOutput] = {}
        bar = tqdm(total=len(ids), desc="Processed prompts", disable=not use_tqdm)
        start, tokens = time.perf_counter(), 0
        try:
            for request_id, prompt, p, prio, adapter in zip(ids, prompts, params, priority, loras):
                self._submit(request_id, prompt, p, prio, adapter)
            with contextlib.closing(outputs_of(self.engines)) as coming:
                for output in coming:
                    outputs[output.request_id] = output
                    tokens += _num_tokens(output)
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.1f} tokens/s", refresh=False)
                    bar.update()
        except BaseException:  # also Ctrl-C: nothing of this call may stay behind
            self._abort_all(ids)
            raise
        finally:
            bar.close()
            for request_id in ids:
                self._router.ended(request_id)
        return [outputs[request_id] for request_id in ids]

    def _submit(self, request_id: str, prompt: ParsedPrompt, params: Any, priority: int, adapter: Adapter | None) -> None:
        route = self._router.route(prompt.content, params, prompt.cache_salt, adapter)
        engine = self.engines[route.engine]
        engine.submit(request_id, prompt.content, params, priority, prompt.cache_salt, prompt.text, adapter)
        self._router.began(request_id, route)

    def _abort_all(self, ids: list[str]) -> None:
        for engine in self.engines:
            for request_id in ids:
                engine.abort(request_id)
            while engine.has_work:
                engine.step()

    # -- LoRA adapters -----------------------------------------------------------------------------------------------

    def add_lora(self, lora_request: LoRARequest, replace: bool = False) -> bool:
        """Reads an adapter, so that requests may name it. replace: in the place of the one of that name, for requests from now
        on. True: vLLM's answer for success. RequestError if it does not fit the model, or the name is taken."""
        self._built.loras.add(lora_request, replace)
        return True

    def remove_lora(self, lora_name: str) -> bool:
        """Forgets an adapter; requests that have it go on with it. RequestError if there is none of that name."""
        self._built.loras.remove(lora_name)
        return True

    def list_loras(self) -> list[str]:
        return [adapter.name for adapter in self._built.loras.loaded]

    def _adapters(self, given: LoRA, count: int) -> list[Adapter | None]:
        each: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * count
        if len(each) != count:
            raise RequestError(f"{count} prompts but {len(each)} lora_requests; give one, or one a prompt.", "lora_request")
        for request in each:
            if request is not None and not isinstance(request, (LoRARequest, str)):
                raise RequestError(f"lora_request must be a LoRARequest or the name of a loaded adapter, got "
                                   f"{type(request).__name__}.", "lora_request")  # fmt: skip
        return [self._built.loras.find(request) for request in each]

    # -- around it ---------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise RequestError("this engine has no tokenizer; work with token ids, or name one with tokenizer=...")
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """vLLM's defaults, changed by the model's generation_config.json (unless generation_config="vllm")."""
        return SamplingParams(**self._built.sampling_defaults)

    def get_metrics(self) -> list[Metric]:
        """Counters and gauges of the engine, by vLLM's names where it has them; of several engines, added up."""
        each, stats = [engine.counters for engine in self.engines], [engine.stats() for engine in self.engines]
        count = lambda name: sum(getattr(one, name) for one in each)
        stat = lambda name: sum(getattr(one, name) for one in stats)
        finished = sum((collections.Counter(one.finished) for one in each), collections.Counter[str]())
        counters = {
            "prompt_tokens": count("prompt_tokens"),
            "generation_tokens": count("generated_tokens"),
            "computed_tokens": count("computed_tokens"),
            "engine_steps": count("steps"),
            "failed_steps": count("failed_steps"),
            "num_preemptions": stat("num_preemptions"),
            "prefix_cache_queries": stat("prefix_queries"),
            "prefix_cache_hits": stat("prefix_hits"),
            "compilations": sum(built.runner.num_compilations for built in self._all_built),
            "host_seconds": count("host_time") - count("wait_time"),
            "wait_seconds": count("wait_time"),
            **{f"request_success_{reason}": number for reason, number in finished.items()},
        }
        usable = sum(engine.limits.num_pages - 1 for engine in self.engines)
        gauges = {
            "num_requests_running": stat("num_running"),
            "num_requests_waiting": stat("num_waiting"),
            "kv_cache_usage_perc": stat("num_held_pages") / usable,
            "kv_pages_total": usable,
            "kv_pages_held": stat("num_held_pages"),
            "kv_pages_cached": stat("num_cached_pages"),
            "kv_pages_peak": count("peak_pages"),
            "startup_seconds": sum(self._built.seconds.values()),
        }
        return [Metric(name, float(value), "counter") for name, value in counters.items()] + [
            Metric(name, float(value), "gauge") for name, value in gauges.items()
        ]

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages. True: vLLM's answer for success."""
        for engine in self.engines:
            engine.reset_prefix_cache()
            engine.step()
        self._router.forget()
        return True

    def get_world_size(self) -> int:
        """Devices in use."""
        config = self.config
        return config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size

    def close(self) -> None:
        """Frees the device memory. The object cannot be used afterwards."""
        for engine in self.engines:
            engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _one_each(name: str, kind: type, given: Any, count: int) -> list[Any]:
    """Parameters for each of `count` prompts, from a list or one for all."""
    each = list(given) if isinstance(given, Iterable) else [given] * count
    if len(each) != count:
        raise RequestError(f"{count} prompts but {len(each)} {name}; give one, or one a prompt.", name)
    for params in each:
        if not isinstance(params, kind):
            raise RequestError(f"{name} must be {kind.__name__}, got {type(params).__name__}.", name)
    return each


def _priorities(given: Sequence[int] | None, count: int) -> list[int]:
    each = [0] * count if given is None else list(given)
    if len(each) != count:
        raise RequestError(f"{count} prompts but {len(each)} priorities; give one a prompt.", "priority")
    return each


def _num_tokens(output: EngineOutput) -> int:
    """What counts for the progress bar: tokens generated, or embedded."""
    if isinstance(output, EmbeddingRequestOutput):
        return len(output.prompt_token_ids)
    return sum(len(completion.token_ids) for completion in output.outputs)
