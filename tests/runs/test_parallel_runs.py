"""Whole runs of several processes: they are the run of one process, and go on with any other number of them."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from small_runs import SMOKE
from torch import distributed

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.cli.train import train
from moesaic.errors import InputError
from moesaic.parallel.workers import Workers

Composed = Callable[..., dict[str, Any]]

SIZES = ("trainer.precision=64-true", "training.batch_size=4", "training.seq_len=32", "model.num_layers=2")
SIZES += ("model.vocab_size=258",)  # bytes and one more, which two ranks can share
STEPS = (
    *SIZES,
    "model.vocab_size=258",
    "training.steps=4",
    "training.log_every=1",
    "finish=score",
    "training.validate_every=2",
)


def on_a_rank(config: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """The run in a process that has met the others, as torchrun would start it."""
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    before = dict(os.environ)
    os.environ |= {"LOCAL_RANK": str(rank), "MOESAIC_RUN_DIR": config["run_dir"]}
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    try:
        return train(config, overrides)
    finally:
        os.environ.clear()
        os.environ |= before


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Those of training: a run that is stopped validates then."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def require_equal_runs(found: Path, wanted: Path, tolerance: float = 1e-9) -> None:
    there, here = rows(wanted), rows(found)
    assert [row["step"] for row in here] == [row["step"] for row in there]
    for row, other in zip(here, there, strict=True):
        for name, value in row.items():
            if "second" in name or not value:
                continue
            within = 1e-5 if name.startswith("router/") else tolerance  # entropies are sums in fp32 in any run
            assert float(value) == pytest.approx(float(other[name]), rel=within, abs=within), (row["step"], name)
    mine, theirs = (load_checkpoint(each / "checkpoints" / "last.ckpt") for each in (found, wanted))
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], weight, atol=tolerance, rtol=tolerance)
    [optimizer], [other] = mine["optimizer_states"], theirs["optimizer_states"]
    assert optimizer["param_groups"] == other["param_groups"]
    for i, state in other["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(optimizer["state"][i][name], value, atol=tolerance, rtol=tolerance)
    assert mine["moesaic"]["progress"] == theirs["moesaic"]["progress"]


def several(
    devices: int, expert: int = 1, shard: bool = True, directory: bool = True, tensor: int = 1
) -> tuple[str, ...]:
    keys = {"parallel.shard": shard, "parallel.sharded_checkpoints": directory}
    switches = (f"{key}={str(value).lower()}" for key, value in keys.items())
    return (f"trainer.devices={devices}", f"parallel.expert={expert}", f"parallel.tensor={tensor}", *switches)


class StopsAlone(Callback):
    """Decides on the second rank alone, after two steps, that training ends."""

    def on_train_batch_end(self, trainer: Trainer, *others: Any) -> None:
        trainer.should_stop = trainer.should_stop or (trainer.global_rank == 1 and trainer.global_step == 2)


@pytest.mark.slow
def test_what_one_rank_decides_holds_for_all(composed: Composed, tmp_path: Path, workers: Workers) -> None:
    typed = (*STEPS, *several(2), f"+callbacks.it._target_={__name__}.StopsAlone", f"run_dir={tmp_path / 'run'}")
    found, _ = workers.run(on_a_rank, 2, composed(*typed), typed)
    assert found["steps"] == 2 and [row["step"] for row in rows(tmp_path / "run")] == ["1", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_range_test_has_the_loss_of_all_ranks(
    shard: bool, composed: Composed, tmp_path: Path, workers: Workers
) -> None:
    """Parts of a loss, or DDP's multiples, would explode at other steps."""
    keys = {"explosion": 1.01, "smoothing": 0.0, "highest": 1000.0}
    settings = [f"callbacks.learning_rate_finder.{key}={value}" for key, value in keys.items()]
    typed = (*SIZES, "callbacks=learning_rate_finder", *settings, "training.steps=12", "finish=score")
    [whole] = workers.run(on_a_rank, 1, composed(*typed, f"run_dir={tmp_path / 'one'}"), typed)
    typed += several(2, shard=shard)
    found, _ = workers.run(on_a_rank, 2, composed(*typed, f"run_dir={tmp_path / 'two'}"), typed)
    name = "learning_rate_finder/factor"
    assert found["steps"] == whole["steps"] < 12 and found[name] == pytest.approx(whole[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        [(4, 2), (2, 2), (1, 1)],
        [(1, 1), (2, 1), (4, 4)],
        [(2, 2, True, False), (4, 1), (2, 1, False)],
        [(4, 2, True, True, 2), (2, 2), (1, 1)],
        [(1, 1), (2, 1, True, True, 2), (4, 1, True, False, 2)],
    ],
)
def test_a_run_goes_on_with_any_number_of_processes(
    composed: Composed, tmp_path: Path, workers: Workers, layouts: list[tuple[int, ...]]
) -> None:
    """Stopped after every step, each of which other processes make, with the state of the optimizer that is there."""
    [whole] = workers.run(on_a_rank, 1, composed(*STEPS, f"run_dir={tmp_path / 'whole'}"), STEPS)
    for layout in [*layouts, layouts[-1]]:
        limit = ("trainer.max_time=00:00:00:00", "resume=true", f"run_dir={tmp_path / 'moved'}")
        overrides = (*STEPS, *limit, *several(*layout))
        metrics, *others = workers.run(on_a_rank, layout[0], composed(*overrides), overrides)
        assert all(set(each) <= {"status", "stopped_by"} for each in others), "one rank alone has results"
        is_directory = layout[0] > 1 and all(layout[2:4])  # shard, directory
        assert (tmp_path / "moved" / "checkpoints" / "last.ckpt").is_dir() == is_directory
    assert metrics["status"] == whole["status"] == "finished"
    assert metrics["validation/loss"] == pytest.approx(whole["validation/loss"], rel=1e-7)
    require_equal_runs(tmp_path / "moved", tmp_path / "whole")
    load_model(tmp_path / "moved" / "checkpoints" / "last.ckpt")


