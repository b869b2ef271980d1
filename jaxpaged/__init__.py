"""jaxpaged: vLLM re-thought for JAX. Names are imported when first used, so `import jaxpaged` does not import jax."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LLM": "jaxpaged.llm",
    "LoRARequest": "jaxpaged.adapter",
    "EngineConfig": "jaxpaged.config",
    "BeamSearchParams": "jaxpaged.request",
    "CompletionOutput": "jaxpaged.request",
    "EmbeddingOutput": "jaxpaged.request",
    "EmbeddingRequestOutput": "jaxpaged.request",
    "Logprob": "jaxpaged.request",
    "PoolingParams": "jaxpaged.request",
    "RequestError": "jaxpaged.request",
    "RequestOutput": "jaxpaged.request",
    "RequestOutputKind": "jaxpaged.request",
    "SamplingParams": "jaxpaged.request",
    "ScoringOutput": "jaxpaged.scoring",
    "ScoringRequestOutput": "jaxpaged.scoring",
    "TextPrompt": "jaxpaged.prompts",
    "TokensPrompt": "jaxpaged.prompts",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from jaxpaged.adapter import LoRARequest as LoRARequest
    from jaxpaged.config import EngineConfig as EngineConfig
    from jaxpaged.llm import LLM as LLM
    from jaxpaged.prompts import TextPrompt as TextPrompt
    from jaxpaged.prompts import TokensPrompt as TokensPrompt
    from jaxpaged.request import BeamSearchParams as BeamSearchParams
    from jaxpaged.request import CompletionOutput as CompletionOutput
    from jaxpaged.request import EmbeddingOutput as EmbeddingOutput
    from jaxpaged.request import EmbeddingRequestOutput as EmbeddingRequestOutput
    from jaxpaged.request import Logprob as Logprob
    from jaxpaged.request import PoolingParams as PoolingParams
    from jaxpaged.request import RequestError as RequestError
    from jaxpaged.request import RequestOutput as RequestOutput
    from jaxpaged.request import RequestOutputKind as RequestOutputKind
    from jaxpaged.request import SamplingParams as SamplingParams
    from jaxpaged.scoring import ScoringOutput as ScoringOutput
    from jaxpaged.scoring import ScoringRequestOutput as ScoringRequestOutput


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
