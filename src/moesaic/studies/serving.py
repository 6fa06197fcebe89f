"""A process that does one job after another, each in a forked child: what all jobs import is imported once.

The process itself imports no code of a user's and starts no threads. So every child imports custom modules as they are
then, and begins as a fresh process would.
"""

import gc
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["FORKS", "READY", "serve"]

FORKS = sys.platform == "linux"
"""Whether each job has a child of its own. Elsewhere the process ends after its first job, as libraries of macOS do not
survive a fork."""

READY = "ready"
"""First word of the first report; the CPU seconds until then follow it."""


def serve(work: Callable[[Path], None]) -> None:
    """Do the jobs of the folders that standard input names, a JSON string on each line, until it ends.

    Standard output has a report per line: that the process is ready, then the exit status of each job, -N for a job
    that signal N ended. What a job prints goes to log.txt in its folder. A job ends with this process, however that
    ends, and this process ends with its standard input.
    """
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    print(READY, round(time.process_time(), 2), file=reports)
    gc.freeze()  # a child's collector would copy all pages that it looks at
    commands = _Commands()
    while (folder := commands.next()) is not None:
        if FORKS:
            lifeline, end = os.pipe()
            child = os.fork()
            if child == 0:
                reports.close()
                os.close(end)
                os.dup2(lifeline, 0)
                os.close(lifeline)
                _begin(folder)
                work(folder)
                return
            os.close(lifeline)
            print(_status_of(child, commands), file=reports)
            os.close(end)
        else:
            _begin(folder)
            status = 1
            try:
                work(folder)
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
                raise
            finally:
                print(status, file=reports)
            return


class _Commands:
    """The folders that standard input names. It is read without a buffer, which a child would have a copy of."""

    def __init__(self) -> None:
        self._read = b""

    def next(self) -> Path | None:
        """The next folder; None at the end of the input."""
        while b"\n" not in self._read:
            if self.end():
                return None
        line, _, self._read = self._read.partition(b"\n")
        return Path(json.loads(line))

    def end(self, within: float | None = None) -> bool:
        """Whether the input ends within so many seconds; None waits until there is more of it or it ends."""
        if within is not None and not select.select([0], [], [], within)[0]:
            return False
        more = os.read(0, 4096)
        self._read += more
        return not more


def _status_of(child: int, commands: _Commands) -> int:
    """Wait for a child; it is killed where the input ends before it does."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if commands.end(within=0.05):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os._exit(1)


def _begin(folder: Path) -> None:
    """Become the process of one job."""
    sys.argv[1:] = [str(folder)]  # for the record of the run
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    threading.Thread(target=_end_with_the_input, daemon=True).start()


def _end_with_the_input() -> None:
    while os.read(0, 1):  # not sys.stdin.read: its lock would be held at the interpreter's end
        pass
    os._exit(1)