def checks(run_dir: Path) -> list[dict[str, float]]:
    """What was logged of each validation."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["validation/loss"]]
    names = ("validation/", "drift")
    return [
        {name: float(each) for name, each in row.items() if each and any(n in name for n in names)} for row in found
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(4, 2), (2, 1), (2, 1, False), (4, 2, True, True, 2)])
def test_ranks_share_a_validation(
    composed: Composed, tmp_path: Path, workers: Workers, layout: tuple[int, ...]
) -> None:
    """Batches of two windows, so that with four ranks two of them have none."""
    given = (*STEPS, "training.validation_seq_len=64", "training.validation_batches=3")
    for name, overrides in (("whole", given), ("shared", (*given, *several(*layout)))):
        ranks = layout[0] if name == "shared" else 1
        workers.run(on_a_rank, ranks, composed(*overrides, f"run_dir={tmp_path / name}"), overrides)
    shared, whole = checks(tmp_path / "shared"), checks(tmp_path / "whole")
    assert len(whole) == 2 and any("drift" in name for name in whole[1])
    # the nats of a token are kept in fp32, and a shared vocabulary sums them otherwise
    within = 1e-7 if layout[4:] else 1e-12
    for here, there in zip(shared, whole, strict=True):
        assert here == pytest.approx(there, rel=within, abs=1e-12)


JOINT = (
    "experiment=codistill_joint",
    *(f"distillation.teacher_model.{each}" for each in ("dim=16", "hidden_dim=24", "moe.hidden_dim=24")),
    *(f"distillation.teacher_model.attention.{each}" for each in ("num_heads=4", "num_kv_heads=2")),
)


@pytest.mark.slow
def test_a_teacher_that_trains_along_is_shared_too(composed: Composed, tmp_path: Path, workers: Workers) -> None:
    overrides = (*JOINT, *STEPS)
    [whole] = workers.run(on_a_rank, 1, composed(*overrides, f"run_dir={tmp_path / 'whole'}"), overrides)
    shared = (*overrides, *several(2, 2, tensor=2), f"run_dir={tmp_path / 'shared'}")
    metrics = workers.run(on_a_rank, 2, composed(*shared), shared)[0]
    assert metrics["status"] == whole["status"] == "finished"
    require_equal_runs(tmp_path / "shared", tmp_path / "whole")


WINDOWS = (
    "model.attention.window=8",
    "model.pattern=[{mixer: windowed_rope, ffn: dense}]",
    "model.interleave_moe_layer_step=null",
    "model.nope_layer_interval=null",
)
TENSOR_3 = ("trainer.devices=6", "parallel.tensor=3", "training.batch_size=4")
HEADS_3 = (
    *("model.attention.num_heads=3", "model.attention.num_kv_heads=3", "model.dim=48"),
    *("model.hidden_dim=96", "model.moe.hidden_dim=96"),
)


@pytest.mark.slow_but_for("overrides1-message1", "overrides0-message0", "overrides9-message9", "overrides18-message18")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.devices=3", "training.batch_size=4"],
            r"^training\.batch_size=4: counts the sequences of all 3 processes, and must be a multiple of 3, such as 3 "
            r"or 6; as it is, 1, 2, 4 processes are allowed$",
        ),
        (
            ["trainer.devices=4", "parallel.expert=3", "training.batch_size=4"],
            r"^parallel\.expert=3: must divide the 4 processes of the run \(trainer\.devices \* trainer\.num_nodes\); "
            r"allowed: 1, 2, 4$",
        ),
        (["parallel.expert=2"], r"^parallel\.expert=2: must divide the 1 process of the run .*; allowed: 1$"),
        (
            [
                *("trainer.devices=4", "trainer.num_nodes=2", "parallel.expert=8"),
                *("training.batch_size=8", "model.moe.num_experts=12"),
            ],
            r"^parallel\.expert=8: must divide model\.moe\.num_experts=12; allowed with 8 processes: 1, 2, 4$",
        ),
        (
            ["trainer.devices=2", "parallel.expert=2", "model.dense_twin=true"],
            r"^parallel\.expert=2: must be 1 for a model without MoE layers$",
        ),
        (
            ["trainer.devices=2", "parallel.expert=2", "trainer.strategy=ddp"],
            r"^trainer\.strategy='ddp': must be auto with parallel\.expert=2$",
        ),
        (["parallel.expert=0"], r"^parallel\.expert=0: must be a number >= 1$"),
        (["parallel.tensor=0"], r"^parallel\.tensor=0: must be a number >= 1$"),
        (["parallel.tensor=2"], r"^parallel\.tensor=2: must divide the 1 process of the run .*; allowed: 1$"),
        (
            ["trainer.devices=6", "parallel.tensor=2", "training.batch_size=4"],
            r"^training\.batch_size=4: counts the sequences of all 6 processes, of which 2 each have the same ones, "
            r"and must be a multiple of 3, such as 3 or 6; as it is, 2, 4, 8 processes are allowed$",
        ),
        (
            [*TENSOR_3, "model.attention.num_heads=8", "model.attention.num_kv_heads=4"],
            r"^parallel\.tensor=3: must divide model\.attention\.num_heads=8; allowed with 6 processes: 1, 2$",
        ),
        (
            [*TENSOR_3, "model.attention.num_heads=12", "model.attention.num_kv_heads=4", "model.dim=96"],
            r"^parallel\.tensor=3: must divide model\.attention\.num_kv_heads=4; allowed with 6 processes: 1, 2$",
        ),
        (
            [*TENSOR_3, *HEADS_3, "model.attention.qk_norm=per_head"],
            r"^parallel\.tensor=3: must be 1 with model\.attention\.qk_norm=per_head, whose gains the heads share$",
        ),
        (
            [*TENSOR_3, *HEADS_3, "model.attention.attention_chunk_size=null", "model.attention.sinks=true"],
            r"^parallel\.tensor=3: must be 1 with model\.attention\.sinks=True, which are whole on a rank$",
        ),
        (
            [*TENSOR_3, *HEADS_3, *WINDOWS],
            r"^parallel\.tensor=3: must be 1 with windowed_rope layers in model\.pattern$",
        ),
        (
            [*TENSOR_3, *HEADS_3, "model.hidden_dim=64"],
            r"^parallel\.tensor=3: must divide model\.hidden_dim=64; allowed",
        ),
        (
            [*TENSOR_3, *HEADS_3, "model.moe.shared_hidden_dim=8"],
            r"^parallel\.tensor=3: must divide model\.moe\.shared_hidden_dim=8; allowed with 6 processes: 1$",
        ),
        (
            [*JOINT, "trainer.devices=4", "parallel.tensor=4", "model.attention.num_kv_heads=4"],
            r"^parallel\.tensor=4: must divide distillation\.teacher_model\.attention\.num_kv_heads=2; allowed with 4 ",
        ),
        (
            [*TENSOR_3, *HEADS_3, "model.vocab_size=1024"],
            r"^parallel\.tensor=3: must divide model\.vocab_size=1024; allowed with 6 processes: 1, 2; "
            r"or model\.vocab_size=1026$",
        ),
        (
            ["trainer.devices=2", "parallel.tensor=2", "trainer.strategy=ddp"],
            r"^trainer\.strategy='ddp': must be auto with parallel\.tensor=2$",
        ),
        (
            ["trainer.devices=2", "parallel.tensor=2", "trainer.precision=fp8"],
            r"^trainer\.precision='fp8': must be another with parallel\.tensor=2",
        ),
        (["parallel.tensor=2", "parallel.shard=false"], r"^parallel\.shard=false: must be true with tensor=2$"),
        (["parallel.expert=2", "parallel.shard=false"], r"^parallel\.shard=false: must be true with expert=2$"),
        (
            ["trainer.devices=2", "callbacks=ema"],
            r"^callbacks: an average of the weights, with 2 processes; must be left",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(
    composed: Composed, overrides: list[str], message: str
) -> None:
    config = composed(*overrides)
    with pytest.raises(InputError, match=message):
        train(config, overrides)
    assert not Path(config["output_dir"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["lightning", "torchrun"])
def test_the_command_on_two_processes_is_that_of_one(
    corpus: Path, tmp_path: Path, starter: str, composed: Composed, workers: Workers
) -> None:
    [whole] = workers.run(on_a_rank, 1, composed(*STEPS, f"run_dir={tmp_path / 'one'}"), STEPS)
    python = [sys.executable]
    if starter == "torchrun":
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    typed = [*SMOKE, *STEPS, f"data.path={corpus}", "sample.max_new_tokens=0", *several(2, 2)]
    where = [f"output_dir={tmp_path / 'outputs'}"] if starter == "torchrun" else [f"run_dir={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*python, "-m", "moesaic", "train", *typed, *where]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written") == 1, "one rank prints"
    [run_dir] = [path.parent for path in tmp_path.rglob("metrics.json") if path.parent.name != "one"]
    require_equal_runs(run_dir, tmp_path / "one")
    assert len(list(tmp_path.rglob("config.yaml"))) == 2, "no rank makes a directory of its own"
    assert whole["status"] == "finished"


DIES = """
import os, signal
from lightning.pytorch import Callback

