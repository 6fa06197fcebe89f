"""What happens to a run from outside: signals, full disks, other processes, schedulers, other checkpoints."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from small_runs import BPE, SMOKE, holding, kill_in_call

from moesaic.checkpoints import load_checkpoint, load_model, write_checkpoint
from moesaic.cli import evaluate, main, train
from moesaic.cli.common import exit_on_bad_input
from moesaic.config import from_mapping
from moesaic.data import DataConfig, load_data
from moesaic.errors import CannotWrite, InputError, LostProcess
from moesaic.files import atomic, is_locked, lock
from moesaic.imports import trusting
from moesaic.interrupts import Interrupted, exit_status, interruptible
from moesaic.training import finish
from moesaic.training.config import RunConfig
from moesaic.training.launched import is_lost
from moesaic.training.run import run
from moesaic.training.starting import read_start

Composed = Callable[..., dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["training.steps=12", "training.log_every=1", "training.validate_every=6", "training.accumulate=2"]


class Signal(pl.Callback):
    """Sends this process a signal in the middle of a step: in the first of its two micro-batches."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step == self.step and batch_index % 2 == 0:
            os.kill(os.getpid(), self.signum)


def signalled(step: int, signum: int) -> str:
    return f"+callbacks.signal={{_target_: {__name__}.Signal, step: {step}, signum: {int(signum)}}}"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        timed = ("seconds", "tokens_per_second")
        return [{key: value for key, value in row.items() if key not in timed} for row in csv.DictReader(file)]


def require_equal_runs(one: Path, other: Path) -> None:
    for table in ("metrics.csv", "routing.csv"):
        assert rows(one / table) == rows(other / table), table
    first, second = (load_checkpoint(each / "checkpoints" / "last.ckpt") for each in (one, other))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


@pytest.fixture
def whole(train_once: Callable[..., Path]) -> Path:
    """The directory of an undisturbed run, to be read only."""
    return train_once(*STEPS)


@pytest.fixture
def unfinished(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, as if it had been killed just before the end."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("signum", "step"),
    [
        (signal.SIGTERM, 3),
        pytest.param(signal.SIGTERM, 5, marks=pytest.mark.slow),  # the sixth step is validated
        pytest.param(signal.SIGHUP, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 5, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_bit_equal(
    composed: Composed, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], signum: int, step: int
) -> None:
    before = signal.getsignal(signum)
    with interruptible(), pytest.raises(Interrupted) as ended:
        run(composed(*STEPS, f"run_dir={tmp_path / 'cut'}", signalled(step, signum), "training.checkpoint_every=10"))
    assert exit_status(ended.value) == 128 + signum
    assert signal.getsignal(signum) == before
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["status"] == "interrupted"
    assert load_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] == step + 1
    said = f"moesaic train resume=true run_dir={tmp_path / 'cut'} 'trust=[{__name__}]'"
    assert said in capsys.readouterr().out

    with trusting([__name__]):
        assert run(composed("resume=true", f"run_dir={tmp_path / 'cut'}"))["status"] == "finished"
    require_equal_runs(tmp_path / "cut", whole)


@pytest.mark.slow
def test_the_warning_of_a_scheduler_ends_with_a_verdict(composed: Composed, tmp_path: Path) -> None:
    metrics = run(composed(*STEPS, f"run_dir={tmp_path / 'run'}", signalled(3, signal.SIGUSR1)))
    assert metrics["status"] == "stopped"
    assert metrics["steps"] == 4
    assert "validation/bits_per_byte" in metrics
    with trusting([__name__]):
        assert run(composed("resume=true", f"run_dir={tmp_path / 'run'}"))["steps"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_exit_status_of_a_process_is_that_of_its_signal(corpus: Path, tmp_path: Path, signum: int) -> None:
    arguments = [*SMOKE, f"data.path={corpus}", f"data.cache_dir={tmp_path}", "run_dir=run", "training.steps=100000"]
    command = [sys.executable, "-m", "moesaic", "train", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):  # it trains
                break
        process.send_signal(signum)
        said = process.stdout.read()
        assert process.wait() == 128 + signum
    assert "moesaic train resume=true run_dir=run" in said
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] > 0


class Break(pl.Callback):
    """Makes the weights worthless."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_index: int
    ) -> None:
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, torch.nan)


@pytest.mark.slow
def test_a_diverged_run_does_not_exit_with_0(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*SMOKE, f"data.path={corpus}", "run_dir=run", f"+callbacks.b={{_target_: {__name__}.Break}}"]
    with pytest.warns(RuntimeWarning, match="Training stops before this step"), pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert ended.value.code == 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "diverged"


class BreakAtTheEnd(pl.Callback):
    """As a part that trains and cannot be evaluated."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, torch.nan)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:after training:RuntimeWarning")
