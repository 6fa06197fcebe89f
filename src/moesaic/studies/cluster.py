"""The runs of a study as jobs of a cluster, by submitit."""

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import InputError
from moesaic.files import LOCK, append, write_json
from moesaic.imports import trusted, trusting
from moesaic.studies.worker import work

__all__ = ["Run", "Submitted", "on_cluster"]


def on_cluster(launcher: Mapping[str, Any], jobs: Path) -> Callable[[Path], "Submitted"]:
    """What makes a place for one job after another.

    Args:
        launcher: the cluster, and arguments of submitit's `update_parameters`.
        jobs: keeps what submitit writes; all machines see it under this path.

    Raises:
        InputError: submitit is missing, or does not know a key or the cluster.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("launcher=submitit: it needs pip install 'moesaic[cluster]'") from error
    cluster, arguments = launcher.get("cluster"), {key: launcher[key] for key in launcher if key != "cluster"}
    try:
        executor = submitit.AutoExecutor(folder=jobs.absolute(), cluster=cluster)
        executor.update_parameters(**arguments)
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"launcher: {' '.join(str(error).split())}") from error
    return functools.partial(Submitted, executor)


class Submitted:
    """A place for one job after another, as `slots.Worker` is; each is a job of the cluster.

    Args:
        executor: its submit(function, *arguments) returns a job with done(), exception(), result() and cancel().
    """

    import_seconds = ready_at = 0.0
    takes_more = True

    def __init__(self, executor: Any, log: Path) -> None:
        self._executor, self._job, self._log = executor, None, log

    def begin(self, folder: Path) -> None:
        """Let it do the job of a folder, when it has none."""
        self._log = folder / "log.txt"
        self._job = self._executor.submit(Run(), folder.absolute(), sorted(trusted()))

    def poll(self) -> int | None:
        """The exit status of its job; None while it waits or runs."""
        if self._job is None or not self._job.done():
            return None
        job, self._job = self._job, None
        if (error := job.exception()) is None:
            return int(job.result())
        lines = str(error).strip().splitlines() or [type(error).__name__]
        append(self._log, f"job {job.job_id} of the cluster: {lines[0]}\n")
        return 1

    def end(self) -> None:
        """Cancel its job, which is safe at any time: a run continues from its last checkpoint."""
        if self._job is not None and not self._job.done():
            self._job.cancel()


class Run:
    """What a job does, wherever it runs. When its time is over, submitit queues it again, and it goes on."""

    def __call__(self, folder: Path, names: Sequence[str]) -> int:
        """Do the job of a folder; returns its exit status. What it prints goes to log.txt there.

        A job that a study left behind may be at it still: this one waits for its end.

        Args:
            names: packages that are trusted.
        """
        import filelock

        with contextlib.ExitStack() as held:
            held.enter_context(filelock.FileLock(folder / LOCK))
            log = held.enter_context((folder / "log.txt").open("a", encoding="utf-8"))
            held.enter_context(contextlib.redirect_stdout(log))
            held.enter_context(contextlib.redirect_stderr(log))
            held.enter_context(trusting(names))
            try:
                write_json(folder / "rows.json", work(folder))
                return 0
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except Exception:
                traceback.print_exc()
                return 1

    def checkpoint(self, *arguments: Any) -> Any:
        """What to queue when the time of the job is over."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)
