"""Workers: one process does several jobs, each in a child of its own, and none of them outlives what asked for it."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesaic.studies.serving import FORKS
from moesaic.studies.slots import Worker

WORK = """
import os, sys, time
from pathlib import Path
from moesaic.studies.serving import serve
sys.path.insert(0, sys.argv[1])
def work(folder):
    (folder / "process").write_text(f"{os.getpid()} {os.getppid()} {time.process_time()}")
    (folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])
    exec((folder / "job.py").read_text())
serve(work)
"""


@pytest.fixture
def job_in(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, code: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.py").write_text(code)
        return folder

    return write


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    made = Worker(tmp_path / "log.txt", [sys.executable, "-c", WORK, str(tmp_path)])
    yield made
    made.end()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60  # for what never comes
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def status_of(worker: Worker, folder: Path) -> int:
    worker.begin(folder)
    wait_for(lambda: worker.poll() is not None)
    status = worker.poll()
    assert status is not None
    return status


def process_of(folder: Path) -> tuple[int, int, float]:
    job, parent, seconds = (folder / "process").read_text().split()
    return int(job), int(parent), float(seconds)


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # empty: it has ended, nobody has asked how
    except OSError:
        return False


pytestmark = pytest.mark.skipif(not FORKS, reason="a worker does one job on this system")


def test_one_process_does_jobs_one_after_the_other(worker: Worker, job_in: Callable[[str, str], Path]) -> None:
    folders = [job_in(f"job, {i}", f"print('this is job', {i})") for i in range(3)]
    assert [status_of(worker, folder) for folder in folders] == [0, 0, 0]
    found = [process_of(folder) for folder in folders]
    assert len({job for job, *_ in found}) == 3
    assert {parent for _, parent, _ in found} == {worker.process.pid}
    assert all(seconds < worker.import_seconds for *_, seconds in found), "a job's clock begins with the job"
    assert [(folder / "log.txt").read_text() for folder in folders] == [f"this is job {i}\n" for i in range(3)]
    assert (folders[0] / "threads").read_text() == "1"


def test_a_job_that_ends_badly_does_not_take_the_worker(worker: Worker, job_in: Callable[[str, str], Path]) -> None:
    assert status_of(worker, job_in("exits", "sys.exit(2)")) == 2
    raises = job_in("raises", "raise ValueError('no such thing')")
    assert status_of(worker, raises) == 1
    assert "no such thing" in (raises / "log.txt").read_text()
    assert status_of(worker, job_in("is killed", f"os.kill(os.getpid(), {int(signal.SIGKILL)})")) == -signal.SIGKILL
    assert status_of(worker, job_in("works", "")) == 0
    assert worker.takes_more


def test_a_module_edited_between_jobs_is_imported_anew(
    worker: Worker, job_in: Callable[[str, str], Path], tmp_path: Path
) -> None:
    code = "import edited_between_jobs; (folder / 'found').write_text(str(edited_between_jobs.VALUE))"
    for value in (1, 222):  # of another length: the cache of compiled modules compares seconds and sizes
        (tmp_path / "edited_between_jobs.py").write_text(f"VALUE = {value}\n")
        folder = job_in(f"job{value}", code)
        assert status_of(worker, folder) == 0
        assert (folder / "found").read_text() == str(value)


HANGS = "time.sleep(600)"


def test_a_job_does_not_outlive_its_worker(worker: Worker, job_in: Callable[[str, str], Path]) -> None:
    folder = job_in("hangs", HANGS)
    worker.begin(folder)
    wait_for((folder / "process").exists)
    wait_for(lambda: (folder / "process").read_text())
    job, *_ = process_of(folder)
    assert worker.poll() is None
    os.kill(worker.process.pid, signal.SIGKILL)
    wait_for(lambda: worker.poll() is not None)
    assert worker.poll() == -signal.SIGKILL
    assert not worker.takes_more
    wait_for(lambda: not is_there(job))


def test_neither_outlives_the_study(worker: Worker, job_in: Callable[[str, str], Path]) -> None:
    folder = job_in("hangs", HANGS)
    worker.begin(folder)
    wait_for(lambda: (folder / "process").exists() and (folder / "process").read_text())
    job, *_ = process_of(folder)
    assert worker.process.stdin is not None
    worker.process.stdin.close()  # as when the study is killed
    wait_for(lambda: not is_there(job) and not is_there(worker.process.pid))


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "log.txt", [sys.executable, "-c", "raise SystemExit('no torch here')"])
    assert status_of(worker, tmp_path) == 1
    assert "no torch here" in (tmp_path / "log.txt").read_text()
    worker.end()
