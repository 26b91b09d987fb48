"""Brings the hosts of a run together, before anything is computed, and gives each of them the run
that is kept at an address.
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from envs.api import Refusal
from envs.stopping import held
from experiments.last_words import stand_behind_stderr
from experiments.remote_run import RemoteRun, Sender, copy_of_host, is_remote, sending, steps_of
from experiments.run_lock import RunLost
from ictjax.config import HostsConfig
from ictjax.hosts import ALONE, HostLost, Hosts, is_common, these_hosts

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
    hosts = these_hosts()
    stand_behind_stderr(hosts.index, hosts.count)
    with ended_together(hosts):
        hosts.meet()  # at once: of CPUs, the first time none may come 30 s after the others
    return hosts


@contextlib.contextmanager
def ended_together(hosts: Hosts) -> Iterator[None]:
    """Ends this host at once, with one sentence, where another one is gone: what Python does at its
    end would wait for that one. After an error that the others do not know of it ends within 30 s:
    it would wait for hosts that wait for its devices.
    """
    try:
        with hosts.connected():
            yield
    except HostLost as error:
        print(f"ictjax: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except Exception as error:
        if hosts.count > 1 and (isinstance(error, RunLost) or not is_common(error)):
            threading.Thread(target=_end_late, name="end", daemon=True).start()
        raise


def _end_late() -> None:
    time.sleep(_SILENT_S)
    os._exit(1)


def decide(hosts: Hosts, judge: Callable[[], _Answer]) -> _Answer:
    """What the first host finds, on all of them; a ValueError of it is theirs too, and what else
    ends it ends them. The answer is JSON.
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
        except Exception as error:
            hosts.agree([None, str(error) or type(error).__name__])
            raise
    said: Any = hosts.agree([answer, complaint])
    if said[1]:
        raise Refusal(said[1])
    return said[0]


@contextlib.contextmanager
def working_copies(
    run_dir: pathlib.Path, hosts: Hosts, say: Callable[[str], None]
) -> Iterator[tuple[pathlib.Path, Hosts, Sender | None]]:
    """Where each host trains: in the run directory that all of them see, or in a copy of its own of
    one at an address, to which the first host sends what all of them do.

    Yields the folder, the hosts, which exchange what is written where that is needed, and on the
    first host who sends it.

    Raises:
      ValueError: on all hosts, where somebody else trains there or the store cannot be reached.
    """
    if not is_remote(run_dir):
        yield run_dir, hosts, None
        return
    with contextlib.ExitStack() as stack:
        senders: list[Sender] = []
        decide(hosts, lambda: senders.append(stack.enter_context(sending(run_dir, say))))
        if hosts.count == 1:
            yield senders[0].path, hosts, senders[0]
            return
        if hosts.first:
            sender, path, exchange = senders[0], senders[0].path, senders[0].send
        else:
            remote = RemoteRun(run_dir, copy_of_host("training", hosts.index))
            sender, path, exchange = None, remote.path, remote.fetch_newest
        together = dataclasses.replace(hosts, exchange=exchange)
        together.meet()  # a copy that is ahead of what was sent from it is sent, for the others
        yield path, together, sender
        with held():  # no host ends before all is sent: the first one would end with it
            decide(hosts, lambda: senders[0].send())


def evaluated_step(run_dirs: Sequence[pathlib.Path], hosts: Hosts) -> int | None:
    """The newest iteration that the first of these runs has at its address, the same on every host;
    None where that is no address, or has none.
    """
    if not is_remote(run_dirs[0]):
        return None
    return decide(hosts, lambda: max(steps_of(run_dirs[0]), default=None))


def reading_copies(run_dirs: Sequence[pathlib.Path], hosts: Hosts) -> Hosts:
    """The hosts that evaluate runs, of which those at addresses lie in a copy of each host (see
    `remote_run.readable`): what the first one writes into its own is sent for the others.
    """
    remotes = [
        RemoteRun(run_dir, copy_of_host("reading", hosts.index))
        for run_dir in run_dirs
        if is_remote(run_dir)
    ]
    if hosts.count == 1 or not remotes:
        return hosts

    def exchange() -> None:
        for remote in remotes:
            if hosts.first:
                remote.push_measured()
            else:
                remote.fetch_measured()

    return dataclasses.replace(hosts, exchange=exchange)
