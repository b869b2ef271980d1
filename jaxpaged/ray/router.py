"""Ray Serve's request router for replicas of an engine. Ray imports this module where requests are routed; nobody else does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from jaxpaged.ray.routing import choose


class PrefixRouter(RequestRouter):
    """Sends a call to the replica that its key belongs to. The key is the call's first argument."""

    def initialize_state(self, spill: int = 8) -> None:
        """spill: requests that a replica may have more than the least busy one before others get its keys."""
        self.spill = spill

    async def choose_replicas(self, candidate_replicas: list[RunningReplica],
                              pending_request: PendingRequest | None = None) -> list[list[RunningReplica]]:  # fmt: skip
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all full: ask again later, not at once
        loads = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        replicas = {one.replica_id: one for one in candidate_replicas}
        groups = choose(_key(pending_request), loads, self.spill, lambda one: one.unique_id, _two)
        return [[replicas[one] for one in group] for group in groups]


def _key(request: PendingRequest | None) -> str:
    key = request.args[0] if request is not None and request.args else ""
    return key if isinstance(key, str) else ""


def _two(everyone: Sequence[Any]) -> list[Any]:
    return random.sample(everyone, min(2, len(everyone)))
