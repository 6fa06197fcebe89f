"""Put a prediction of a larger rung on record: moesaic predict RESULTS at=1e14 [key=value ...]

See conf/predict.yaml. It writes prediction-1e14.json beside the rows that it was made from, before the larger run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from moesaic.cli.arguments import require_known
from moesaic.cli.common import launch, plain
from moesaic.cli.study import console_of_command
from moesaic.errors import InputError
from moesaic.ladder.prediction import path_of, record

__all__ = ["main"]


FARTHEST = 300
"""How many times the largest rung a prediction may be without a word of warning."""


def _task(config: DictConfig) -> None:
    given = plain(config)
    if not isinstance(given["directory"], str):
        raise InputError(f"directory={given['directory']!r}: must be a results directory of moesaic ladder")
    for key, least in (("at", True), ("least", False)):
        value = given[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (least and not value):
            raise InputError(f"{key}={value!r}: must be a number of FLOPs, such as 1e14")
    require_known("asymptote", given["asymptote"], ("pinned", "free"))
    _tell(Path(given["directory"]), float(given["at"]), given["asymptote"] == "free", float(given["least"]))


def _tell(results: Path, at: float, free: bool, least: float) -> None:
    prediction = record(results, at, free=free, least=least)
    console, rung = console_of_command(), prediction.rung
    table = Table(title=f"{prediction.ladder} at {rung.name} FLOPs", title_justify="left")
    for column in ("arm", "bits per byte, mean of the seeds", "by the law alone", "other asymptote"):
        table.add_column(column)
    for arm, found in prediction.arms.items():
        table.add_row(arm, *(str(each) if each else "-" for each in (found.expected, found.law, found.other_law)))
    console.print(table)
    texts: list[Any] = [
        f"width {rung.dim}, {rung.num_layers} layers, {rung.tokens:,} tokens in {rung.steps:,} steps; "
        f"{prediction.ratio:.3g} times the largest rung",
        f"written: {path_of(results, at)}; the run: the command of the ladder with ladder.targets=[{rung.name}]",
    ]
    if prediction.ratio > FARTHEST:
        texts.insert(
            1,
            f"careful: {prediction.ratio:.3g} times the largest rung, where {FARTHEST:g} times is as far as these laws "
            "are meant for. The interval holds if the law still does there, which no rung here can tell",
        )
    for text in texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> None:
    launch("predict", arguments, _task)
