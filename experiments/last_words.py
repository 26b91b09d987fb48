"""One sentence in the place of the page that JAX's coordination service writes when it ends a host
because another one is lost.

It does so in C++ and aborts: no exception comes, and no callback of Python is called (with jaxlib
0.10 that is a page of its own). So a process of its own stands behind this one's stderr. It passes
on what it reads as it comes. Such words it holds back for some seconds: where the stream ends
meanwhile they are replaced, and where it goes on they were not the last.
"""

import os
import re
import select
import signal
import subprocess
import sys
import time

_GO_ON = "start the same command on all hosts again; they go on from the last checkpoint."
# A line of the coordination service: an error that it heard, or that it ends this process.
_WORD = re.compile(rb"[EF]\d{4} .*(coordination_service|JAX distributed service)")
_ENDED = b"JAX distributed service detected fatal errors"
_SILENT = re.compile(rb"stopped sending heartbeats\):([\s\d,]+)")
_OURS = b"ictjax: "
# Between the first of these words and the end; a dump of the stack takes most of it.
_HELD_S = 20.0


def stand_behind_stderr(index: int, count: int) -> None:
    """From now on what any part of this process writes to stderr passes through the other one,
    which ends when this one and its children have.

    Args:
      index: of this host.
      count: of all hosts.
    """
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(index), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what a terminal sends is this process's to answer
    )
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    reader.returncode = 0  # nobody waits for it


def sentence(page: bytes, index: int, count: int) -> str:
    """What the service's last words come to. The first host is where it runs: when that host is
    lost it names none.
    """
    found = _SILENT.search(page)
    lost = [int(number) for number in re.findall(rb"\d+", found[1])] if found else [0]
    if index in lost:
        return (
            f"ictjax: Host {index} of the {count} hosts, which is this one, gave no sign of life"
            f" for too long, and the others have ended: {_GO_ON}"
        )
    named = f"Host{'s' if len(lost) > 1 else ''} {' and '.join(map(str, lost))}"
    return (
        f"ictjax: {named} of the {count} hosts ended or gave no sign of life for too long: see what"
        f" was said there, and {_GO_ON}"
    )


def main() -> None:
    """Reads stdin to its end, for the host and the number of hosts in the arguments."""
    # Slurm and systemd send these to every process: what that host says of them is passed on
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    index, count = map(int, sys.argv[1:])
    passed, held = b"", []  # the newest that was passed on; everything since the first such word
    until = 0.0
    while True:
        left = max(until - time.monotonic(), 0.0) if held else None
        ready = select.select([0], [], [], left)[0]
        if held and time.monotonic() >= until:
            _write(b"".join(held))
            held = []
        if not ready:
            continue
        if not (data := os.read(0, 1 << 16)):
            break
        for line in data.splitlines(keepends=True):
            if held or _WORD.match(line):
                until = until if held else time.monotonic() + _HELD_S
                held.append(line)
            else:
                passed = line
                _write(line)
    page = b"".join(held)
    if _ENDED in page:
        ours = [line for line in held if line.startswith(_OURS)]
        if not ours and not passed.startswith(_OURS):
            ours = [sentence(page, index, count).encode() + b"\n"]
        page = b"".join(ours)
    _write(page)


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]


if __name__ == "__main__":
    main()
