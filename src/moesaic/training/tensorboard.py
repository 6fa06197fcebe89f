"""Rows of a run in TensorBoard: losses first, routers summed up over layers, and only what makes a chart.

metrics.csv keeps every row as it is, each layer's numbers among them.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from moesaic.arms import short_value

__all__ = ["TensorBoardLogger", "board_row"]

AXES = ("tokens", "seconds", "active_flops", "teacher_flops")
"""What grows with the step in a straight line: an axis, not a chart."""

TAGS = {
    "train/loss": "loss/train",
    "validation/loss": "loss/validation",
    "validation/bits_per_byte": "loss/validation_bits_per_byte",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "train/load_balance_loss": "router/load_balance_loss",
    "train/router_z_loss": "router/z_loss",
    "learning_rate": "training/learning_rate",
    "train/grad_norm": "training/gradient_norm",
    "validation/teacher_loss": "teacher/validation_loss",
}
"""Columns of metrics.csv and their tags. TensorBoard sorts groups by name: loss, router, speed, and then the rest."""

WORST = {"max_violation": max, "dead_share": max, "no_expert_share": max, "drift": max, "entropy": min, "margin": min}
"""Which layer a router's measure worries about."""

ENDED = "loss-and-cost"
"""Group of the numbers at the end. TensorBoard shows the first five metrics of its table by name in ASCII, where "-"
comes before "/"; among the charts, "/" comes first. So these are the metrics, and the losses stay on top."""


def board_row(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row of metrics.csv as TensorBoard gets it.

    Every measure of the routers becomes two numbers over the layers, `mean` and that of the `worst` layer.
    """
    shown: dict[str, float] = {}
    routers: dict[str, list[float]] = defaultdict(list)
    for name, value in row.items():
        if name in AXES:
            continue
        if name.startswith("router/"):
            routers[name.rpartition("/")[2]].append(value)
        else:
            shown[TAGS.get(name, name.replace("distillation/", "teacher/"))] = value
    for measure, values in routers.items():
        shown[f"router/{measure}/mean"] = math.fsum(values) / len(values)
        shown[f"router/{measure}/worst"] = WORST.get(measure, max)(values)
    return shown


ALWAYS = ("name", "seed")
"""Columns of the table of runs that every run has."""


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Lightning's logger with `board_row` before it, and a table of runs that has numbers.

    Args:
        save_dir: the run directory.
        name: of the folder in it.
        version: of a folder below that; none by default.
        swept: keys of the config that vary in the sweep that a run belongs to. The table of runs has these alone.
        more: as Lightning's logger takes them.
    """

    def __init__(
        self, save_dir: str, name: str = "tensorboard", version: str = "", swept: Sequence[str] = (), **more: Any
    ) -> None:
        super().__init__(save_dir, name=name, version=version, **{"default_hp_metric": False, **more})
        self.swept = tuple(swept)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(board_row(metrics), step)

    @rank_zero_only
    def log_end(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any], numbers: Mapping[str, float], step: int
    ) -> None:
        """Log a line of the table of runs (the tab HParams).

        TensorBoard makes the table of the lines of all runs, and checks the columns in which they differ.

        Args:
            config: of the run, flat. What was swept is shown; outside of a sweep, what is not as in `defaults`.
            defaults: the same keys without experiment or overrides.
            numbers: metrics at the end, by name.
            step: the last one.
        """
        from torch.utils.tensorboard.summary import hparams  # needs the package, which another logger does not

        unlike = [key for key, value in config.items() if value != defaults.get(key)]
        of_groups = [key for key in unlike if key.startswith(tuple(f"{name}." for name in self.swept))]
        chosen = [*self.swept, *of_groups] if self.swept else unlike
        shown = {key: _as_column(config[key]) for key in dict.fromkeys((*ALWAYS, *chosen)) if key in config}
        _, start, end = hparams(shown, {})
        writer = self.experiment._get_file_writer()
        for name, number in numbers.items():
            self.experiment.add_scalar(f"{ENDED}/{name}", number, step)
        for summary in (start, end):
            writer.add_summary(summary)
        writer.flush()


def _as_column(value: Any) -> int | float | str:
    """Return a number as it is; TensorBoard takes a boolean for one, so that is a word."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else short_value(value)