def test_a_score_that_is_no_number_is_a_diverged_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = f"+callbacks.b={{_target_: {__name__}.BreakAtTheEnd}}"
    with pytest.raises(SystemExit) as ended:
        main(["train", *SMOKE, f"data.path={corpus}", "run_dir=run", "finish=score", broken])
    assert ended.value.code == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["status"], metrics["error"]) == ("diverged", "validation/loss is nan")


# ---- other processes, and runs that are there


def test_a_directory_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    with holding(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(InputError, match="somebody else"), lock(tmp_path, "somebody else"):
            pass
    assert not is_locked(tmp_path)
    with lock(tmp_path, "somebody else"):
        pass


@pytest.mark.slow
def test_a_run_that_trains_is_left_alone(composed: Composed, tmp_path: Path, unfinished: Path) -> None:
    with holding(unfinished):
        with pytest.raises(InputError, match=r"run_dir='.*run': another process is training in it"):
            run(composed("resume=true", f"run_dir={unfinished}"))
        with pytest.raises(InputError, match=r"no unfinished run with a checkpoint"):
            run(composed("resume=true", f"output_dir={tmp_path}", "name=run"))
    assert run(composed("resume=true", f"run_dir={unfinished}"))["status"] == "finished"


def test_one_command_begins_continues_and_ends(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler repeats resume=true run_dir=X blindly."""
    overrides = ["resume=true", f"run_dir={tmp_path / 'run'}", *STEPS]
    again = composed(*overrides)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        train.train({**again, "callbacks": composed(signalled(0, signal.SIGTERM))["callbacks"]}, overrides)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()  # as if it had been killed before the first
    (tmp_path / "run" / "slurm-17.out").write_text("kept")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("step: 0", "step: 99"))
    with trusting([__name__]):
        assert train.train(again, overrides)["status"] == "finished"
    assert (tmp_path / "run" / "slurm-17.out").read_text() == "kept"
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.csv")].count("1") == 1
    capsys.readouterr()
    with trusting([__name__]):
        assert train.train(again, overrides)["status"] == "finished"
    assert "this run is finished, at step 12" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{"RANK": "3"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}])
def test_one_process_is_rank_0_whatever_a_scheduler_says(
    corpus: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x", "SLURM_LOCALID": "2", "SLURM_NODEID": "0"}
    given = {**variables, **(slurm if "SLURM_NTASKS" in variables else {})}
    script = (
        "import sys; from moesaic.cli import main\n"
        f"main(['train', *{SMOKE!r}, 'training.steps=1', 'sample.max_new_tokens=0', *sys.argv[1:]])"
    )
    arguments = [f"data.path={corpus}", f"data.cache_dir={tmp_path}", "run_dir=run", "data.tokenizer=bytes"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "finished"
    assert "cost" in done.stdout


def test_another_number_of_processes_than_asked_for_is_refused(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match=r"trainer.devices=2, trainer.num_nodes=1: WORLD_SIZE=8 processes"):
        run(composed("trainer.devices=2"))


# ---- full disks


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("size", [200, 1_000, 1_700, 2_500, 4_000, 10_000, 100_000, 400_000, 700_000, 1_000_000])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_where_no_file_may_grow_any_more_nothing_is_lost(
    composed: Composed, tmp_path: Path, whole: Path, file_size_limit: Callable[[int], None], size: int
) -> None:
    overrides = (*STEPS, f"run_dir={tmp_path / 'full'}", "training.checkpoint_every=4")
    config, again = composed(*overrides), composed("resume=true", f"run_dir={tmp_path / 'full'}")
    load_data(from_mapping(DataConfig, config["data"], "data"))  # the cache of tokens is another test's
    file_size_limit(size)
    try:
        said = contextlib.redirect_stdout(io.StringIO())  # pytest keeps it in a file, which may not grow either
        with said, pytest.raises(CannotWrite, match=r"cannot be written \(File too large\); what was there is intact"):
            run(config)
    finally:
        file_size_limit(resource.RLIM_INFINITY)
    assert not list(tmp_path.rglob("*.partial"))
    again = again if (tmp_path / "full" / "config.yaml").exists() else {**config, "resume": True}
    assert run(again)["status"] == "finished"
    require_equal_runs(tmp_path / "full", whole)


@pytest.mark.slow
def test_checkpoints_do_not_need_tmpdir(composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/full")
    monkeypatch.setattr("tempfile.tempdir", "/dev/full")
    assert run(composed(f"run_dir={tmp_path / 'run'}", "training.steps=2"))["status"] == "finished"


def test_what_cannot_be_written_does_not_cost_the_numbers_of_an_evaluation(
    composed: Composed, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / ".evaluation.json.partial").mkdir(parents=True)
    config = composed(f"checkpoint={trained}", f"output={tmp_path / 'out'}", "data=files", config="evaluate")
    told: list[dict[str, Any]] = []
    with pytest.raises(CannotWrite, match=r"evaluation\.json: cannot be written"):
        evaluate.evaluate(config, told.append)
    assert told[0]["loss"] > 0


OTHER_DISK = Path("/dev/shm")


@pytest.mark.slow
@pytest.mark.skipif(not os.access(OTHER_DISK, os.W_OK), reason="there is no second file system")
@pytest.mark.parametrize("calls", [1, 2, 3, 8, 13, 20])
def test_killed_while_a_checkpoint_is_written_to_another_disk(
    composed: Composed, corpus: Path, tmp_path: Path, whole: Path, calls: int
) -> None:
    """Odd calls die before a checkpoint is on the disk, even ones before the folder knows its name."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=OTHER_DISK) as folder:
        run_dir = Path(folder) / "run"
        command = [str(ROOT / "scripts" / "train.py"), *SMOKE, f"data.path={corpus}", *STEPS]
        command += [f"run_dir={run_dir}", "training.checkpoint_every=1", f"data.cache_dir={tmp_path}"]
        kill_in_call("os", "fsync", 6 + calls, command, tmp_path)
        if (run_dir / "checkpoints" / "last.ckpt").exists():
            load_model(run_dir / "checkpoints" / "last.ckpt")
        assert run(composed("resume=true", f"run_dir={run_dir}"))["status"] == "finished"
        assert not list(run_dir.rglob(".*.partial"))
        require_equal_runs(run_dir, whole)


# ---- what a checkpoint means


@pytest.mark.slow
def test_after_training_nothing_costs_the_numbers(composed: Composed, tmp_path: Path) -> None:
    config = composed("training.steps=2", f"run_dir={tmp_path / 'run'}")
    with pytest.warns(RuntimeWarning, match=r"after training, sample failed: .*sample.txt: cannot be written"):
        metrics = run({**config, "callbacks": {"block": {"_target_": f"{__name__}.BlockSample"}}})
    assert metrics["status"] == "finished"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert "validation/bits_per_byte" in metrics


class BlockSample(pl.Callback):
    """Puts a folder where the sample should go."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        Path(trainer.default_root_dir, "sample.txt").mkdir()


@pytest.mark.slow
def test_ids_beyond_the_tokenizer_do_not_cost_the_run(composed: Composed, tmp_path: Path) -> None:
    config = composed("model.vocab_size=320", "training.steps=1", "sample.temperature=5", f"run_dir={tmp_path / 'run'}")
    assert run(config)["warnings"] == []


@pytest.mark.slow
def test_other_text_is_read_with_the_tokenizer_of_the_checkpoint(
    composed: Composed, trained: Path, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i in range(6):
        (other / f"{i}.txt").write_text(f"entirely different words, number {i}, quite unlike the rest. " * 60)
    overrides = [*BPE, f"ckpt_path={trained}", f"data.path={other}", "training.steps=22", f"run_dir={tmp_path / 'run'}"]
    run(composed(*overrides))
    before, after = (load_model(path).tokenizer for path in (trained, tmp_path / "run" / "checkpoints" / "last.ckpt"))
    assert before is not None and after is not None
    assert before.to_dict() == after.to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.tokenizer=bytes"], r"data.tokenizer='bytes': checkpoint .* has 'bpe'; must be the same"),
        (["data.vocab_size=350"], r"data.vocab_size=350: checkpoint .* has a BPE of 300; must be equal"),
        (
            ["data.source=associative_recall", "data.path=null"],
            r"data.source='associative_recall': checkpoint .* was trained on 'files'",
        ),
        (["optimizer.name=adamw"], r"optimizer.name='adamw': checkpoint .* has the state of 'muon'"),
        (["training.steps=20"], r"training.steps=20: checkpoint .* is at step 20; must be more"),
        (["training.steps=7"], r"training.steps=7: checkpoint .* is at step 20; must be more"),
    ],
)
def test_a_checkpoint_that_would_mean_something_else_is_refused(
    composed: Composed, trained: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = composed(*BPE, f"ckpt_path={trained}", "training.steps=30", f"run_dir={tmp_path / 'run'}", *overrides)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not (tmp_path / "run").exists()


def test_text_that_changed_is_refused_on_resume(composed: Composed, unfinished: Path) -> None:
    environment = json.loads((unfinished / "environment.json").read_text())
    environment["data"]["content_hash"] = "of other text"
    (unfinished / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(InputError, match=r"the text has changed since this run began \(its hash was of other text"):
        run(composed("resume=true", f"run_dir={unfinished}"))


@pytest.mark.slow
def test_new_settings_of_the_optimizer_apply_and_moments_stay(
    composed: Composed, trained: Path, tmp_path: Path
) -> None:
    settings = {"learning_rate": 3e-4, "muon_learning_rate": 2e-5, "weight_decay": 0.01, "beta2": 0.9, "eps": 1e-7}
    overrides = [f"optimizer.{name}={value}" for name, value in settings.items()]
    config = composed(
        *BPE, *overrides, f"ckpt_path={trained}", f"run_dir={tmp_path / 'run'}", "training.steps=22",
        "schedule.name=constant", "training.log_every=1",
    )  # fmt: skip
    run(config)
    [state] = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]
    groups = {group["name"]: group for group in state["param_groups"]}
    assert groups["matrices"]["lr"] == groups["matrices"]["initial_lr"] == 2e-5
    assert groups["embeddings"]["lr"] == 3e-4
    assert groups["outputs"]["weight_decay"] == 0.01
    assert groups["vectors"]["betas"][1] == 0.9
    assert groups["vectors"]["eps"] == 1e-7
    assert {row["learning_rate"] for row in rows(tmp_path / "run" / "metrics.csv") if row["learning_rate"]} == {"2e-05"}
    assert state["state"][0]["step"] == 22


@pytest.mark.slow
@pytest.mark.slow_but_for("change0")
@pytest.mark.parametrize("change", [{"accumulate": 1, "seq_len": 16}, {"accumulate": 4}, {"batch_size": 1}])
def test_a_run_goes_on_from_the_sequence_it_was_at(
    composed: Composed, tmp_path: Path, whole: Path, change: dict[str, int]
) -> None:
    """Tokens and FLOPs are sums, whatever the batches were, and no window comes twice within an epoch."""
    before = json.loads((whole / "metrics.json").read_text())
    overrides = [f"training.{name}={value}" for name, value in change.items()]
    config = composed(
        *STEPS, *overrides, f"ckpt_path={whole / 'checkpoints' / 'last.ckpt'}", f"run_dir={tmp_path / 'on'}",
        "training.steps=15",
    )  # fmt: skip
    metrics, sizes = run(config), config["training"]
    added = 3 * sizes["batch_size"] * sizes["seq_len"] * sizes["accumulate"]
    assert metrics["tokens"] == before["tokens"] + added
    assert metrics["active_flops"] > before["active_flops"]
    assert [row["step"] for row in rows(tmp_path / "on" / "metrics.csv") if row["train/loss"]] == ["13", "14", "15"]
    loops = load_checkpoint(tmp_path / "on" / "checkpoints" / "last.ckpt")["loops"]["fit_loop"]["state_dict"]
    [state] = loops["combined_loader"]
    seen = state["offset"] + state["next_batch"] * sizes["batch_size"]
    assert seen * sizes["seq_len"] == pytest.approx(metrics["tokens"], abs=sizes["seq_len"])


@pytest.mark.slow
def test_an_optimizer_of_other_parameters_is_refused(composed: Composed, unfinished: Path, tmp_path: Path) -> None:
    path = unfinished / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    _, outputs, vectors, *_ = checkpoint["optimizer_states"][0]["param_groups"]
    outputs["params"].append(vectors["params"].pop())
    write_checkpoint(path, checkpoint)
    with pytest.raises(InputError, match=r"last.ckpt: its optimizer has groups of .*'vectors': 12.*must be .* 13"):
        run(composed("resume=true", f"run_dir={unfinished}"))
    with pytest.raises(InputError, match=r"last.ckpt: its optimizer has groups of .*'vectors': 12.*must be .* 13"):
        run(composed(*STEPS, "training.steps=20", f"ckpt_path={path}", f"run_dir={tmp_path / 'on'}"))
    assert not (tmp_path / "on").exists()
    assert not (unfinished / "metrics.json").exists()


# ---- strangers' checkpoints, and edits of what is stored


def test_names_of_files_in_a_checkpoint_are_ours(trained: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained)
    for name in ("../escaped", "/escaped", "modeling.py", "model.safetensors"):
        write_checkpoint(tmp_path / "evil.ckpt", {**checkpoint, "moesaic": {"foreign_files": {name: "x"}}})
        with pytest.raises(InputError, match=r"evil.ckpt.*foreign_files: found .* must be among config.json"):
            load_model(tmp_path / "evil.ckpt")


def test_a_run_that_goes_on_from_another_has_no_best_checkpoint_yet(trained: Path) -> None:
    """Its own last.ckpt would name a file of the other run, and resume=true refuse it."""
    callbacks = read_start(RunConfig(ckpt_path=str(trained)), None).checkpoint["callbacks"]
    assert [state["best_model_path"] for name, state in callbacks.items() if name.startswith("ModelCheckpoint")] == [""]


@pytest.mark.parametrize("path", ["local:///victim", "../victim", "/victim"])
def test_a_checkpoint_names_no_file_that_lightning_would_delete(trained: Path, tmp_path: Path, path: str) -> None:
    checkpoint = load_checkpoint(trained)
    [state] = [each for name, each in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint")]
    state["best_model_path"] = path
    write_checkpoint(tmp_path / "evil.ckpt", checkpoint)
    config = RunConfig(ckpt_path=str(tmp_path / "evil.ckpt"))
    with pytest.raises(InputError, match="must be a file in the folder of the checkpoints"):
        read_start(config, None)


@pytest.mark.slow_but_for("edit1")
@pytest.mark.parametrize("edit", [("learning_rate: 0.016", "learning_rate: 1.6"), ("seed: 0", "seed: 9")])
def test_a_config_that_was_edited_is_refused_on_resume(
    composed: Composed, unfinished: Path, edit: tuple[str, str]
) -> None:
    stored = unfinished / "config.yaml"
    assert edit[0] in stored.read_text()
    stored.write_text(stored.read_text().replace(*edit))
    with pytest.raises(InputError, match=r"config.yaml: changed since the checkpoint was written: .*(rate|seed)"):
        run(composed("resume=true", f"run_dir={unfinished}"))


@pytest.mark.parametrize("section", ["callbacks", "logger"])
def test_a_stored_component_that_is_refused_is_named_with_its_file(
    composed: Composed, unfinished: Path, section: str
) -> None:
    stored = unfinished / "config.yaml"
    named = {"callbacks": "callbacks.EarlyStopping", "logger": "loggers.CSVLogger"}[section]
    made = {"it": {"_target_": f"lightning.pytorch.{named}", "foo": 1}}
    stored.write_text(yaml.safe_dump({**yaml.safe_load(stored.read_text()), section: made}))
    with pytest.raises(InputError, match=rf"^{stored}: {section}\.it\.foo: unknown key"):
        run({"resume": True, "run_dir": str(unfinished)})


class Fails(CSVLogger):
    """Somebody's own logger with a mistake in it."""

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("of its own")


def test_a_mistake_of_somebody_elses_code_is_not_blamed_on_the_checkpoint(composed: Composed, unfinished: Path) -> None:
    stored = unfinished / "config.yaml"
    config = yaml.safe_load(stored.read_text())
    stored.write_text(yaml.safe_dump({**config, "logger": {"it": {"_target_": f"{__name__}.Fails"}}}))
    with trusting(__name__), pytest.raises(KeyError, match="of its own"):
        run({"resume": True, "run_dir": str(unfinished)})


@pytest.mark.parametrize("words", ["Read error: Connection reset by peer.", "[2] Connection closed by peer [::1]:7"])
def test_a_process_that_was_lost_is_said_to_be(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_lost(RuntimeError(words)) and not is_lost(RuntimeError("shapes")) and not is_lost(ValueError(words))

    def lose() -> None:
        raise LostProcess("another process of this run has ended")

    with pytest.raises(SystemExit) as stopped:
        exit_on_bad_input(lose)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: another process of this run has ended\n"


@pytest.mark.slow
def test_a_repeated_command_may_name_options(composed: Composed, tmp_path: Path) -> None:
    overrides = ["resume=true", "model=study", f"run_dir={tmp_path / 'run'}", "training.steps=2"]
    small = ["model.dim=16", "model.attention.head_dim=4"]
    for _ in range(2):
        assert train.train(composed(*overrides, *small), overrides)["status"] == "finished"


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with atomic(tmp_path / "file.txt") as partial:
        partial.write_text("first")
        with pytest.raises(InputError, match="another process is writing it"), atomic(tmp_path / "file.txt"):
            pass
    assert (tmp_path / "file.txt").read_text() == "first"


@pytest.mark.slow
def test_a_signal_after_the_score_leaves_the_numbers(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(run: object) -> dict[str, float]:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("moesaic.training.run.FINISHERS", (finish.loss_and_load, ended))
        run(composed("training.steps=2", f"run_dir={tmp_path / 'run'}"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "finished" and "validation/loss" in metrics and "pending" in metrics
    assert "pending" not in run(composed("resume=true", f"run_dir={tmp_path / 'run'}"))