class Dies(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_a_way_to_go_on(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DIES)
    typed = [*SMOKE, *STEPS, f"data.path={corpus}", "run_dir=two", *several(2, 2), "training.checkpoint_every=2"]
    command = [sys.executable, "-m", "moesaic", "train", *typed, "+callbacks.it._target_=dying.Dies"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: another process of this run has ended (" in done.stderr and "Traceback" not in done.stderr
    assert "failed; to continue from the last checkpoint:\n  moesaic train resume=true run_dir=two" in done.stdout


UNEVEN_JOINT = (
    *("debug=smoke", "experiment=codistill_joint", "data=selective_copying", "training.accumulate=2"),
    *("model.dim=16", "model.attention.head_dim=4", "balance.router_z_loss_weight=0.01"),
    *("distillation.teacher_model.dim=24", "distillation.teacher_model.hidden_dim=32"),
    *("distillation.teacher_model.attention.num_heads=4", "distillation.teacher_model.attention.num_kv_heads=2"),
    *("distillation.teacher_model.moe.hidden_dim=16", "distillation.soft_weight.schedule=constant"),
    *("distillation.soft_weight.value=0.5", "distillation.soft_weight.gap=null"),
)
"""A teacher that trains along, on sequences with different numbers of answers, so that ranks have different labels."""


@pytest.mark.slow
def test_soft_targets_on_two_processes_are_those_of_one(composed: Composed, tmp_path: Path, workers: Workers) -> None:
    given = (*UNEVEN_JOINT, *STEPS, f"output_dir={tmp_path}")
    [whole] = workers.run(on_a_rank, 1, composed(*given, f"run_dir={tmp_path / 'one'}", smoke=False), ())
    two = composed(*given, f"run_dir={tmp_path / 'two'}", *several(2, shard=False), smoke=False)
    metrics, _ = workers.run(on_a_rank, 2, two, ())
    assert metrics["validation/loss"] == pytest.approx(whole["validation/loss"], rel=1e-9)
    assert float(rows(tmp_path / "one")[-1]["distillation/soft_weight"]) == 0.5
    require_equal_runs(tmp_path / "two", tmp_path / "one")
