"""`jaxpaged serve` in several processes: rank 0 serves HTTP, the others follow it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from typing import Any

from jaxpaged import cluster
from jaxpaged.cluster import ClusterError, Member
from jaxpaged.config import EngineConfig
from jaxpaged.follower import Follower
from jaxpaged.leader import Leader, Shared
from jaxpaged.nodes import Place
from jaxpaged.request import RequestError
from jaxpaged_server import run as server
from jaxpaged_server.options import ServerOptions
from jaxpaged_server.service import open_service

log = logging.getLogger("jaxpaged")


def run(config: EngineConfig, options: ServerOptions, place: Place) -> None:
    """Ends the process. Status 0 where all went well, and 1, or 2 for what the user must change, on every rank otherwise."""
    member = None
    try:
        member = cluster.join(place, config)
        status = _lead(config, options, member) if member.rank == 0 else _follow(config, options, member)
    except BaseException as error:
        status = _failed(error, member)
    cluster.leave(status)


def _lead(config: EngineConfig, options: ServerOptions, member: Member) -> int:
    leader = member.link
    assert isinstance(leader, Leader)
    with server.listen(options) as sock:
        built = member.build(config, options.log_format == "text")
        built.engine.journal, built.engine.runner = leader.journal, Shared(built.runner, leader)
        service = open_service([built], options)
        (engine,) = service.engine.engines
        member.on_lost = lambda why: engine.end(ClusterError(why))
        leader.watch()
        status = server.serve(service, sock)
    sent = sum(one.num_sent for one in leader.channels.values())
    log.info("%d steps, %d bytes to %d followers", leader.num_steps, sent, len(leader.channels))
    if status:
        leader.fail(f"the engine has stopped: {service.engine.error}")
    else:
        leader.stop()
    return status


def _follow(config: EngineConfig, options: ServerOptions, member: Member) -> int:
    follower = member.link
    assert isinstance(follower, Follower)
    built = member.build(config, False)
    log.info("rank %d follows", member.rank)
    signal.signal(signal.SIGINT, _interrupted)
    follower.run(built.engine.limits, built.runner.buckets, built.runner)
    log.info("rank %d ends: rank 0 has stopped", member.rank)
    return 0


def _interrupted(number: int, frame: Any) -> None:
    """Ctrl-C in a terminal that rank 0 shares: that one drains, and this one with it."""
    signal.signal(number, signal.default_int_handler)
    log.warning("this rank ends with rank 0; Ctrl-C once more ends all at once, with an error")


def _failed(error: BaseException, member: Member | None) -> int:
    """Says what is wrong, here and to the others. The exit status, as `cli.main` has it."""
    if os.environ.get("JAXPAGED_DEBUG") or not isinstance(error, (ValueError, OSError, RuntimeError, KeyboardInterrupt)):
        traceback.print_exception(error)
    print(f"error: {error}" if str(error) else f"error: {type(error).__name__}", file=sys.stderr)
    if member is not None and hasattr(member, "link"):
        member.link.fail(f"{type(error).__name__}: {error}")
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, RequestError) else 1
