"""Sizes: how many replicas, what each may take, how much of a machine it gets. Frozen and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from jaxpaged.config import EngineConfig
from jaxpaged.request import RequestError, refuse_unknown

DEFAULT_ONGOING = 64  # requests a replica, where max_num_seqs does not say
LEAST = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 0, "max_ongoing_requests": 1, "max_queued_requests": -1,
         "upscale_delay_s": 0, "downscale_delay_s": 0, "num_cpus": 0, "num_gpus": 0, "num_fronts": 1, "spill": 0,
         "prefix_length": 1, "retries": 0}  # fmt: skip  # the others must be above 0


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
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name in LEAST:
                at_least(LEAST[field.name], field.name, value, whole=str(field.type).startswith("int"))
            elif not (_is_number(value) and value > 0):
                raise RequestError(f"{field.name} must be a number above 0, got {value!r}.", field.name)
        if self.max_queued_requests == 0:
            raise RequestError("max_queued_requests must be -1 (no limit) or an integer >= 1, got 0.", "max_queued_requests")
        if self.min_replicas > self.max_replicas:
            raise RequestError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}; raise "
                               "max_replicas.", "min_replicas")  # fmt: skip
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


def at_least(least: int, name: str, value: Any, whole: bool = False) -> None:
    """RequestError for anything but a number (whole: an integer) that is not below `least`."""
    if not _is_number(value) or value < least or (whole and not isinstance(value, int)):
        raise RequestError(f"{name} must be {'an integer' if whole else 'a number'} >= {least}, got {value!r}.", name)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
