"""A sheet of held-out pictures, with what a model says of each."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from moesaic.data import PictureData
from moesaic.data.images import ImageText, Picture
from moesaic.data.images.sample import Pixels
from moesaic.evaluation.naming import Answer, answers, splits_with_samples
from moesaic.evaluation.plotting import BLUE, ORANGE, new_figure, save_figure
from moesaic.evaluation.specialization import no_formula
from moesaic.models import MultimodalDecoder

__all__ = ["plot_answers", "whole_picture"]

COLUMNS = 6
WIDTH = 26
"""Letters of a line below a picture."""
ROW = 2.5
"""Inches from one picture to that below it."""
LINES = 3
"""Lines of a text at most."""


def plot_answers(
    model: MultimodalDecoder, data: PictureData, out: Path, *, splits: Sequence[str] | None = None, samples: int = 12
) -> None:
    """Draw some pictures of each test split, always the same ones, with what the model says and what is right.

    Args:
        splits: names of test splits; None: all that have samples.
        samples: of each split.

    Raises:
        InputError: a split that there is not.
    """
    names = splits_with_samples(data.samples) if splits is None else list(splits)
    found = {name: answers(model, data, name, samples=samples)[:samples] for name in names}
    rows = {name: -(-len(each) // COLUMNS) for name, each in found.items()}
    in_all = sum(rows.values())
    height = ROW * in_all + 0.5
    figure, axes = new_figure(in_all, COLUMNS, width=2.1 * COLUMNS, height=height)
    figure.set_layout_engine(None)  # it would make room beside the pictures for what is written across them
    figure.subplots_adjust(left=0.02, right=0.98, top=1 - 0.5 / height, bottom=0.9 / height, hspace=0.8)
    panels = iter(axes)
    for name, said in found.items():
        of_split = [next(panels) for _ in range(rows[name] * COLUMNS)]
        for axis in of_split:
            axis.set_axis_off()
        for axis, answer in zip(of_split, said, strict=False):
            _draw(axis, answer)
        right = f"{name}: {sum(answer.is_right for answer in said)} of these {len(said)} right"
        of_split[0].annotate(right, (0, 1.08), xycoords="axes fraction", fontsize=11, annotation_clip=False)
    save_figure(figure, out)


def _draw(axis: Axes, answer: Answer) -> None:
    pictures = answer.sample.pictures
    if pictures:
        shown = _side_by_side([whole_picture(each) for each in pictures])
        gray = shown.shape[2] == 1
        axis.imshow(shown[:, :, 0] if gray else shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    lines = [
        _wrapped(f"{_asked_of(answer.sample)}{'✓' if answer.is_right else '✗'} {_plain(answer.said) or '(nothing)'}")
    ]
    if not answer.is_right:
        lines.append(_wrapped(f"is {_plain(answer.right.text)}"))
    color = BLUE if answer.is_right else ORANGE
    axis.text(
        0.5, -0.05, "\n".join(lines), transform=axis.transAxes, fontsize=7, ha="center", va="top", color=color
    )  # fmt: skip


def whole_picture(picture: Picture) -> Pixels:
    """The picture of its tiles, without the one that shows all of it again: (H, W, C)."""
    rows, columns = picture.grid
    tiles = picture.tiles(None)[: rows * columns]
    channels, side = tiles.shape[1:3]
    laid = tiles.reshape(rows, columns, channels, side, side).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(laid).reshape(rows * side, columns * side, channels)


def _side_by_side(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures of one number of channels in a row, with a gap; what is lower has gray below."""
    height = max(len(each) for each in pictures)
    gap = max(1, height // 8)
    padded = [
        np.pad(each, ((0, height - len(each)), (0, gap), (0, 0)), constant_values=127) for each in pictures
    ]  # fmt: skip
    return np.concatenate(padded, axis=1)[:, :-gap]


def _asked_of(sample: ImageText) -> str:
    """The question, on a line of its own, if there is one."""
    texts = [text.text for text in sample.texts if not text.asked]
    return f"{_plain(texts[-1].strip())}\n" if texts and texts[-1].strip() else ""


def _plain(text: str) -> str:
    """As the font of any machine can show it."""
    return no_formula(ascii(text)[1:-1])


def _wrapped(text: str) -> str:
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, WIDTH)]
    return "\n".join([*lines[: LINES - 1], f"{lines[LINES - 1][: WIDTH - 1]}…"] if len(lines) > LINES else lines)
