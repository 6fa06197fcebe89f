"""Experts that take image tokens, and those that take text: counted by layer, as numbers and as a picture."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from moesaic.data import PictureData
from moesaic.evaluation.naming import some_of, splits_with_samples
from moesaic.evaluation.plotting import BLUE, GRAY, ORANGE, label_axes, new_figure, save_figure
from moesaic.evaluation.routing import expert_load
from moesaic.evaluation.specialization import explained_share
from moesaic.layers import Routing, count_tokens
from moesaic.models import MultimodalDecoder

__all__ = ["MODALITIES", "ModalityCounts", "experts_by_modality", "plot_modalities"]

MODALITIES = ("image", "text_beside_images", "text")
"""Image tokens, all others of samples with pictures, and tokens of text alone."""

COLORS = (ORANGE, BLUE, GRAY)

SHOWN_LAYERS = 6
"""Layers in the picture, at most, from the first to the last."""


@dataclasses.dataclass
class ModalityCounts:
    """Choices of each expert by what was routed."""

    layers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """(3, E) int64 by MoE layer: rows as `MODALITIES`. A token counts as often as it chose."""

    def update(self, routing: Mapping[str, Routing], modality: Tensor) -> None:
        """Add a batch.

        Args:
            modality: (B, L) places in `MODALITIES`; -1 for what does not count, such as padding.
        """
        for name, decided in routing.items():
            experts = decided.logits.size(1)
            rows = [count_tokens(decided.expert_ids, experts, (modality == i).flatten()) for i in range(3)]
            self.layers[name] = torch.stack(rows).cpu() + self.layers.get(name, 0)

    def numbers(self) -> dict[str, float]:
        """For metrics: by layer the load of the fullest expert by modality, 1 being even, and what modality explains.

        "router/LAYER/modality_expert_nmi" is an `explained_share` of the choice: 0 where all are routed alike.
        """
        found = {}
        for name, counts in self.layers.items():
            seen = counts.sum(dim=1) > 0
            found[f"router/{name}/modality_expert_nmi"] = explained_share(counts[seen])
            for modality, row, there in zip(MODALITIES, counts, seen.tolist(), strict=True):
                if there:
                    found[f"router/{name}/fullest_expert_{modality}"] = float(expert_load(row).max())
        return found

    def counts(self) -> dict[str, dict[str, list[int]]]:
        """As lists, for JSON: by layer and modality, choices of each expert."""
        return {
            name: dict(zip(MODALITIES, counts.tolist(), strict=True)) for name, counts in self.layers.items()
        }  # fmt: skip


@torch.no_grad()
def experts_by_modality(
    model: MultimodalDecoder,
    data: PictureData,
    text: Iterable[Mapping[str, Tensor]] = (),
    *,
    samples: int = 200,
    batch_size: int = 64,
) -> ModalityCounts:
    """Count the choices on samples of all test splits, the same ones for every run, and on batches of text.

    Args:
        text: "tokens" and (optionally) "valid", each (B, L).
        samples: of each split, at most.
    """
    found = ModalityCounts()
    splits = splits_with_samples(data.samples)
    chosen = dataclasses.replace(data, samples=some_of(data.samples, splits, samples))
    was_training = model.training
    model.eval()
    try:
        for batch in chosen.evaluation_loader(seq_len=2**31, batch_size=batch_size, splits=splits):
            tokens, images = batch["tokens"].to(model.device), batch["images"].to(model.device, model.dtype)
            _, routing = model.hidden_states(tokens, images=images, image_rows=batch["image_rows"])
            modality = (tokens != model.image_token).long()
            found.update(routing, modality.masked_fill(~batch["valid"].to(model.device), -1))
        for window in text:
            tokens = window["tokens"].to(model.device)
            valid = window.get("valid", torch.ones_like(tokens, dtype=torch.bool)).to(model.device)
            _, routing = model.hidden_states(tokens)
            found.update(routing, torch.full_like(tokens, 2).masked_fill(~valid, -1))
    finally:
        model.train(was_training)
    return found


def plot_modalities(found: ModalityCounts, out: Path) -> bool:
    """Bars of the share of each modality that each expert takes, a panel per MoE layer. False (no file) without any."""
    if not found.layers:
        return False
    names = list(found.layers)
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SHOWN_LAYERS).round().astype(int))]
    figure, axes = new_figure(len(shown), 1, width=8, height=0.6 + 2.2 * len(shown))
    for axis, name in zip(axes, shown, strict=True):
        _draw(axis, found.layers[name])
        explained = explained_share(found.layers[name])
        label_axes(axis, f"{name}: modality explains {explained:.0%} of the choice", "expert", "share of the choices")
    axes[0].legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.15))
    some = f", in {len(shown)} of {len(names)} MoE layers" if len(shown) < len(names) else ""
    figure.suptitle(f"Which experts take image tokens{some}", fontsize=12)
    save_figure(figure, out)
    return True


def _draw(axis: Axes, counts: Tensor) -> None:
    experts = counts.size(1)
    there = [i for i in range(len(MODALITIES)) if counts[i].sum() > 0]
    width = 0.8 / max(1, len(there))
    for place, i in enumerate(there):
        shares = (counts[i] / counts[i].sum()).numpy()
        at = np.arange(experts) + (place - (len(there) - 1) / 2) * width
        axis.bar(at, shares, width, color=COLORS[i], label=MODALITIES[i].replace("_", " "))
    axis.axhline(1 / experts, color=GRAY, linestyle=":", linewidth=1, label="even")
    axis.set_xticks(np.unique(np.linspace(0, experts - 1, min(16, experts)).round().astype(int)))
    axis.set_xlim(-0.6, experts - 0.4)
