"""The runs of a study as jobs of a cluster: by submitit on this machine, and by a stand-in of a few lines."""

import functools
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesaic.cli import study
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.studies.cluster import Submitted, on_cluster
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import read_row
from moesaic.studies.runner import run_study
from moesaic.studies.slots import InThisProcess

TINY = [
    *("data=files", "data.tokenizer=bytes", "model.dim=16", "model.attention.head_dim=4", "model.hidden_dim=16"),
    *("training.steps=4", "training.batch_size=2", "training.seq_len=32", "training.validate_every=2"),
    *("training.validation_seq_len=32", "training.validation_batches=2", "training.checkpoint_every=2"),
    *("schedule.warmup_steps=1", "finish=score", "trainer.precision=32-true", "logger=none"),
]


class Job:
    """As submitit's: what crosses to another process and back."""

    job_id = "7"

    def __init__(self, call: bytes, dies: bool) -> None:
        self.polled, self.dies, self.canceled, self.call = 0, dies, False, call

    def done(self) -> bool:
        self.polled += 1
        return self.polled > 2

    def exception(self) -> Exception | None:
        return RuntimeError("Job 7 was killed\nTIMEOUT") if self.dies else None

    def result(self) -> int:
        function, arguments = pickle.loads(self.call)
        status: int = function(*arguments)
        return status

    def cancel(self) -> None:
        self.canceled = True


class Executor:
    def __init__(self, *deaths: int) -> None:
        self.deaths, self.jobs = deaths, list[Job]()

    def submit(self, function: Any, *arguments: Any) -> Job:
        self.jobs.append(Job(pickle.dumps((function, arguments)), len(self.jobs) in self.deaths))
        return self.jobs[-1]


@pytest.fixture
def base(composed: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    config = composed(*TINY, f"output_dir={tmp_path / 'outputs'}", "name=tiny", config="study")
    return {key: value for key, value in config.items() if key not in ("study", "workers", "results_dir")}


ARMS = {"dense": {"model.dense_twin": True}, "moe": {}}
STUDY = {"question": "?", "equal": "=", "baseline": "dense", "tune": None, "seeds": [0], "arms": ARMS}


def run(base: dict[str, Any], place: Path, make_worker: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """What failed, and the metrics of each arm."""
    console = Console(file=io.StringIO(), width=200)
    config = from_mapping(StudyConfig, STUDY)
    places = {"results": place / "results", "runs": place / "runs"}
    failed = run_study(config, base, **places, workers=2, console=console, make_worker=make_worker)
    path = place / "results" / "rows.jsonl"
    rows = [read_row(line) for line in path.read_text().splitlines()] if path.exists() else []
    return failed, {row["arm"]: {k: v for k, v in row["metrics"].items() if "/" in k} for row in rows}


@pytest.mark.slow
def test_jobs_give_the_rows_and_what_dies_is_done_by_the_same_command(base: dict[str, Any], tmp_path: Path) -> None:
    executor = Executor(0)
    failed, there = run(base, tmp_path / "jobs", functools.partial(Submitted, executor))
    assert len(failed) == 1
    assert "job 7 of the cluster: Job 7 was killed (see " in next(iter(failed.values()))
    assert len(there) == 1 and len(executor.jobs) == 2
    failed, found = run(base, tmp_path / "jobs", functools.partial(Submitted, executor))
    assert failed == {} and len(executor.jobs) == 3, "only what is missing is queued"
    _, expected = run(base, tmp_path / "here", InThisProcess)
    assert {arm: numbers["validation/loss"] for arm, numbers in found.items()} == {
        arm: numbers["validation/loss"] for arm, numbers in expected.items()
    }


def test_jobs_are_canceled_with_the_study(tmp_path: Path) -> None:
    executor = Executor()
    slot = Submitted(executor, tmp_path / "log.txt")
    slot.begin(tmp_path)
    assert slot.poll() is None
    slot.end()
    assert executor.jobs[0].canceled


def test_without_submitit_or_with_a_wrong_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "submitit", None)
        with pytest.raises(InputError, match=r"launcher=submitit: it needs pip install 'moesaic\[cluster\]'"):
            on_cluster({"cluster": "local"}, tmp_path)
    pytest.importorskip("submitit")
    for wrong in ({"cluster": "lokal"}, {"cluster": "local", "slurm_partitoin": "x"}):
        with pytest.raises(InputError, match=r"launcher: .*(lokal|slurm_partitoin)"):
            on_cluster(wrong, tmp_path)


@pytest.mark.slow
def test_submitits_own_processes(base: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    launcher = {"cluster": "local", "timeout_min": 20, "cpus_per_task": 1}
    config = {**base, "study": STUDY, "workers": 2, "results_dir": str(tmp_path / "results"), "launcher": launcher}
    console = Console(file=io.StringIO(), width=200)
    assert study.study(config, "moesaic study", console) == 0
    rows = [read_row(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == set(ARMS)
    assert (tmp_path / "results" / "table.md").exists()
    assert list((tmp_path / "outputs" / "study_tiny" / "jobs").glob("*.pkl"))
