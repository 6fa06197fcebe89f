"""What it costs to keep the learning rate that is best at the first value of an axis, where that was measured."""

import dataclasses
import math
from collections.abc import Mapping

from matplotlib import colormaps
from matplotlib.figure import Figure

from moesaic.evaluation.plotting import DEPTH, label_axes, new_figure, with_unit
from moesaic.statistics import Interval, interval
from moesaic.studies.config import Cell, StudyConfig
from moesaic.studies.jobs import Row, row_key
from moesaic.studies.plan import moved, score, tuning

__all__ = ["MovedRate", "moved_rates", "plot_rates"]


@dataclasses.dataclass(frozen=True)
class MovedRate:
    """The learning rate of one cell, tuned there and at the first value of its axis."""

    arm: str  # as people read it
    axis: str  # "width=256"
    first: str  # "width=32"
    best: float  # the factor that is best here
    moved: float  # the one that is best there
    at_edge: bool  # whether a better one may lie beyond what was tried, here or there
    cost: Interval  # percent of the metric that the latter gives away here, paired by seed
    diverged: int  # runs at the latter that have no metric

    @property
    def sentence(self) -> str:
        """One sentence, from the numbers alone."""
        said = f"{self.arm} at {self.axis}: x{self.best:g} is best"
        if self.moved == self.best:
            said += f", as at {self.first}"
        else:
            said += f", and x{self.moved:g} at {self.first}"
            if self.cost.n > 1:
                said += f"; the latter costs {self.cost.mean:.2f}% [{self.cost.low:.2f}, {self.cost.high:.2f}] here"
            if self.diverged:
                said += f"; {self.diverged} runs at the latter diverged"
        return f"{said} (a better one may lie beyond what was tried)" if self.at_edge else said


def moved_rates(study: StudyConfig, rows: Mapping[str, Row]) -> list[MovedRate]:
    """Every cell in which the best factor of the first value of its axis was measured too; none without such cells."""
    found = []
    for cell in study.cells:
        here, there = tuning(study, cell, rows), moved(study, cell, rows)
        if there is None or here.best is None or there.best is None:
            continue
        first = study.first_cell(cell).axis
        assert cell.axis is not None and first is not None  # a cell without an axis moves nothing
        own, other = (_by_seed(study, cell, rows, factor) for factor in (here.best, there.best))
        costs = [
            100 * (other[seed] - own[seed]) / abs(own[seed])
            for seed in own
            if seed in other and math.isfinite(own[seed]) and math.isfinite(other[seed]) and own[seed]
        ]
        diverged = sum(not math.isfinite(value) for value in other.values())
        at_edge = here.at_edge or there.at_edge
        found.append(
            MovedRate(
                study.shown(cell.arm), cell.axis, first, here.best, there.best, at_edge, interval(costs), diverged
            )
        )
    return found


def _by_seed(study: StudyConfig, cell: Cell, rows: Mapping[str, Row], factor: float) -> dict[int, float]:
    """The metric of the measured runs of a cell at a factor, lower as better; infinite where a run diverged."""
    keys = {
        seed: row_key({**dataclasses.asdict(cell), "purpose": "measure", "seed": seed, "factor": factor})
        for seed in study.seeds
    }
    return {seed: score(study, rows[key]) for seed, key in keys.items() if key in rows}


def plot_rates(study: StudyConfig, rows: Mapping[str, Row]) -> Figure | None:
    """The metric over the factor on the learning rates: a panel for each arm, a line for each value of an axis.

    A line is of the seed of tuning, a dot with its 95% interval of the others. Runs that are much worse than the best
    leave the panel. None for a study that moves no rates.
    """
    if study.tune is None or study.tune.at != "both" or not study.axes:
        return None
    arms = list(study.arms)
    figure, panels = new_figure(len(study.axes), len(arms), width=4.6 * len(arms), height=3.9 * len(study.axes))
    for i, (axis, values) in enumerate(study.axes.items()):
        shades = colormaps[DEPTH]([0.85 * k / max(1, len(values.values) - 1) for k in range(len(values.values))])
        of_axis = panels[len(arms) * i : len(arms) * (i + 1)]
        seen: list[float] = []
        for arm, panel in zip(arms, of_axis, strict=True):
            for value, shade in zip(values.values, shades, strict=True):
                cell = study.cell(arm, (axis, value))
                here = [row for row in rows.values() if (row["arm"], row["axis"]) == (cell.arm, cell.axis)]
                tried = sorted((row["factor"], score(study, row)) for row in here if row["purpose"] == "tune")
                line = [(factor, value) for factor, value in tried if math.isfinite(value)]
                if not line:
                    continue
                best = min(value for _, value in line)
                seen += [value for _, value in line if value < 1.12 * best]
                panel.plot(*zip(*line, strict=True), color=shade, marker=".", linewidth=1.6, label=f"{axis} {value}")
                for factor in sorted({row["factor"] for row in here if row["purpose"] == "measure"}):
                    level = interval([x for x in _by_seed(study, cell, rows, factor).values() if math.isfinite(x)])
                    if level.n:
                        panel.plot(factor, level.mean, "o", color=shade, markersize=6, markerfacecolor="none")
                    if level.n > 1:
                        panel.vlines(factor, level.low, level.high, color=shade, linewidth=1.5, alpha=0.7)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            label_axes(panel, study.shown(arm), "factor on the learning rates", "")
        if seen:
            margin = 0.06 * (max(seen) - min(seen)) or 0.01
            for panel in of_axis:
                panel.set_ylim(min(seen) - margin, max(seen) + margin)
        of_axis[0].set_ylabel(with_unit(study.metric))
        of_axis[-1].legend(frameon=False, fontsize=8)
    return figure
