"""Checkpoints of runs of several processes: directories that any command reads, and that a kill cannot lose."""

import hashlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parallel_runs import STEPS, on_a_rank, require_equal_runs, several

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.cli.convert import convert
from moesaic.cli.train import train
from moesaic.config import from_mapping, to_mapping
from moesaic.data import DataConfig
from moesaic.distillation.teachers import load_teacher, require_teacher, teacher_tokenizer
from moesaic.errors import InputError
from moesaic.parallel.manifest import Manifest, read_manifest
from moesaic.parallel.workers import Workers
from moesaic.training.starting import find_run
from moesaic.training.stored_state import require_training_state

Composed = Callable[..., dict[str, Any]]

LAST = Path("checkpoints", "last.ckpt")


@pytest.fixture
def stopped(composed: Composed, tmp_path: Path, workers: Workers) -> Path:
    """The directory of a run that two processes began, and stopped after a step."""
    overrides = (*STEPS, "trainer.max_time=00:00:00:00", f"run_dir={tmp_path / 'run'}", *several(2, 2))
    workers.run(on_a_rank, 2, composed(*overrides), overrides)
    return tmp_path / "run"


@pytest.mark.slow
def test_commands_read_a_directory(composed: Composed, tmp_path: Path, stopped: Path) -> None:
    last = stopped / LAST
    assert last.is_dir()
    assert (stopped / "checkpoints" / "best.ckpt").is_dir()
    model = load_model(last)
    require_teacher(last)
    with pytest.raises(InputError, match="the directory of a run; give its checkpoint"):
        require_teacher(stopped)
    assert model.tokenizer is not None
    teacher = load_teacher(last, model.tokenizer, model.config.vocab_size)
    assert teacher_tokenizer(last, DataConfig("files", path=".", tokenizer="bpe", vocab_size=300)) is None
    for name, weight in model.decoder.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], weight), name
    with pytest.raises(InputError, match="this model is not a Llama 4: attention"):  # so it was read
        convert(last, tmp_path / "hf")
    convert(last, tmp_path / "whole.ckpt")
    whole = load_checkpoint(tmp_path / "whole.ckpt")
    require_training_state(whole, "it")
    parts = load_checkpoint(last, whole=False)
    require_training_state(parts, "it")
    assert any(weight.is_meta for weight in parts["state_dict"].values())

    def going_on(path: Path) -> dict[str, Any]:
        overrides = (*STEPS, f"ckpt_path={path}", f"run_dir={tmp_path / f'from_{path.name}'}")
        return train(composed(*overrides), overrides)

    assert going_on(last)["validation/loss"] == going_on(tmp_path / "whole.ckpt")["validation/loss"]

    (last / "__1_0.distcp").unlink()
    for devices in (several(1), several(2, 2)):
        overrides = (*STEPS, *devices, f"ckpt_path={last}", f"run_dir={tmp_path / 'refused'}")
        with pytest.raises(InputError, match=r"last\.ckpt/__1_0\.distcp: no such file$"):
            train(composed(*overrides), overrides)
    assert not (tmp_path / "refused").exists()


def forge(path: Path, key: str, value: float) -> None:
    """Put another number into each part of a tensor, so that all hashes are right."""
    content = to_mapping(read_manifest(path))
    for part in content["tensors"][key]["parts"]:
        written = io.BytesIO()
        torch.save(torch.full(part["shape"], value, dtype=torch.float64), written)
        file = path / part["file"]
        part |= {"at": file.stat().st_size, "bytes": len(written.getvalue())}
        file.write_bytes(file.read_bytes() + written.getvalue())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        content["files"][part["file"]] = {"bytes": file.stat().st_size, "sha256": digest}
    (path / "manifest.json").write_text(
        json.dumps(to_mapping(from_mapping(Manifest, {**content, "digest": ""}).signed()))
    )


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_numbers_that_no_run_wrote_are_refused_by_all_ranks(
    composed: Composed, stopped: Path, workers: Workers, value: float
) -> None:
    squares = next(key for key in read_manifest(stopped / LAST).tensors if key.endswith("exp_avg_sq"))
    forge(stopped / LAST, squares, value)
    overrides = ("resume=true", f"run_dir={stopped}")
    with pytest.raises(RuntimeError) as caught:
        workers.run(on_a_rank, 2, composed(*overrides), overrides)
    assert str(caught.value).count("InputError: checkpoint") >= 2
    assert "holds numbers that are not finite, or negative squares" in str(caught.value)
    with pytest.raises(InputError, match=r"must hold finite numbers, and no negative ones if squares"):
        train(composed(*overrides, *several(1)), (*overrides, *several(1)))


