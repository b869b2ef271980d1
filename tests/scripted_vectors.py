"""A scripted engine that also embeds: every prompt's vector is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from scripted import Reply, scripted_engine

from jaxpaged.batch import Batch, Sampled
from jaxpaged.engine import Engine


class Vectors:
    """A runner's results, and a vector wherever one is asked for."""

    def __init__(self, runner: Any):
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch(self, batch: Batch) -> Sampled:
        sampled = self._runner.dispatch(batch)
        return sampled._replace(pooled=np.ones((2, len(batch.slots), self.embed_dim), np.float32)) if batch.pools else sampled


def scripted_engine_with_vectors(reply: Reply, **options: Any) -> Engine:
    engine = scripted_engine(reply, **options)
    engine.runner = Vectors(engine.runner)
    return engine
