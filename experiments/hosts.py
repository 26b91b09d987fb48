"""Brings the hosts of a run together, before anything is computed."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from ictjax.config import HostsConfig
from ictjax.hosts import ALONE, HostLost, Hosts, these_hosts

_SILENT_S = 30  # after which a host that does not answer ends the run on all
_JOINING_S = 300  # that hosts wait for each other at the start

_Answer = TypeVar("_Answer")


def connect(config: HostsConfig) -> Hosts:
    """Waits for the other hosts and returns all of them. Call it before JAX looks for devices.

    Raises:
      ValueError: they were not found, or did not come within five minutes.
    """
    if config.alone:
        return ALONE
    # the program answers SIGTERM itself, and several hosts do not save at the same step
    jax.config.update("jax_enable_preemption_service", False)
    # a host that ended is one sentence of the program's, not a page of the transport's
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        if config.detect:
            jax.distributed.initialize(
                heartbeat_timeout_seconds=_SILENT_S, initialization_timeout=_JOINING_S
            )
        else:
            jax.distributed.initialize(
                config.coordinator,
                config.count,
                config.index,
                heartbeat_timeout_seconds=_SILENT_S,
                initialization_timeout=_JOINING_S,
            )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The hosts do not come together ({' '.join(str(error).split())[:200]}): start the same"
            " command on each within five minutes, with --hosts.detect (TPU pods, Slurm, Open MPI),"
            " or with the same --hosts.coordinator HOST:PORT and --hosts.count, and with another"
            " --hosts.index on each."
        ) from error
    return these_hosts()


@contextlib.contextmanager
def ended_together(hosts: Hosts) -> Iterator[None]:
    """Ends this host at once, with one sentence, where another one is gone: what Python does at its
    end would wait for that one.
    """
    try:
        with hosts.connected():
            yield
    except HostLost as error:
        print(f"ictjax: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def decide(hosts: Hosts, judge: Callable[[], _Answer]) -> _Answer:
    """What the first host finds, on all of them; a ValueError of it is theirs too. The answer is
    JSON.
    """
    if hosts.count == 1:
        return judge()
    answer: Any = None
    complaint = ""
    if hosts.first:
        try:
            answer = judge()
        except ValueError as error:
            complaint = str(error) or type(error).__name__
    said: Any = hosts.agree([answer, complaint])
    if said[1]:
        raise ValueError(said[1])
    return said[0]
