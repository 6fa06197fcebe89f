"""A whole study as a person runs it: runs in processes, rows, a second call, refusals, kill -9."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from small_runs import holding

from moesaic.checkpoints import load_checkpoint
from moesaic.cli import study, train
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.studies import runner, slots
from moesaic.studies.config import Cell, StudyConfig
from moesaic.studies.jobs import job_of, read_row, run_config_of, validate
from moesaic.studies.serving import FORKS
from moesaic.studies.worker import work
from moesaic.training.run import run

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("study_*.yaml"))
TINY = [
    *("data=files", "data.tokenizer=bytes", "model.dim=16", "model.attention.head_dim=4", "model.hidden_dim=16"),
    *("training.steps=4", "training.batch_size=2", "training.seq_len=32", "training.validate_every=2"),
    *("training.validation_seq_len=32", "training.validation_batches=2", "training.checkpoint_every=2"),
    *("schedule.warmup_steps=1", "sample.max_new_tokens=2"),
]

EVALUATIONS = """
def count(checkpoint, config, options):
    from moesaic.checkpoints import load_model
    model = load_model(checkpoint)
    return {"count/eps": model.config.norm_eps, "count/seed": config["seed"], "count/option": options["number"]}
"""


@pytest.fixture
def tiny(composed: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, Any]:
    """The composed config of a study of two arms without tuning, runs of a second."""
    config = composed(*TINY, f"output_dir={tmp_path / 'outputs'}", "name=tiny", config="study")
    config["results_dir"] = str(tmp_path / "results")
    config["trainer"]["precision"] = "auto"
    config["study"] |= {
        **{"question": "?", "equal": "=", "baseline": "dense", "tune": None, "seeds": [0, 1]},
        "arms": {"dense": {"model.dense_twin": True}, "moe": {}},
    }
    return config


def call(config: dict[str, Any]) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    status = study.study({**config}, "moesaic study ...", console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without processes of their own, which take seconds to start; some tests are there for the processes."""
    monkeypatch.setattr(runner, "Worker", slots.InThisProcess)