def killed_on_a_rank(
    config: dict[str, Any], overrides: tuple[str, ...], rank: int, event: str, what: str, left: int
) -> None:
    """The run; SIGKILL ends the process of a rank that has done this `left` times with such a path, and would again."""

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == event and torch.distributed.get_rank() == rank and what in str(arguments):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)
    on_a_rank(config, overrides)


@pytest.fixture
def own_workers() -> Iterator[Workers]:
    pool = Workers(count=2, patience=120)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "event", "what", "times", "kept"),
    [
        pytest.param(1, "open", "last.ckpt.partial/__1_0.distcp", 2, 1, id="one rank while it writes"),
        pytest.param(1, "open", "last.ckpt.partial/__1_0.distcp", 3, 1, id="one rank while it reads for a hash"),
        pytest.param(0, "os.rename", "last.ckpt.partial/.manifest.json.partial", 1, 1, id="before the list is there"),
        pytest.param(0, "os.rename", "last.ckpt.partial', ", 1, 1, id="between two names"),
        pytest.param(0, "shutil.rmtree", ".last.ckpt.old", 0, 2, id="before the old one is removed"),
    ],
)
def test_a_rank_that_is_killed_costs_what_came_after_the_last_checkpoint(
    composed: Composed,
    tmp_path: Path,
    workers: Workers,
    own_workers: Workers,
    rank: int,
    event: str,
    what: str,
    times: int,
    kept: int,
) -> None:
    where = f"run_dir={tmp_path / 'outputs' / 'default' / 'killed'}"
    overrides = (*STEPS, "training.checkpoint_every=1", where, *several(2, 2))
    with pytest.raises(RuntimeError, match=f"rank {rank} of 2:\nthe process ended"):
        own_workers.run(killed_on_a_rank, 2, composed(*overrides), overrides, rank, event, what, times)
    run_dir = Path(where.partition("=")[2])
    assert load_checkpoint(run_dir / LAST)["global_step"] == kept
    found = find_run({"resume": True, "output_dir": str(tmp_path / "outputs"), "name": "default"})
    assert (found.kind, found.run_dir) == ("unfinished", run_dir)
    again = ("resume=true", where)
    metrics, _ = workers.run(on_a_rank, 2, composed(*again), again)
    assert metrics["status"] == "finished"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    [whole] = workers.run(on_a_rank, 1, composed(*STEPS, f"run_dir={tmp_path / 'whole'}"), STEPS)
    assert metrics["validation/loss"] == pytest.approx(whole["validation/loss"], rel=1e-7)
    require_equal_runs(run_dir, tmp_path / "whole")


@pytest.mark.slow
def test_a_directory_without_its_manifest_is_not_begun_again(stopped: Path) -> None:
    """That would clear the folder."""
    (stopped / LAST / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        train({"resume": True, "run_dir": str(stopped), "trainer": {"devices": 1}}, [])
    shutil.rmtree(stopped / LAST)
    (stopped / LAST).mkdir()
    with pytest.raises(InputError, match=r"last\.ckpt: a directory; must be a file"):
        find_run({"resume": True, "run_dir": str(stopped)})
