"""What TensorBoard gets of a run: losses first, routers over all layers, and a table of runs with numbers."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from moesaic.training.components import make_loggers
from moesaic.training.lightning_options import TENSORBOARD
from moesaic.training.tensorboard import TensorBoardLogger, board_row

COLUMNS = {
    **{"tokens": 10, "seconds": 2, "active_flops": 1e9, "teacher_flops": 1e9, "tokens_per_second": 5.0},
    **{"train/loss": 3.0, "validation/loss": 2.0, "validation/bits_per_byte": 1.0, "learning_rate": 0.1},
    **{"train/grad_norm": 1.0, "train/load_balance_loss": 1.0, "train/router_z_loss": 1.0},
    **{"distillation/soft_weight": 0.5, "validation/teacher_loss": 2.0, "teacher/grad_norm": 1.0},
    **{f"router/layers.{i}.ffn/max_violation": float(i) for i in range(48)},
    **{f"router/layers.{i}.ffn/entropy": i / 100 for i in range(48)},
}


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory / "tensorboard")).Reload()


def test_losses_come_first_and_straight_lines_not_at_all() -> None:
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in sorted(board_row(COLUMNS))))
    assert groups == ["loss", "router", "speed", "teacher", "training"]


def test_48_layers_are_two_charts_for_each_measure() -> None:
    routers = {tag: value for tag, value in board_row(COLUMNS).items() if tag.startswith("router/")}
    assert routers == {
        "router/load_balance_loss": 1.0,
        "router/z_loss": 1.0,
        "router/max_violation/mean": pytest.approx(23.5),
        "router/max_violation/worst": 47.0,
        "router/entropy/mean": pytest.approx(0.235),
        "router/entropy/worst": 0.0,
    }


def test_no_step_is_doubled_after_a_resume(tmp_path: Path) -> None:
    for first, step in ((1, 0), (4, 3)):
        [board] = make_loggers({"tensorboard": TENSORBOARD}, tmp_path, step)
        for at in range(first, first + 3):
            board.log_metrics({"train/loss": float(first)}, step=at)
        if first == 1:
            board.log_metrics({"train/loss": 9.0}, step=4)  # after the checkpoint of step 3: a killed run had got there
        board.finalize("success")
    shown = [(each.step, each.value) for each in events(tmp_path).Scalars("loss/train")]
    assert shown == [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)]


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        ((), {"name": "a", "seed": 0.0, "model.dim": 8.0, "bias": "true", "router": "Mine"}),
        (("seed", "lr", "model"), {"name": "a", "seed": 0.0, "lr": 0.1, "model.dim": 8.0}),
    ],
)
def test_the_table_of_runs_has_numbers_and_what_was_set(
    swept: tuple[str, ...], expected: dict[str, Any], tmp_path: Path
) -> None:
    board = TensorBoardLogger(str(tmp_path), swept=swept)
    config = {"name": "a", "seed": 0, "lr": 0.1, "model.dim": 8, "bias": True, "router": {"type": "a.Mine"}, "x": None}
    defaults = {**config, "model.dim": 4, "bias": False, "router": "top_k"}
    board.log_end(config, defaults, {"seconds": 2.0, "bits_per_byte": 1.5}, 7)
    board.finalize("success")
    found = events(tmp_path)
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {key: getattr(value, value.WhichOneof("kind")) for key, value in start.items()} == expected
    metrics = sorted([*found.Tags()["scalars"], "loss/train", "router/x"])  # as TensorBoard picks the first five
    assert metrics[:2] == ["loss-and-cost/bits_per_byte", "loss-and-cost/seconds"]
    assert "_hparams_/experiment" not in found.summary_metadata, "else this run's columns would be those of all"
