"""EngineConfig: everything an engine can be told, with vLLM's names where vLLM has them. Frozen and checked.

"auto" values are turned into numbers by `resolve`, as a new value, once the model and the device are known.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from jaxpaged.request import RequestError, refuse_unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
QUANTIZATIONS = (None, "int8", "int4", "fp8", "gptq", "awq", "compressed-tensors", "mxfp4", "gguf")
CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "int8")
POLICIES = ("fcfs", "priority")
ALL_TO_ALL = ("allgather_reducescatter", "ragged_all_to_all")
# Arguments of vLLM's LLM that this version does not have, and the values that ask for nothing: those are taken, so that a
# script runs after changing the import; any other value is refused by name.
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "tokenizer_mode": ("auto", "hf", "slow"), "tokenizer_revision": (None,), "runner": ("auto", "generate"),
    "convert": ("auto", "none"), "cpu_offload_gb": (0,),
    "swap_space": (0, 4), "fully_sharded_loras": (False,), "enable_sleep_mode": (False,),
    "distributed_executor_backend": (None, "mp", "uni"), "disable_custom_all_reduce": (False, True),
    "disable_sliding_window": (False,), "speculative_config": (None,), "compilation_config": (None,),
    "structured_outputs_config": (None,), "logits_processors": (None,), "logprobs_mode": ("raw_logprobs",),
    "download_dir": (None,), "allowed_local_media_path": ("",), "limit_mm_per_prompt": (None,), "attention_backend": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """How to build an engine.

    model: "demo", "demo-gemma3", a Hugging Face id, a folder or a .gguf file. tokenizer: another place for it.
    dtype: of weights, activations and cache; "auto" is float32 on CPU (where XLA's bfloat16 is 10 times slower) and
      bfloat16 on GPU.
    max_model_len: longest sequence in tokens, prompt and output; "auto" is the model's own limit.
    block_size: tokens a page ("auto": 16 on CPU, 32 on GPU). num_gpu_blocks_override: exactly so many pages.
    quantization: "int8", "int4" or "fp8" quantise the layers' products as they are loaded; the name of a checkpoint's own
      format changes nothing (None finds it out), but is checked. Activations stay in `dtype`.
    kv_cache_dtype: of keys and values: "auto" is `dtype`; "fp8" (e4m3) and "int8" keep one byte a number and a scale for each
      token and head. disable_hybrid_kv_cache_manager: keep all of a sequence also for layers that see a window only.
    kv_cache_memory_bytes: exactly so much memory for the cache; else what gpu_memory_utilization leaves.
    max_num_seqs: sequences that run at once. max_num_batched_tokens: tokens a step.
    long_prefill_token_threshold: longest chunk of one prompt a step; 0: no limit but the budget.
    async_scheduling: dispatch a step before the last one's tokens are read.
    enable_lora: requests may name LoRA adapters; max_loras of them are on the device at once, of rank max_lora_rank at most,
      max_cpu_loras in host memory (None: as many as are loaded).
    enforce_eager: compile each program when it is first needed instead of all at the start.
    hf_overrides: changes to the model's config.json. generation_config: "auto" takes default sampling parameters from
      the model's generation_config.json, "vllm" takes none.
    kernel_backend: of pallas_kernels: "auto" (for each operation the best one that can), "triton", "mosaic_gpu",
      "reference". debug_checks: each step also checks page ids and lengths on the device: slow, for tests.
    compilation_cache_dir: where compiled programs are kept ("auto": the user's cache folder; None: nowhere).
    tensor_parallel_size: devices that share each layer. pipeline_parallel_size: groups of them that have some of the layers
      each. data_parallel_size: engines that have all of that each, and share the requests.
    enable_expert_parallel: the devices of a tensor-parallel group have some of the experts each, and not some of each expert.
      all2all_backend: how tokens of large batches get to them: "allgather_reducescatter" shows all tokens to all devices and
      adds up what each makes of them; "ragged_all_to_all" sends each to the devices that have its experts.
    """

    model: str = "demo"
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    seed: int = 0
    load_format: str = "auto"
    revision: str | None = None
    hf_token: str | None = None
    hf_overrides: dict[str, Any] | None = None
    generation_config: str = "auto"
    chat_template: str | None = None
    max_model_len: int | str | None = "auto"
    block_size: int | str = "auto"
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    disable_hybrid_kv_cache_manager: bool = False
    max_num_seqs: int | str = "auto"
    max_num_batched_tokens: int | str = "auto"
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    scheduling_policy: str = "fcfs"
    async_scheduling: bool = True
    max_logprobs: int = 20
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    enforce_eager: bool = False
    kernel_backend: str = "auto"
    debug_checks: bool = False
    compilation_cache_dir: str | None = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    all2all_backend: str = "allgather_reducescatter"
    trust_remote_code: bool = False
    disable_log_stats: bool = True

    def __new__(cls, *args: Any, **kwargs: Any):
        refuse_unknown("the engine", kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_model_len", _length(self.max_model_len))
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, CACHE_DTYPES)
        _one_of("quantization", self.quantization, QUANTIZATIONS)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("scheduling_policy", self.scheduling_policy, POLICIES)
        _one_of("generation_config", self.generation_config, ("auto", "vllm"))
        _one_of("all2all_backend", self.all2all_backend, ALL_TO_ALL)
        for name in ("max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            _positive(name, getattr(self, name), auto=True)
        for name in ("max_loras", "max_lora_rank", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            _positive(name, getattr(self, name))
        for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override", "max_cpu_loras"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise RequestError(f"gpu_memory_utilization must be a number in (0, 1], got {share!r}.", "gpu_memory_utilization")
        for name in ("max_logprobs", "long_prefill_token_threshold"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise RequestError(f"{name} must be an integer >= 0, got {value!r}.", name)
        self._check_not_yet()

    def _check_not_yet(self) -> None:
        if self.all2all_backend != ALL_TO_ALL[0] and not self.enable_expert_parallel:
            raise RequestError(f"all2all_backend={self.all2all_backend!r} is about experts on devices of their own; add "
                               "enable_expert_parallel=True, or leave it out.", "all2all_backend")  # fmt: skip
        if self.trust_remote_code:
            raise RequestError("trust_remote_code=True is refused: no code of a checkpoint is ever run.")
        if not self.enable_chunked_prefill:
            raise RequestError("enable_chunked_prefill=False is not supported: prompts are always read in chunks; "
                               "raise max_num_batched_tokens to read a whole prompt in one step.")  # fmt: skip

    @property
    def num_loras(self) -> int:
        """On the device at once."""
        return self.max_loras if self.enable_lora else 0

    def replace(self, **changes: Any) -> EngineConfig:
        return replace(self, **changes)

    def resolve(self, platform: str, model_max_len: int) -> EngineConfig:
        """A config without "auto", for a device platform ("cpu", "gpu") and the model's longest sequence.

        RequestError if max_model_len is more than the model was made for."""
        cpu = platform == "cpu"
        wanted = _auto(self.max_model_len, model_max_len)
        if wanted > model_max_len:
            raise RequestError(f"max_model_len={wanted} is more than the {model_max_len} positions of this model; lower "
                               "it, or say otherwise with hf_overrides={'max_position_embeddings': ...}.")  # fmt: skip
        if self.max_model_len == "auto" and cpu:
            wanted = min(model_max_len, 8192)
        seqs = _auto(self.max_num_seqs, 32 if cpu else 256)
        return self.replace(
            dtype=("float32" if cpu else "bfloat16") if self.dtype == "auto" else self.dtype,
            max_model_len=wanted,
            block_size=_auto(self.block_size, 16 if cpu else 32),
            max_num_seqs=seqs,
            max_num_batched_tokens=max(_auto(self.max_num_batched_tokens, 512 if cpu else 8192), seqs),
        )


def without_nothing_asked(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` less those of NOTHING_ASKED; RequestError for one of them that asks for something."""
    for name in arguments.keys() & NOTHING_ASKED.keys():
        if arguments[name] not in NOTHING_ASKED[name]:
            allowed = " or ".join(map(repr, NOTHING_ASKED[name]))
            raise RequestError(f"{name}={arguments[name]!r} is not supported by this version; leave it out ({allowed}).", name)
    return {name: value for name, value in arguments.items() if name not in NOTHING_ASKED}


def _auto(value: int | str | None, default: int) -> int:
    return default if value == "auto" or value is None else int(value)


def _length(value: int | str | None) -> int | str:
    """vLLM's forms of a length: None, -1 and "auto"; 4096; "4k" = 4,000; "4K" = 4,096."""
    if value is None or value == -1 or value == "auto":
        return "auto"
    if isinstance(value, str):
        number, factor = value[:-1], {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(value[-1:], 0)
        try:
            return int(float(number) * factor) if factor else int(value)
        except (ValueError, OverflowError):  # "infk" is a number, but no length
            raise RequestError(f'max_model_len must be a number of tokens such as 4096, "4k" or "auto", got {value!r}.',
                               "max_model_len") from None  # fmt: skip
    return value


def _one_of(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.", name)


def _positive(name: str, value: Any, auto: bool = False) -> None:
    if auto and value == "auto":
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name} must be a positive integer{' or auto' if auto else ''}, got {value!r}.", name)
