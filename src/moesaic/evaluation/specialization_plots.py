"""Plots of what the experts take, by token, kind of file and position."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

from moesaic.evaluation.plotting import COLORS, DEPTH, Floats, label_axes, new_figure, save_figure
from moesaic.evaluation.specialization import BYTE_CLASSES, Specialization, by_octave, no_formula, overlap, shorten

__all__ = ["plot_explained", "plot_specialization"]

FREQUENT_TOKENS = 24
"""Rows of the plot by token."""


GROUPS = 12
"""Rows of the plots by byte class and by kind of file, at most."""


SHOWN_LAYERS = 3
"""Layers in the plot, at most: the first, the last and what is halfway. specialization.json has all."""

FEWEST = 0.001
"""Share of all tokens below which a group stays blank: it says nothing."""

RARE = 0.01
"""Share of all choices below which a row does not decide how the colors are scaled."""


def plot_specialization(found: Specialization, out: Path) -> bool:
    """A column of heat maps per MoE layer: byte classes, tokens, files, positions, other experts, the next layer.

    The panels of a row have the same colors. False (no file) without MoE layers.
    """
    if not found.layers:
        return False
    names = list(found.layers)
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SHOWN_LAYERS).round().astype(int))]
    columns = {name: _panels(found, name) for name in shown}
    titles = list(dict.fromkeys(title for panels in columns.values() for title in panels))
    heights = [max(1.6, 0.17 * max(len(p[t].shares) for p in columns.values() if t in p)) + 0.8 for t in titles]
    width = 0.6 + 4.6 * len(columns)
    figure, axes = new_figure(len(titles), len(columns), width=width, height=sum(heights), heights=heights)
    for row, title in enumerate(titles):
        here = axes[len(columns) * row : len(columns) * (row + 1)]
        largest = max(panels[title].largest for panels in columns.values() if title in panels) or 1.0
        images = []
        for axis, (name, panels) in zip(here, columns.items(), strict=True):
            if title in panels:
                images.append(_draw(axis, panels[title], f"{name}\n{title}" if row == 0 else title, largest))
            else:
                axis.set_visible(False)
        label = next(panels[title].label for panels in columns.values() if title in panels)
        shown_here = [panels[title].shares for panels in columns.values() if title in panels]
        beyond = any(float(np.nanmax(shares, initial=0.0)) > largest for shares in shown_here)
        figure.colorbar(images[0], ax=here, label=label, extend="max" if beyond else "neither", fraction=0.03)
    some = f", in {len(shown)} of {len(names)} MoE layers" if len(shown) < len(names) else ""
    figure.suptitle(f"What each expert takes{some}", fontsize=12)
    save_figure(figure, out)
    return True


def plot_explained(axis: Axes, numbers: Mapping[str, float]) -> None:
    """Draw by depth how much of the choice of expert is explained by each thing (`Specialization.numbers`)."""
    by_kind: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        _, layer, measure = key.split("/")
        if measure.endswith(EXPLAINS):
            by_kind.setdefault(measure.removesuffix(EXPLAINS).replace("_", " "), {})[layer] = value
    layers = list(dict.fromkeys(layer for found in by_kind.values() for layer in found))
    for (kind, found), color in zip(by_kind.items(), COLORS, strict=False):
        axis.plot([layers.index(layer) for layer in found], list(found.values()), "o-", color=color, label=kind)
    ticks = np.unique(np.linspace(0, len(layers) - 1, min(6, len(layers))).round().astype(int))
    axis.set_xticks(ticks, [layers[tick] for tick in ticks], fontsize=8)
    axis.set_ylim(0, 1)
    axis.margins(x=0.15)
    label_axes(axis, "What explains the choice of expert", "MoE layer", "share explained (1: all)")
    axis.legend(frameon=False, fontsize=8, ncols=2)


EXPLAINS = "_expert_nmi"
"""How the names of these numbers end."""


@dataclasses.dataclass(frozen=True)
class _Panel:
    shares: Floats
    """(rows, E); nan stays blank."""
    labels: list[str] | None = None
    """Labels of the rows; None if they are experts."""
    x: str = "expert"
    label: str = "share of the row's tokens"
    """The scale of the colors."""
    scaled_by: npt.NDArray[np.bool_] | None = None
    """(rows,): rows that are frequent enough to decide how the colors are scaled; None: all."""

    @property
    def largest(self) -> float:
        shares = self.shares if self.scaled_by is None else self.shares[self.scaled_by]
        return float(np.nanmax(shares, initial=0.0))


def _panels(found: Specialization, name: str) -> dict[str, _Panel]:
    """The panels of a layer, by title."""
    counts, panels = found.layers[name], {}
    if (by_class := found.by_class(name)) is not None:
        panels["by byte class (in brackets: share of tokens)"] = _groups(dict(zip(BYTE_CLASSES, by_class, strict=True)))
    frequent = counts.by_token.sum(dim=1).topk(min(FREQUENT_TOKENS, counts.by_token.size(0))).indices
    labels = [found.describe(token) for token in frequent.tolist()]
    panels["by token, most frequent first"] = _Panel(_shares(counts.by_token[frequent]), labels)
    if (by_kind := found.by_file_kind(name)) is not None:
        panels["by kind of file (in brackets: share of tokens)"] = _groups(by_kind)
    octaves, last = by_octave(counts.by_position), counts.by_position.size(0) - 1
    ranges = [(2**k - 1, min(2 ** (k + 1) - 2, last)) for k in range(len(octaves))]
    labels = [str(start) if start == end else f"{start} to {end}" for start, end in ranges]
    panels["by position in the window"] = _Panel(_shares(octaves), labels, scaled_by=_frequent(octaves))
    panels["overlap of the experts' tokens"] = _pairs(overlap(counts.by_token), "share of tokens in common")
    if counts.together.sum() > counts.together.diagonal().sum():  # top_k > 1
        takes = counts.together.diagonal()[:, None].clamp(min=1)
        panels["chosen too, of what an expert takes"] = _pairs(counts.together / takes, "share of its tokens")
    if counts.then is not None:
        panels["first choice in the next MoE layer"] = _Panel(
            _shares(counts.then), x="expert there", label="share of its tokens"
        )
    return panels


def _pairs(shares: Tensor, label: str) -> _Panel:
    """(E, E) without its diagonal: of an expert with itself it says nothing."""
    return _Panel(shares.clone().fill_diagonal_(math.nan).numpy(), x="expert (blank: itself)", label=label)


def _frequent(counts: Tensor) -> npt.NDArray[np.bool_]:
    """(rows,): which of them have a share of all counts that is not `RARE`."""
    frequent: npt.NDArray[np.bool_] = (counts.sum(dim=1) >= RARE * counts.sum()).numpy()
    return frequent


def _groups(counts: dict[str, Tensor]) -> _Panel:
    """All tokens, and at most `GROUPS` groups of them; the last of the smaller ones together."""
    groups = list(counts.items())
    if len(groups) > GROUPS:
        rest = groups[GROUPS - 1 :]
        groups = [*groups[: GROUPS - 1], (f"{len(rest)} others", torch.stack([row for _, row in rest]).sum(dim=0))]
    rows = torch.stack([row for _, row in groups])
    sizes = (rows.sum(dim=1) / rows.sum().clamp(min=1)).tolist()
    labels = [
        "all",
        *(f"{no_formula(shorten(name))} ({size:.1%})" for (name, _), size in zip(groups, sizes, strict=True)),
    ]
    whole = torch.cat((rows.sum(dim=0, keepdim=True), rows))
    shares = _shares(whole)
    shares[(whole.sum(dim=1) < FEWEST * rows.sum()).numpy()] = math.nan
    return _Panel(shares, labels, scaled_by=_frequent(whole))


def _shares(counts: Tensor) -> Floats:
    """Each row's shares; nan in a row without counts."""
    total = counts.sum(dim=1, keepdim=True).double()
    return torch.where(total > 0, counts / total.clamp(min=1), math.nan).numpy()


def _draw(axis: Axes, panel: _Panel, title: str, largest: float) -> AxesImage:
    shares = panel.shares
    image = axis.imshow(shares, cmap=DEPTH, vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    label_axes(axis, title, panel.x, "expert" if panel.labels is None else "")
    axis.grid(False)
    axis.set_xticks(_whole_ticks(shares.shape[1]))
    if panel.labels is None:
        axis.set_yticks(_whole_ticks(shares.shape[0]))
    else:
        axis.set_yticks(range(len(panel.labels)), panel.labels, fontsize=9)
    return image


def _whole_ticks(count: int) -> npt.NDArray[np.int64]:
    """At most 8 of the numbers of `count` experts."""
    return np.unique(np.linspace(0, count - 1, min(8, count)).round().astype(np.int64))
