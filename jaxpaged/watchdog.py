"""Says so when a step hangs: a thread that looks at the engine's clock."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from typing import Any

from jaxpaged.async_engine import AsyncEngine

log = logging.getLogger(__name__)


class Watchdog:
    """After `timeout` seconds in one step: stacks of all threads on standard error, the scheduler's state in the log, once a
    step. `cause` says what is wrong as long as it is."""

    def __init__(self, engine: AsyncEngine, timeout: float):
        self.engine, self.timeout = engine, timeout
        self._stop = threading.Event()
        self._reported: float | None = None  # when the step began that has been reported
        self._thread = threading.Thread(target=self._watch, name="jaxpaged-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    @property
    def cause(self) -> str | None:
        began = self.engine.step_began
        seconds = 0.0 if began is None else time.monotonic() - began
        return f"a step has been running for {seconds:.0f} s" if seconds > self.timeout else None

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 4)):
            began = self.engine.step_began
            if self.cause is not None and began != self._reported:
                self._reported = began
                self._report()

    def _report(self) -> None:
        log.error("%s: it hangs. State of the scheduler: %s. Stacks of all threads:", self.cause, _state(self.engine))
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


def _state(engine: AsyncEngine) -> dict[str, Any]:
    """Read while the engine's thread stands still inside the step; a few of many requests."""
    state = engine.engine.state
    seats = state.seats
    requests: Any = state.requests.read()
    counts = lambda slot: {
        name: int(getattr(seats, name)[slot]) for name in ("num_prompt", "num_tokens", "num_computed", "num_pages")
    }
    running = {requests[slot].id: counts(slot) for slot in seats.active.nonzero()[0][:32].tolist()}
    pool = state.pool
    return {"running": running, "num_running": int(seats.active.sum()), "num_waiting": len(state.waiting),
            "pages": {"held": pool.num_held, "cached": pool.num_cached, "free": pool.num_free}}  # fmt: skip
