"""Plots of what the experts take, by token, kind of file and position."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from moesaic.evaluation.plotting import Floats, label_axes, new_figure, save_figure
from moesaic.evaluation.specialization import BYTE_CLASSES, Specialization, by_octave, no_formula, overlap, shorten

__all__ = ["plot_specialization"]

FREQUENT_TOKENS = 24
"""Rows of the plot by token."""


GROUPS = 12
"""Rows of the plots by byte class and by kind of file, at most."""


def plot_specialization(found: Specialization, out: Path) -> bool:
    """A row of heat maps per MoE layer: byte classes, tokens, files, positions, other experts, the next layer.

    The panels of a column have the same colors. False (no file) without MoE layers.
    """
    if not found.layers:
        return False
    rows = {name: _panels(found, name) for name in found.layers}
    titles = list(dict.fromkeys(title for panels in rows.values() for title in panels))
    figure, axes = new_figure(len(rows), len(titles), width=4.2 * len(titles), height=0.5 + 3.9 * len(rows))
    for column, title in enumerate(titles):
        shown = [panels[title].shares for panels in rows.values() if title in panels]
        largest = max(float(np.nanmax(shares, initial=0.0)) for shares in shown) or 1.0
        for row, panels in enumerate(rows.values()):
            axis = axes[len(titles) * row + column]
            if title in panels:
                _draw(axis, panels[title], title, largest)
            else:
                axis.set_visible(False)
    for row, name in enumerate(rows):
        axes[len(titles) * row].set_ylabel(name, fontsize=12, fontweight="bold")
    save_figure(figure, out)
    return True


@dataclasses.dataclass(frozen=True)
class _Panel:
    shares: Floats
    """(rows, E); nan stays blank."""
    labels: list[str] | None = None
    """Labels of the rows; None if they are experts."""
    x: str = "expert"


def _panels(found: Specialization, name: str) -> dict[str, _Panel]:
    """The panels of a layer, by title."""
    counts, panels = found.layers[name], {}
    if (by_class := found.by_class(name)) is not None:
        panels["by byte class (share of tokens)"] = _groups(dict(zip(BYTE_CLASSES, by_class, strict=True)))
    frequent = counts.by_token.sum(dim=1).topk(min(FREQUENT_TOKENS, counts.by_token.size(0))).indices
    labels = [found.describe(token) for token in frequent.tolist()]
    panels["by token, most frequent first"] = _Panel(_shares(counts.by_token[frequent]), labels)
    if (by_kind := found.by_file_kind(name)) is not None:
        panels["by kind of file (share of tokens)"] = _groups(by_kind)
    octaves, last = by_octave(counts.by_position), counts.by_position.size(0) - 1
    ranges = [(2**k - 1, min(2 ** (k + 1) - 2, last)) for k in range(len(octaves))]
    labels = [str(start) if start == end else f"{start} to {end}" for start, end in ranges]
    panels["by position in the window"] = _Panel(_shares(octaves), labels)
    panels["overlap of the experts' tokens"] = _pairs(overlap(counts.by_token))
    if counts.together.sum() > counts.together.diagonal().sum():  # top_k > 1
        takes = counts.together.diagonal()[:, None].clamp(min=1)
        panels["chosen too, of what an expert takes"] = _pairs(counts.together / takes)
    if counts.then is not None:
        panels["first choice in the next MoE layer"] = _Panel(_shares(counts.then), x="expert there")
    return panels


def _pairs(shares: Tensor) -> _Panel:
    """(E, E) without its diagonal: of an expert with itself it says nothing."""
    return _Panel(shares.clone().fill_diagonal_(math.nan).numpy())


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
    return _Panel(_shares(torch.cat((rows.sum(dim=0, keepdim=True), rows))), labels)


def _shares(counts: Tensor) -> Floats:
    """Each row's shares; nan in a row without counts."""
    total = counts.sum(dim=1, keepdim=True).double()
    return torch.where(total > 0, counts / total.clamp(min=1), math.nan).numpy()


def _draw(axis: Axes, panel: _Panel, title: str, largest: float) -> None:
    shares = panel.shares
    image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    label_axes(axis, title, panel.x, "expert" if panel.labels is None else "")
    axis.grid(False)
    assert axis.figure is not None
    axis.figure.colorbar(image, ax=axis, fraction=0.05)
    axis.set_xticks(_whole_ticks(shares.shape[1]))
    if panel.labels is None:
        axis.set_yticks(_whole_ticks(shares.shape[0]))
    else:
        axis.set_yticks(range(len(panel.labels)), panel.labels, fontsize=8)


def _whole_ticks(count: int) -> npt.NDArray[np.int64]:
    """At most 8 of the numbers of `count` experts."""
    return np.unique(np.linspace(0, count - 1, min(8, count)).round().astype(np.int64))