def rows(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [read_row(line) for line in Path(config["results_dir"], "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_from_nothing_to_a_verdict_and_again(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study_evaluation_samples.py").write_text(EVALUATIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tiny["study"] |= {
        "seeds": [3],
        "variants": {"moe, other eps": {"arm": "moe", "overrides": {"model.norm_eps": 0.5}}},
        "evaluations": ["study_evaluation_samples.count"],
        "evaluation_options": {"number": 7},
    }
    status, printed = call(tiny)
    assert status == 0, printed
    assert "run 2 of 2: " in printed
    found = {row["arm"]: row for row in rows(tiny)}
    assert set(found) == {"dense", "moe", "moe, other eps"}
    [checkpoint] = Path(tiny["output_dir"], "study_tiny").glob("moe_measure*/run/checkpoints/last.ckpt")
    moe, variant = found["moe"], found["moe, other eps"]
    assert moe["metrics"]["tokens"] == 4 * 2 * 32
    assert moe["metrics"]["count/option"] == 7
    assert moe["metrics"]["count/seed"] == 3
    assert (moe["metrics"]["count/eps"], variant["metrics"]["count/eps"]) == (1e-5, 0.5)
    assert moe["metrics"]["validation/loss"] != variant["metrics"]["validation/loss"]
    assert moe["curve"]["tokens"] == [128, 256]
    assert moe["cpu_seconds"] > 0
    assert moe["overrides"] == {"seed": 3}
    final = json.loads((checkpoint.parents[1] / "metrics.json").read_text())
    assert moe["metrics"]["validation/bits_per_byte"] == final["validation/bits_per_byte"]

    results = Path(tiny["results_dir"])
    precision = yaml.safe_load((results / "config.yaml").read_text())["trainer"]["precision"]
    assert precision == "32-true", "auto would let each machine choose"
    before = (results / "rows.jsonl").read_bytes()
    shutil.rmtree(tiny["output_dir"])  # another machine: only what is committed is there
    status, printed = call(tiny)
    assert (status, "run 1" in printed) == (0, False)
    assert (results / "rows.jsonl").read_bytes() == before
    assert not list(Path(tiny["output_dir"]).glob("study_tiny/*/")), "nothing was run"

    changed = {**tiny, "training": {**tiny["training"], "steps": 6}}
    with pytest.raises(
        InputError, match=r"config.yaml: results of another configuration.*training.steps: 4 there, 6 now"
    ):
        call(changed)
    changed = {**tiny, "study": {**tiny["study"], "arms": {"dense": {}, "moe": {}}}}
    with pytest.raises(InputError, match=r"rows.jsonl:.: .*model.dense_twin: True there, '\(absent\)' now"):
        call(changed)
    other = tmp_path / "other"
    other.mkdir()
    for i in range(12):
        (other / f"file{i}.py").write_text(f"# another text {i}\n" * 200)
    changed = {**tiny, "data": {**tiny["data"], "path": str(other)}, "study": {**tiny["study"], "seeds": [3, 4]}}
    with pytest.raises(InputError, match=r"rows.jsonl: .*content hash of the data: '[0-9a-f]{64}' there"):
        call(changed)
    changed = {**tiny, "study": {**tiny["study"], "evaluation_options": {"number": 8}}}
    with pytest.raises(InputError, match=r"config.yaml: .*study.evaluation_options.number: 7 there, 8 now"):
        call(changed)
    changed = {**tiny, "study": {**tiny["study"], "metric": "validation/accuracy"}}
    with pytest.raises(InputError, match=r"rows.jsonl:1: study.metric='validation/accuracy': .* has none; found: "):
        call(changed)
    assert (results / "rows.jsonl").read_bytes() == before
    config_of_rows = (results / "config.yaml").read_text()
    (results / "config.yaml").write_text("{")
    with pytest.raises(InputError, match=r"config.yaml: damaged"):
        call(tiny)
    (results / "config.yaml").write_text(config_of_rows)
    with (results / "rows.jsonl").open("a") as file:
        file.write('{"arm": "mo')
    with pytest.raises(InputError, match=r"rows.jsonl:4: damaged"):
        call(tiny)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # collapse and divergence, at a million times the learning rate
@pytest.mark.usefixtures("in_this_process")
def test_learning_rates_are_tuned(tiny: dict[str, Any]) -> None:
    tiny["study"] |= {"arms": {"dense": {}}, "seeds": [0]}
    tiny["study"]["tune"] = {"seed": 9, "factors": [1e-6, 1.0, 6e4], "keys": ["optimizer.learning_rate"]}
    status, printed = call({**tiny, "workers": 3})
    assert status == 0, printed
    *tuned, measured = rows(tiny)
    assert {row["factor"]: row["purpose"] for row in tuned} == dict.fromkeys([1e-6, 1.0, 6e4], "tune")
    assert (measured["purpose"], measured["factor"], measured["seed"]) == ("measure", 1.0, 0)
    assert {row["seed"] for row in tuned} == {9}
    kept = [path.parents[1].name for path in Path(tiny["output_dir"], "study_tiny").glob("*/run/checkpoints")]
    assert [name.startswith("dense_measure_seed0") for name in kept] == [True], "those of tuning are not needed"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_teachers_and_caches_are_prepared_once(tiny: dict[str, Any]) -> None:
    soft = {"value": 0.9}
    tiny["training"]["fixed_windows"] = True
    tiny["study"] |= {
        **{"baseline": "plain", "seeds": [0], "also": ["distillation/soft_weight", "teacher_flops"]},
        "prepare": {
            "teacher": {"train": {"model.dim": 24, "training.steps": 6}},
            "few": {"cache": {"teacher": "teacher", "k": 5}},
        },
        "arms": {
            "plain": {},
            "frozen": {"distillation": {"source": "frozen", "teacher": "prepared:teacher", "soft_weight": soft}},
            "cached": {"distillation": {"source": "cached", "cache": "prepared:few", "soft_weight": soft}},
        },
    }
    status, printed = call({**tiny, "workers": 2})
    assert status == 0, printed
    found = {row["arm"]: row for row in rows(tiny)}
    assert [name for name in found if name in ("teacher", "few", "cached")] == ["teacher", "few", "cached"]
    assert found.keys() - {"teacher", "few", "cached"} == {"plain", "frozen"}
    assert {found[name]["purpose"] for name in ("teacher", "few")} == {"prepare"}
    assert found["teacher"]["metrics"]["steps"] == 6
    assert found["frozen"]["overrides"]["distillation"]["teacher"] == "prepared:teacher", "no path of this machine"
    teachers_loss = found["teacher"]["metrics"]["validation/bits_per_byte"]
    assert found["frozen"]["metrics"]["validation/teacher_bits_per_byte"] == teachers_loss
    assert found["cached"]["metrics"]["teacher_flops"] == 0
    assert found["few"]["metrics"]["teacher_flops"] > found["frozen"]["metrics"]["teacher_flops"] > 0
    assert found["cached"]["metrics"]["distillation/soft_weight"] == pytest.approx(0.9)
    assert "distillation/soft_weight" not in found["plain"]["metrics"]
    teacher_flops = found["frozen"]["metrics"]["teacher_flops"]
    assert found["frozen"]["curve"]["teacher_flops"][-1] == pytest.approx(teacher_flops, rel=1e-5)
    results = Path(tiny["results_dir"])
    assert "- prepared: few in " in (results / "table.md").read_text()
    assert (results / "total_flops.png").exists()

    more = {**tiny, "study": {**tiny["study"], "seeds": [0, 1]}}
    path = results / "rows.jsonl"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if '"arm": "frozen"' not in line))
    status, printed = call(tiny)
    assert status == 0, printed
    assert "prepare" not in printed.replace("prepared: ", ""), "both are still at hand"
    again = {row["arm"]: row for row in rows(tiny)}
    assert again["frozen"]["metrics"] == found["frozen"]["metrics"]

    shutil.rmtree(tiny["output_dir"])  # another machine
    status, printed = call(tiny)
    assert (status, list(Path(tiny["output_dir"], "study_tiny").glob("*/"))) == (0, [])
    status, printed = call(more)
    assert status == 0, printed
    assert "prepared again: teacher: as in its row" in printed
    assert "prepared again: few: as in its row" in printed
    assert sorted((row["arm"], row["seed"]) for row in rows(tiny))[:2] == [("cached", 0), ("cached", 1)]
    assert len(rows(tiny)) == 8

    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"frozen"' not in line))
    [folder] = Path(tiny["output_dir"], "study_tiny").glob("teacher_prepare*")
    (folder / "rows.json").unlink()  # as if it was killed while it was prepared again
    assert (folder / "run" / "checkpoints" / "last.ckpt").exists()
    status, printed = call(tiny)
    assert status == 0, printed
    assert "prepared again: teacher" in printed, "a checkpoint alone may be half of one"
    assert "prepared again: few" not in printed

    other = {"teacher": {"train": {"model.dim": 24, "training.steps": 5}}, "few": tiny["study"]["prepare"]["few"]}
    with pytest.raises(InputError, match=r"rows.jsonl:[0-9]: results of another.*training.steps: 6 there, 5 now"):
        call({**tiny, "study": {**more["study"], "prepare": other, "seeds": [0, 1, 2]}})
    assert len(rows(tiny)) == 7


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_without_its_teacher_a_run_is_missing_and_the_others_go_on(tiny: dict[str, Any]) -> None:
    tiny["study"] |= {
        **{"seeds": [0], "prepare": {"teacher": {"train": {"training.seq_len": 10**5}}}},
        "arms": {"dense": {}, "frozen": {"distillation": {"source": "frozen", "teacher": "prepared:teacher"}}},
    }
    status, printed = call(tiny)
    assert status == 1
    assert [row["arm"] for row in rows(tiny)] == ["dense"]
    assert "error: teacher, prepare, seed 0, learning rate x1 failed: " in printed
    assert "missing: frozen, seed 0" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_fails_is_named_and_the_others_go_on(tiny: dict[str, Any]) -> None:
    tiny["study"] |= {"arms": {"dense": {}, "broken": {"training.seq_len": 10**5}}, "seeds": [0]}
    status, printed = call(tiny)
    assert status == 1
    assert [row["arm"] for row in rows(tiny)] == ["dense"]
    assert "error: broken, measure, seed 0, learning rate x1 failed: " in printed
    assert "missing: broken, seed 0" in printed


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.slow
def test_a_variant_is_compared_with_the_run_that_it_evaluates(tiny: dict[str, Any]) -> None:
    """Where a row came from a machine that rounds otherwise, and its variant is missing, both are made here."""
    variants = {"hot": {"arm": "moe", "overrides": {"model.norm_eps": 1e-6}}}
    tiny["study"] |= {"seeds": [0], "variants": variants}
    assert call(tiny)[0] == 0
    path = Path(tiny["results_dir"], "rows.jsonl")
    here = rows(tiny)
    for elsewhere in (5.0, here[1]["metrics"]["validation/bits_per_byte"]):
        moved = [row for row in rows(tiny) if row["arm"] != "hot"]
        moved[1]["metrics"]["validation/bits_per_byte"] = elsewhere
        path.write_text("".join(json.dumps(row) + "\n" for row in moved))
        status, printed = call(tiny)
        assert status == 0, printed
        assert [row["metrics"] for row in rows(tiny)] == [row["metrics"] for row in here]
        said = "run again for its variants: moe, measure, seed 0, learning rate x1: "
        assert said + ("differs from its row" if elsewhere == 5 else "as in its row") in printed


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_damaged_rows_and_other_data_are_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["study"]["seeds"] = [0]
    assert call(tiny)[0] == 0
    path = Path(tiny["results_dir"], "rows.jsonl")
    whole = path.read_bytes()
    for changes, message in (
        ({"status": ...}, r"rows.jsonl:1: damaged \(KeyError: 'status'"),
        ({"cpu_seconds": "7"}, r"cpu_seconds is '7', no number"),
        ({"metrics": {"validation/bits_per_byte": float("nan")}}, r"validation/bits_per_byte is nan, no number"),
        ({"metrics": None}, r"rows.jsonl:1: damaged"),
        ({"digest": "0" * 16}, r"rows.jsonl:1: damaged, its content has not the digest"),
    ):
        row = {key: value for key, value in {**rows(tiny)[0], **changes}.items() if value is not ...}
        path.write_bytes((json.dumps(row) + "\n").encode() + whole.splitlines(keepends=True)[1])
        with pytest.raises(InputError, match=message):
            call(tiny)
        path.write_bytes(whole)
    path.write_bytes(b"\xff" + whole)
    with pytest.raises(InputError, match=r"rows.jsonl: damaged"):
        call(tiny)
    path.write_bytes(whole)
    (tmp_path / "other").mkdir()
    for i in range(8):
        (tmp_path / "other" / f"{i}.py").write_text(f"x = {i}\n" * 99)
    elsewhere = {**tiny, "data": {**tiny["data"], "path": str(tmp_path / "other")}}
    with pytest.raises(InputError, match="content hash of the data"):  # also if nothing is missing
        call(elsewhere)
    with holding(Path(tiny["results_dir"])), pytest.raises(InputError, match="another process is running this study"):
        call({**tiny, "output_dir": str(tmp_path / "elsewhere")})
    assert path.read_bytes() == whole


MIXER = """
from torch import nn

class Mixer(nn.Linear):
    def __init__(self, dim):
        super().__init__(dim, dim)
"""


@pytest.mark.slow
def test_code_that_changes_while_a_study_runs_is_refused(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / "mixers_of_a_study.py"
    parts.write_text(MIXER)
    monkeypatch.syspath_prepend(tmp_path)
    edits = ["job", "study"]

    class Edited(slots.InThisProcess):
        """The user edits the file after a run is planned, then after one has ended."""

        def begin(self, folder: Path) -> None:
            if edits[0] == "job":
                parts.write_text(f"{MIXER}# edited\n")
            super().begin(folder)
            if edits[0] == "study":
                parts.write_text(f"{MIXER}# edited\n")

    monkeypatch.setattr(runner, "Worker", Edited)
    layers = {"mixer": {"type": "mixers_of_a_study.Mixer"}, "ffn": "dense"}
    intervals = {"interleave_moe_layer_step": None, "nope_layer_interval": None}
    tiny["model"] = {**tiny["model"], **intervals, "pattern": [layers]}
    tiny["study"] |= {"arms": {"mine": {}}, "baseline": "mine"}
    status, printed = call({**tiny, "study": {**tiny["study"], "seeds": [0]}})
    assert status == 1
    assert "mixers_of_a_study.Mixer: its source file has changed since the study planned this run" in printed
    edits.pop(0)
    parts.write_text(MIXER)
    with pytest.raises(InputError, match=r"mixers_of_a_study.Mixer: its source file has changed while the study ran"):
        call({**tiny, "workers": 1})
    assert [row["seed"] for row in rows(tiny)] == [0], "what has finished is kept"
    with pytest.raises(InputError, match=r"source file of mixers_of_a_study.Mixer"):
        call(tiny)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.slow
def test_the_config_of_a_study_without_rows_is_not_kept(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["study"]["seeds"] = [0]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "config.yaml").write_text("name: of a study that was stopped before its first row\n")
    assert call(tiny)[0] == 0
    assert call(tiny)[0] == 0, "what was written with the rows is taken for their config"
    with pytest.raises(InputError, match=r"output_dir='.*rows.jsonl': cannot be written"):
        call({**tiny, "output_dir": str(tmp_path / "results" / "rows.jsonl")})
    with pytest.raises(InputError, match=r"results_dir='.*rows.jsonl/below': cannot be written"):
        call({**tiny, "results_dir": str(tmp_path / "results" / "rows.jsonl" / "below")})


def test_bad_input_is_refused_before_anything_is_written(tiny: dict[str, Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"arms": {"dense": {"model.depth": 3}}}, r"study.arms.dense.model.depth: the run config has no such key"),
        ({"baseline": "sparse"}, r"study.baseline='sparse': unknown arm; must be one of dense, moe"),
        ({"arms": None}, r"experiment: give a study; must be one of .*study_score_placement"),
    ):
        with pytest.raises(InputError, match=message):
            call({**tiny, "study": {**tiny["study"], **changes}})
    for workers in (0, True):
        with pytest.raises(InputError, match=rf"workers={workers}: must be an integer from 1 to"):
            call({**tiny, "workers": workers})
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow_but_for("balancing", "codistillation_dense")
@pytest.mark.parametrize("name", STUDIES)
def test_every_study_that_ships_is_valid(composed: Callable[..., dict[str, Any]], name: str) -> None:
    config = composed(f"experiment={name}", config="study", smoke=False)
    shipped = from_mapping(StudyConfig, config.pop("study"), "study")
    for key in ("workers", "results_dir"):
        config.pop(key)
    validate(shipped, config)
    assert len(shipped.seeds) >= 3
    # what a precision costs is asked at the settings of the exact one, what a teacher gives at the student's own, and
    # ways of balancing at the rates that were best for each of them in a smaller study; mixtures of modalities have the
    # rates of experiment=early_fusion
    assert (shipped.tune is None) == (
        name in ("study_fp8", "study_codistillation_ood", "study_balancing_large", "study_fusion")
    )


IROPE = [
    *("data=files", "data.tokenizer=bpe", "data.vocab_size=300", "training.seq_len=128"),
    *("study.evaluation_options.loss_by_position.stretches=1", "study.evaluation_options.needle.samples=1"),
    *("++study.evaluation_options.loss_by_position.split=train", "++study.evaluation_options.needle.split=train"),
    *("study.evaluation_options.needle.multiples=[1,4]", "study.evaluation_options.needle.depths=[0.5]"),
    "study.evaluation_options.loss_by_position.multiple=8",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
@pytest.mark.parametrize("name", ["study_irope", "study_irope_no_conv", "study_irope_recall", "study_mixers_recall"])
def test_arms_and_variants_of_the_long_context_studies_run(
    composed: Callable[..., dict[str, Any]], corpus: Path, tmp_path: Path, name: str
) -> None:
    """Two steps of every arm as the worker does them: metrics, evaluations and variants are there."""
    recalls = name.endswith("recall")
    source = ["data.task.test_sequences=2"] if recalls else [*IROPE, f"data.path={corpus}"]
    steps = ["training.steps=2", "training.batch_size=2", "training.validate_every=1", "training.validation_batches=1"]
    config = composed(f"experiment={name}", *source, *steps, "model.dim=16", config="study", smoke=False)
    shipped = from_mapping(StudyConfig, config.pop("study"), "study")
    for key in ("workers", "results_dir"):
        config.pop(key)
    config["trainer"] |= {"precision": "32-true", "threads": 1}
    for arm, overrides in shipped.arms.items():
        if name == "study_irope_no_conv" and arm != "RoPE":
            continue  # its arms are those of study_irope
        folder = tmp_path / arm
        folder.mkdir()
        job = job_of(shipped, config, Cell(arm, None, overrides), "measure", 0, 1.0)
        variants = {key: variant.overrides for key, variant in shipped.variants.items() if variant.arm == arm}
        description = {
            **{"row": dataclasses.asdict(job), "config": run_config_of(shipped, config, job), "metric": shipped.metric},
            **{
                "evaluations": shipped.evaluations,
                "evaluation_options": shipped.evaluation_options,
                "variants": variants,
            },
        }
        (folder / "job.json").write_text(json.dumps(description))
        first, *others = work(folder)
        assert [row["arm"] for row in (first, *others)] == [arm, *variants]
        for row in (first, *others):
            assert row["status"] == "finished"
            assert row["metrics"].keys() >= {shipped.metric, *shipped.also}
        for row in others if not recalls else ():
            assert row["metrics"][shipped.metric] != first["metrics"][shipped.metric], f"{row['arm']} changes nothing"
            assert row["overrides"].items() >= variants[row["arm"]].items()


def test_train_says_where_a_study_belongs(composed: Callable[..., dict[str, Any]]) -> None:
    expected = "^this is a study: moesaic study experiment=study_score_placement$"
    with pytest.raises(InputError, match=expected):
        train.train(composed("experiment=study_score_placement", smoke=False))


WORKER = """
import sys, time
from pathlib import Path
from moesaic.data import TrainingLoader
from moesaic.studies import serving, worker
hold = Path(sys.argv[1])
batch = TrainingLoader.batch
def work(folder):
    def held(self, i):
        while hold.exists() and i >= int(hold.read_text()):
            (folder / "held").touch()
            time.sleep(0.02)
        return batch(self, i)
    TrainingLoader.batch = held
    worker.main(folder)
serving.serve(work)
"""

DRIVER = """
import functools, json, os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits that it is ignored
from moesaic.cli import study
from moesaic.cli.common import exit_on_bad_input
from moesaic.studies import runner, slots
config, worker, hold = sys.argv[1:]
runner.Worker = functools.partial(runner.Worker, command=[sys.executable, "-c", worker, hold])
sys.exit(exit_on_bad_input(lambda: study.study(json.load(open(config)), "moesaic study ...")))
"""


@pytest.fixture
def long_run(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A study of one run that waits at the step in tmp_path/hold, and its config in tmp_path/study.json."""
    tiny["study"] |= {"arms": {"dense": {}}, "seeds": [0]}
    tiny["training"] |= {"steps": 40, "checkpoint_every": 10, "validate_every": 20}
    (tmp_path / "study.json").write_text(json.dumps(tiny))
    (tmp_path / "hold").write_text("15")
    return tiny


@contextlib.contextmanager
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "study.json"), WORKER, str(tmp_path / "hold")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def processes_of(hold: Path) -> dict[int, int]:
    """The processes of workers that wait for this file, and their parents; a job is one whose parent is another."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_text(errors="replace").split("\0")[2:4] == [WORKER, str(hold)]:
                found[int(path.parent.name)] = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300  # for what never comes
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not FORKS, reason="finds workers through /proc")
@pytest.mark.parametrize("dies", ["its job", "the worker"])
def test_killed_and_continued_equals_uninterrupted(long_run: dict[str, Any], tmp_path: Path, dies: str) -> None:
    outputs, hold = Path(long_run["output_dir"]), tmp_path / "hold"

    def stopped_at() -> int:
        [checkpoint] = outputs.glob("study_tiny/*/run/checkpoints/last.ckpt")
        step: int = load_checkpoint(checkpoint)["global_step"]
        return step

    with started(tmp_path) as process:
        wait_for(lambda: list(outputs.glob("study_tiny/*/held")), "step 15")
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not processes_of(hold), "the end of the worker and its job after that of the study")
    assert stopped_at() == 10
    assert not Path(long_run["results_dir"], "rows.jsonl").exists()

    hold.write_text("25")
    [held] = outputs.glob("study_tiny/*/held")
    held.unlink()
    with started(tmp_path) as process:
        wait_for(held.exists, "step 25 of the continued run")
        processes = processes_of(hold)
        [job] = [pid for pid, parent in processes.items() if parent in processes]
        os.kill(job if dies == "its job" else processes[job], signal.SIGKILL)
        printed, _ = process.communicate()
    assert process.returncode == 1
    assert "failed: killed by signal 9" in printed
    assert processes_of(hold) == {}
    assert stopped_at() == 20

    status, printed = call(long_run)
    assert status == 0, printed
    [row] = rows(long_run)
    whole = {key: value for key, value in long_run.items() if key not in ("study", "workers", "results_dir")}
    trainer = {**whole["trainer"], "threads": 1, "precision": "32-true"}
    expected = run({**whole, "run_dir": str(tmp_path / "whole"), "trainer": trainer})
    assert row["metrics"]["validation/loss"] == expected["validation/loss"]
    assert row["metrics"]["steps"] == 40


@pytest.mark.slow
@pytest.mark.skipif(not FORKS, reason="finds workers through /proc")
def test_interrupt_ends_the_workers_and_says_how_to_continue(long_run: dict[str, Any], tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    with started(tmp_path) as process:
        wait_for(lambda: len(processes_of(hold)) == 2, "a worker and its job")
        with pytest.raises(InputError, match=r"another process is running this study"):
            call(long_run)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate()
    assert process.returncode == 130
    assert "continue from their last checkpoints with\n  moesaic study ..." in printed
    assert "Traceback" not in printed
    assert processes_of(hold) == {}


@pytest.mark.slow
def test_rows_of_one_worker_are_those_of_fresh_processes(tiny: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, but for clocks and memory, though the worker did other runs before."""
    tiny["workers"] = 1
    assert call(tiny)[0] == 0
    folders = sorted(path.parent for path in Path(tiny["output_dir"]).glob("study_tiny/*/rows.json"))
    assert len(folders) == 4
    measured = ("seconds", "tokens_per_second", "peak_memory_bytes")

    def row_in(folder: Path) -> dict[str, Any]:
        [row] = json.loads((folder / "rows.json").read_text())
        curve = {key: values for key, values in row["curve"].items() if key != "seconds"}
        metrics = {key: value for key, value in row["metrics"].items() if key not in measured}
        return {**row, "curve": curve, "metrics": metrics, "cpu_seconds": 0}

    for folder in folders:
        alone = tmp_path / "alone" / folder.name
        alone.mkdir(parents=True)
        shutil.copy(folder / "job.json", alone)
        code = "import sys, pathlib; from moesaic.studies import worker; worker.main(pathlib.Path(sys.argv[1]))"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code, str(alone)], env=environment, check=True, capture_output=True)
        assert row_in(alone) == row_in(folder)
        weights = [load_checkpoint(path / "run" / "checkpoints" / "last.ckpt") for path in (alone, folder)]
        first, second = (checkpoint["state_dict"] for checkpoint in weights)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
