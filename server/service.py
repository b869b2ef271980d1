"""What every endpoint needs: the engine, its tokenizer, the model's names, the server's options and defaults."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxpaged.adapter import Adapter, LoRARequest
from jaxpaged.async_engine import Stream
from jaxpaged.loras import Loras
from jaxpaged.replicas import FrontDoor, front_door
from jaxpaged.request import RequestError, SamplingParams
from jaxpaged.tokenizer import LONG_TEXT, Tokenizer
from jaxpaged.watchdog import Watchdog
from jaxpaged_server.engine_metrics import EngineMetrics
from jaxpaged_server.fields import Decoder
from jaxpaged_server.metrics import Metrics
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.output_log import OutputLog
from jaxpaged_server.sse import Watch
from jaxpaged_server.summary import Summary
from jaxpaged_server.tracing import Tracing

log = logging.getLogger(__name__)

CACHE_CONFIG = ("block_size", "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override",
                "enable_prefix_caching", "dtype")  # fmt: skip  # fields of EngineConfig that cache_config_info shows
MAX_TOKEN_BYTES = 1024  # no tokenizer has longer tokens: a text of more bytes than that a token cannot fit


@dataclass(frozen=True)
class Asked:
    """Who asks: the request's id as the client knows it, and the caller's trace context."""

    request_id: str
    trace_headers: Mapping[str, str] = field(default_factory=dict)


class Service:
    """An engine, or several behind one front door, as endpoints see it.

    names: what clients may call the model; the first one stands in answers. defaults: sampling parameters of requests that
    do not say (SamplingParams' names). chat_template: instead of the model's. cache_config: what metrics say about the cache.
    num_compilations: programs that an engine has compiled since the start, by its number. loras: the adapters, which clients
    ask for as models.
    """

    def __init__(self, engine: FrontDoor, options: ServerOptions, names: Sequence[str],
                 defaults: Mapping[str, Any] | None = None, chat_template: str | None = None,
                 cache_config: Mapping[str, str] | None = None, num_compilations: Callable[[int], int] = lambda engine: 0,
                 loras: Loras | None = None):  # fmt: skip
        self.engine, self.options, self.loras = engine, options, loras or Loras(None)
        self.names = tuple(options.served_model_name or names)
        self.defaults = {**(defaults or {}), **options.generation_defaults}
        self.chat_template = chat_template
        self.decode = Decoder(options.strict_fields)
        self.watch = Watch(options.slow_client_timeout)
        self.created = int(time.time())
        self.watchdog: Watchdog | None = None
        self.metrics = Metrics([self._metrics_of(i, cache_config or {}, num_compilations) for i in range(len(engine.engines))])
        self.tracing = Tracing(options.otlp_traces_endpoint) if options.otlp_traces_endpoint else None
        for one, metrics in zip(engine.engines, self.metrics.engines):
            one.observers += [metrics, Summary(metrics)]
            one.observers += [self.tracing] if self.tracing else []
            one.observers += [OutputLog(options.max_log_len)] if options.enable_log_outputs else []
            one.max_num_queued_reqs = options.max_num_queued_reqs
        self._numbers = itertools.count()

    def _metrics_of(self, i: int, cache_config: Mapping[str, str], num_compilations: Callable[[int], int]) -> EngineMetrics:
        engine = self.engine.engines[i].engine
        limits = engine.limits
        return EngineMetrics(model_name=self.names[0], max_model_len=limits.max_model_len, num_pages=limits.num_pages,
                             cache_config={**cache_config, "num_gpu_blocks": str(limits.num_pages)}, counters=engine.counters,
                             num_compilations=lambda: num_compilations(i), prefix=self.options.metrics_prefix,
                             engine=i)  # fmt: skip

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.engine.tokenizer

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """The texts of the tokenizer's special tokens."""
        return frozenset(self.tokenizer.token(i) for i in self.tokenizer.special_ids) if self.tokenizer else frozenset()

    @property
    def max_model_len(self) -> int:
        return self.engine.engine.limits.max_model_len

    def model(self, asked: str | None) -> str:
        """The name for the answer: what was asked for. RequestError (404) for a model that is not served."""
        if asked is None or asked == "":
            return self.names[0]
        known = (*self.names, *(adapter.name for adapter in self.loras.loaded))
        if asked not in known:
            raise RequestError(f"The model `{asked[:200]}` does not exist; this server has {', '.join(known)}.", "model", 404)
        return asked

    def adapter(self, asked: str | None) -> Adapter | None:
        """The LoRA adapter that a model's name stands for."""
        return None if not asked or asked in self.names else self.loras.find(self.model(asked))

    def load_adapter(self, request: LoRARequest, replace: bool = False) -> None:
        """Reads a LoRA adapter, which is a model of its own then. RequestError if it cannot be, or has the model's name."""
        if request.lora_name in self.names:
            raise RequestError(f"lora_name {request.lora_name!r:.200} is the name of the model itself; take another one.",
                               "lora_name")  # fmt: skip
        self.loras.add(request, replace)

    def need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this server runs without one; send token ids.", "prompt")
        return self.tokenizer

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; 400 at once if it is far too long."""
        tokenizer = self.need_tokenizer("text")
        if len(text) > MAX_TOKEN_BYTES * self.max_model_len:
            raise too_long(f"at least {len(text) // MAX_TOKEN_BYTES:,}", self.max_model_len)
        if len(text) <= LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)

    def submit(self, asked: Asked, ids: Sequence[int], params: Any, *, text: str | None = None, priority: int = 0,
               cache_salt: str = "", model: str | None = None) -> Stream:  # fmt: skip
        """Hands a prompt to the engine. model: what the client calls it. RequestError if it cannot be served; 400 in OpenAI's
        words if it is too long."""
        if isinstance(params, SamplingParams):
            _check_length(len(ids), params.max_tokens, self.max_model_len)
        if not -(2**63) <= priority < 2**63:
            raise RequestError(f"priority must be a 64-bit integer, got {priority}.", "priority")
        own = f"{asked.request_id}-{next(self._numbers)}"  # a client may send the same id twice; the engine's are unique
        stream = self.engine.submit(own, ids, params, priority=priority, cache_salt=cache_salt, prompt_text=text,
                                    adapter=self.adapter(model), trace_headers=asked.trace_headers)  # fmt: skip
        if self.options.enable_log_requests:
            log.info("received %s: %d prompt tokens, %s%s", own, len(ids), params,
                     "" if text is None else f", prompt {text[: self.options.max_log_len]!r}")  # fmt: skip
        return stream

    def abort(self, request_ids: Sequence[str] | None) -> int:
        """Aborts requests by the ids that clients know; None: all of them. Returns how many there were."""
        public, wanted = (lambda own: own.rpartition("-")[0]), set(request_ids or ())
        own = [i for i in self.engine.streams if request_ids is None or public(i) in wanted]
        for i in own:
            self.engine.abort(i)
        return len(own)

    # -- life --------------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engines' threads, the watchdog and the summary in the log, from the start of the server to its end."""
        self.engine.start()
        if self.options.watchdog_timeout:
            self.watchdog = Watchdog(self.engine, self.options.watchdog_timeout)
            self.watchdog.start()
        try:
            yield
        finally:
            await self.engine.drain(self.options.shutdown_timeout)
            if self.watchdog is not None:
                self.watchdog.stop()
            await self.engine.close()
            if self.tracing is not None:
                await asyncio.to_thread(self.tracing.close)

    def trouble(self) -> str | None:
        """Why requests cannot be served now; None if they can."""
        if self.engine.error is not None:
            return f"the engine has stopped: {self.engine.error!r}"
        if not self.engine.is_running:
            return "the engine is not running"
        return self.watchdog.cause if self.watchdog is not None else None


def _check_length(num_prompt: int, max_tokens: int | None, limit: int) -> None:
    """RequestError in OpenAI's words, for which clients look."""
    if num_prompt >= limit:
        raise too_long(f"{num_prompt:,}", limit)
    if max_tokens is not None and num_prompt + max_tokens > limit:
        raise RequestError(
            f"This model's maximum context length is {limit} tokens. However, you requested {num_prompt + max_tokens:,}: "
            f"{num_prompt:,} in the prompt and {max_tokens:,} for the output; ask for at most {limit - num_prompt:,} tokens of "
            "output, or leave the limit out for as many as fit.", "max_tokens",
        )  # fmt: skip


def too_long(count: str, limit: int) -> RequestError:
    """OpenAI's words: clients look for them."""
    return RequestError(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {count} input tokens, and the "
        f"output needs at least one; shorten the prompt to at most {limit - 1} tokens.", "input_tokens",
    )  # fmt: skip


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def lora_modules(given: Sequence[str]) -> list[LoRARequest]:
    """vLLM's two forms: name=path, and {"name": ..., "path": ..., "base_model_name": ...}. RequestError for others."""
    found = []
    for i, one in enumerate(given, 1):
        name, _, path = one.partition("=")
        if one.lstrip().startswith("{"):
            try:
                entry = json.loads(one)
            except ValueError as error:
                raise RequestError(f"lora_modules: {one!r} is no JSON ({error}).", "lora_modules") from None
            name, path = entry.get("name"), entry.get("path")
        if not name or not path:
            raise RequestError(f"lora_modules must be name=path, or JSON with name and path; got {one!r}.", "lora_modules")
        found.append(LoRARequest(name, i, path))
    return found


def open_service(built: Sequence[Any], options: ServerOptions) -> Service:
    """The service of `jaxpaged.build.Built`s, which are alike: the adapters are those of the first."""
    first, compiled_at_start = built[0], [one.runner.num_compilations for one in built]
    cache = {name: str(getattr(first.config, name)) for name in CACHE_CONFIG}
    requests = lora_modules(options.lora_modules)
    service = Service(
        front_door([one.engine for one in built]), options, [first.config.model], first.sampling_defaults,
        first.config.chat_template, cache, lambda i: built[i].runner.num_compilations - compiled_at_start[i], first.loras,
    )  # fmt: skip
    for request in requests:
        service.load_adapter(request)
    return service
