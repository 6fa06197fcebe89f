"""Sweeps under Hydra's launchers and sweepers, where their packages are installed."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moesaic.cli.common import composed
from moesaic.cli.train import objective, train_in_sweep
from moesaic.errors import InputError
from moesaic.training.launched import require_one_process

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["-m", "debug=smoke", "training.steps=2", "data=files", "data.tokenizer=bytes", "logger=none", "finish=score"]
SMALL += ["model.dim=16", "model.attention.head_dim=4", "hydra.sweep.dir=sweep"]


def train(corpus: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, f"data.path={corpus}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "launcher"), [("hydra_joblib_launcher", "joblib"), ("hydra_submitit_launcher", "submitit_local")]
)
def test_a_launcher_puts_runs_into_processes(corpus: Path, tmp_path: Path, package: str, launcher: str) -> None:
    """The process of the sweep knows their directories, their names and which failed."""
    pytest.importorskip(f"hydra_plugins.{package}")
    done = train(corpus, tmp_path, f"hydra/launcher={launcher}", "model.moe.top_k=1,99")
    assert done.returncode == 1, done.stderr
    assert "error: 1 run(s) of this sweep failed, see the table" in done.stderr
    runs = {path.parent.name for path in (tmp_path / "sweep").glob("*/metrics.json")}
    assert runs == {"0-top_k=1", "1-top_k=99"}
    assert (tmp_path / "sweep" / "report.md").read_text() in done.stdout
    assert "must be 1 to num_experts=8" in done.stdout


@pytest.mark.slow
def test_optuna_minimizes_bits_per_byte(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")
    trials = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1"]
    done = train(corpus, tmp_path, *trials, "model.moe.top_k=choice(1,99)", "optimizer.learning_rate=interval(1e-4,1)")
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    numbers = [yaml.safe_load(path.read_text()) for path in (tmp_path / "sweep").glob("*/metrics.json")]
    assert len(numbers) == 3
    assert found["best_value"] == min(map(objective, numbers))
    assert done.returncode == any(math.isinf(objective(each)) for each in numbers), done.stderr


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"status": "finished", "validation/loss": 2.0, "validation/bits_per_byte": 1.5}, 1.5),
        ({"status": "stopped", "validation/loss": 2.0}, 2.0),
        ({"status": "diverged", "validation/loss": 2.0}, math.inf),
        ({"status": "finished", "validation/bits_per_byte": math.nan}, math.inf),
        ({"status": "failed", "error": "?"}, math.inf),
    ],
)
def test_what_a_sweeper_minimizes(metrics: dict[str, object], expected: float) -> None:
    assert objective(metrics) == expected


def test_a_run_of_several_processes_is_none_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would start the whole sweep once more for its second process, and the first would wait for it."""
    for name in ("LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert math.isinf(train_in_sweep(composed("train", ["trainer.devices=2"]), tmp_path))
    assert "error: trainer.devices=2: a run of a sweep is one process, not 2; must be 1, or" in capsys.readouterr().err
    with pytest.raises(InputError, match="a run of a study is one process, not 6"):
        require_one_process({"devices": 2, "num_nodes": 3}, "a study")
    require_one_process({"devices": 1}, "a study")
    for name in ("LOCAL_RANK", "SLURM_NTASKS"):  # somebody else has started the others
        with monkeypatch.context() as started:
            started.setenv(name, "2")
            require_one_process({"devices": 2}, "a study")
