"""Sizes: how many replicas, what each may take, how much of a machine it gets. Frozen and checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError, refuse_unknown

DEFAULT_ONGOING = 64  # requests a replica, where max_num_seqs does not say


@dataclass(frozen=True)
class Sizes:
    """min_replicas, max_replicas: Ray adds and takes away replicas between them, so that each has target_ongoing_requests
      (None: as many as max_num_seqs). initial_replicas: at the start (None: min_replicas).
    max_ongoing_requests: that a replica is given at once (None: twice the target); more wait in the front end.
      max_queued_requests: that may wait there; more get 503 (-1: no limit).
    upscale_delay_s, downscale_delay_s: how long it must have been too much, or too little.
    num_cpus, num_gpus: of a replica. num_gpus None: one a device of the engine, if the cluster has GPUs now, else none.
    num_fronts: processes that read requests and pass answers on; one does for some thousand pieces a second.
    spill: requests that a prompt's replica may have more than the least busy one (None: half the target).
    prefix_length: characters at the beginning of a prompt that decide which replica it belongs to.
    retries: of a request whose replica has gone before anything of the answer was sent.
    health_check_period_s: how often Ray asks a replica whether it can serve.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    initial_replicas: int | None = None
    target_ongoing_requests: float | None = None
    max_ongoing_requests: int | None = None
    max_queued_requests: int = -1
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    num_cpus: float = 1.0
    num_gpus: float | None = None
    num_fronts: int = 1
    spill: int | None = None
    prefix_length: int = 1024
    retries: int = 2
    health_check_period_s: float = 5.0

    def __new__(cls, *args: Any, **kwargs: Any):
        refuse_unknown("the deployment", kwargs, [f.name for f in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("max_replicas", "num_fronts", "prefix_length"):
            _at_least(1, name, getattr(self, name))
        for name in ("min_replicas", "retries", "upscale_delay_s", "downscale_delay_s", "num_cpus"):
            _at_least(0, name, getattr(self, name))
        for name, least in (("initial_replicas", 0), ("max_ongoing_requests", 1), ("num_gpus", 0), ("spill", 0)):
            if getattr(self, name) is not None:
                _at_least(least, name, getattr(self, name))
        if self.min_replicas > self.max_replicas:
            raise RequestError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}; raise "
                               "max_replicas.", "min_replicas")  # fmt: skip
        for name in ("target_ongoing_requests", "health_check_period_s"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise RequestError(f"{name} must be a number above 0, got {value!r}.", name)
        if self.max_ongoing_requests is not None and self.max_ongoing_requests < (self.target_ongoing_requests or 0):
            raise RequestError(f"max_ongoing_requests={self.max_ongoing_requests} is less than target_ongoing_requests="
                               f"{self.target_ongoing_requests}, so no replica would ever be added; raise it.",
                               "max_ongoing_requests")  # fmt: skip

    def target(self, config: EngineConfig) -> float:
        """Requests that each replica is to have."""
        seqs = config.max_num_seqs if isinstance(config.max_num_seqs, int) else DEFAULT_ONGOING
        given = self.target_ongoing_requests
        return given if given is not None else min(seqs, self.max_ongoing_requests or seqs)

    def most(self, config: EngineConfig) -> int:
        return self.max_ongoing_requests or max(1, int(2 * self.target(config)))

    def most_ahead(self, config: EngineConfig) -> int:
        return self.spill if self.spill is not None else max(1, int(self.target(config) / 2))


def _at_least(least: int, name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} must be a number >= {least}, got {value!r}.", name)
