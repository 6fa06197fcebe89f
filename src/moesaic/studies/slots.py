"""The processes that do the runs of a study, as the study sees them."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from moesaic.imports import VARIABLE, trusted
from moesaic.studies.serving import FORKS, READY
from moesaic.studies.worker import main

__all__ = ["InThisProcess", "Slot", "Worker"]


class Slot(Protocol):
    """What does the jobs of one folder after another."""

    import_seconds: float
    """CPU seconds until it was ready, which are in no row."""
    ready_at: float
    """When it was seen to be ready, as time.monotonic has it."""

    @property
    def takes_more(self) -> bool:
        """Whether it can do another job after one that has ended."""
        ...

    def begin(self, folder: Path) -> None:
        """Let it do the job of a folder, when it has none."""
        ...

    def poll(self) -> int | None:
        """The exit status of its job; None while it runs."""
        ...

    def end(self) -> None:
        """End it and its job, which is safe at any time: a run continues from its last checkpoint."""
        ...


class Worker:
    """A process on one thread that does the jobs of one folder after another, see `moesaic.studies.serving`.

    Its own session keeps Ctrl-C from it; the pipe of its standard input ends it when this process is gone.

    Args:
        log: gets what the process says outside its jobs, such as why it cannot start.
        command: in place of python -m moesaic.studies.worker.
    """

    def __init__(self, log: Path, command: Sequence[str] = ()) -> None:
        self.import_seconds = self.ready_at = 0.0
        self._status: int | None = None
        self._reports: queue.SimpleQueue[str] = queue.SimpleQueue()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command or [sys.executable, "-m", "moesaic.studies.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    VARIABLE: ",".join(sorted(trusted())),
                },
                start_new_session=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(self, folder: Path) -> None:
        """Let it do the job of a folder, when it has none."""
        assert self.process.stdin is not None
        self._status = None
        with contextlib.suppress(BrokenPipeError):  # `poll` finds that it is gone
            self.process.stdin.write(f"{json.dumps(str(folder))}\n")
            self.process.stdin.flush()

    def poll(self) -> int | None:
        """The exit status of its job, -N where signal N ended it or the process; None while it runs."""
        while self._status is None and not self._reports.empty():
            report = self._reports.get()
            if not report:
                self.end()
                self._status = self.process.returncode or 1
            elif report.startswith(READY):
                self.import_seconds, self.ready_at = float(report.split()[1]), time.monotonic()
            else:
                self._status = int(report)
        return self._status

    @property
    def takes_more(self) -> bool:
        """Whether it can do another job after one that has ended."""
        return FORKS and self.process.returncode is None

    def end(self) -> None:
        """Kill the process and its job, which is safe at any time: a run continues from its last checkpoint."""
        if self.process.returncode is None:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # `end` has closed it
            for line in self.process.stdout:
                self._reports.put(line.strip())
        self._reports.put("")


class InThisProcess:
    """A worker without a process of its own, for parts that exist nowhere else, such as those of a notebook.

    A job is over when `begin` returns; what it prints goes to log.txt in its folder.
    """

    import_seconds = ready_at = 0.0
    takes_more = True

    def __init__(self, log: Path) -> None:
        self._status = 0

    def begin(self, folder: Path) -> None:
        """Do the job of a folder."""
        threads, self._status = torch.get_num_threads(), 0
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    main(folder)
            except SystemExit as error:
                self._status = error.code if isinstance(error.code, int) else 1
            except Exception:
                traceback.print_exc(file=log)
                self._status = 1
            finally:
                torch.set_num_threads(threads)

    def poll(self) -> int:
        """The exit status of its job."""
        return self._status

    def end(self) -> None:
        """There is nothing to end."""
