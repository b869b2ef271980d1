"""Applies a journal's records: the same states, plans and batches as the engine had that wrote it. numpy only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from jaxpaged import batch, scheduler
from jaxpaged.batch import Batch, Bucket
from jaxpaged.journal import Aborted, Added, Committed, Failed, Record, Reset, Scheduled, sequences
from jaxpaged.scheduler import Limits, Plan


class Replay:
    """limits, buckets: those of the engine. plans: in flight, the oldest first."""

    def __init__(self, limits: Limits, buckets: Sequence[Bucket]):
        self.state, self.plans, self._buckets = scheduler.initial(limits), deque[Plan](), tuple(buckets)

    def apply(self, record: Record) -> Batch | None:
        """The next state; of Scheduled, the batch of the step, None if there is nothing to compute."""
        match record:
            case Added(request):
                for one in sequences(request):
                    self.state = scheduler.add(self.state, one)
            case Aborted(ids):
                for one in ids:
                    self.state = scheduler.abort(self.state, one)
            case Reset():
                self.state = scheduler.reset_prefix_cache(self.state)
            case Scheduled():
                return self._schedule()
            case Committed():
                self._commit(record)
            case Failed(cache_lost):
                self._fail(cache_lost)
        return None

    def _schedule(self) -> Batch | None:
        self.state, plan = scheduler.schedule(self.state)
        if not len(plan.slots):
            return None
        self.plans.append(plan)
        return batch.build(self.state, plan, batch.choose(self._buckets, plan))

    def _commit(self, record: Committed) -> None:
        self.state, _ = scheduler.commit(self.state, self.plans.popleft(), record.tokens, record.finite)
        for slot, generation in record.ended:
            self.state = scheduler.finish(self.state, slot, generation)

    def _fail(self, cache_lost: bool) -> None:
        while self.plans:
            self.state, _ = scheduler.fail(self.state, self.plans.popleft())
        if cache_lost:
            self.state, _ = scheduler.fail_running(self.state)
