"""Pictures of what each family of routers does with the same random logits, for docs/routers.md.

    python -m moesaic.evaluation.router_plots docs/images

The logits (T, E) are drawn with a fixed seed. Some experts are more popular than others, as in a run without balancing.
No model is trained: the pictures show rules of choice, and nothing about losses.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from moesaic.evaluation.plotting import BLUE, COLORS, DEPTH, GRAY, ORANGE, label_axes, new_figure, save_figure
from moesaic.layers import ROUTERS, QuantileRouter, ThresholdRouter, TopKRouter
from moesaic.layers.routing import Routing
from moesaic.losses.balance import update_expert_bias

__all__ = ["FAMILIES", "choose", "draw_routers", "popular_logits"]

TOKENS, EXPERTS, TOP_K = 2048, 8, 2


def popular_logits(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Logits (T, E) fp32 with a standard deviation of 1, whose means fall from 0.8 to -0.8 over the experts."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, EXPERTS, generator=draw) + torch.linspace(0.8, -0.8, EXPERTS)


def make(name: str, **arguments: Any) -> TopKRouter:
    """The router of this name whose logits are its input (T, E)."""
    router = ROUTERS[name](EXPERTS, EXPERTS, top_k=arguments.pop("top_k", TOP_K), **arguments)  # type: ignore[index]
    with torch.no_grad():
        router.weight.copy_(torch.eye(EXPERTS))
    return router


@torch.no_grad()
def choose(router: TopKRouter, logits: Tensor, **more: Tensor) -> Tensor:
    """Choose the experts that each token gets in training, (T, E) bool."""
    routing: Routing = router.train()(logits, **more)
    slots = torch.zeros(logits.size(0), EXPERTS + 1, dtype=torch.bool)
    return slots.scatter(1, routing.expert_ids, True)[:, :EXPERTS]


def _draw_load(axis: Axes, rules: dict[str, Tensor]) -> None:
    """Bars of the rows of each expert, a color for each rule; the dotted line is its quota of T K / E."""
    width = 0.8 / len(rules)
    for i, (name, chosen) in enumerate(rules.items()):
        load = chosen.sum(dim=0) / (chosen.size(0) * TOP_K / EXPERTS)
        axis.bar(np.arange(EXPERTS) + (i + 0.5) * width - 0.4, load.numpy(), width, color=COLORS[i], label=name)
    axis.axhline(1, color=GRAY, linestyle=":", linewidth=1)
    axis.set_xticks(range(EXPERTS))
    axis.margins(y=0.3)  # room for the legend
    axis.legend(frameon=False, fontsize=8)
    label_axes(axis, "Load", "expert", "rows, multiples of T K / E")


def _draw_numbers(axis: Axes, rules: dict[str, Tensor]) -> None:
    """Bars of how many tokens have how many experts, a color for each rule."""
    width = 0.8 / len(rules)
    for i, (name, chosen) in enumerate(rules.items()):
        numbers = torch.bincount(chosen.sum(dim=1), minlength=EXPERTS + 1) / chosen.size(0)
        place = np.arange(EXPERTS + 1) + (i + 0.5) * width - 0.4
        mean = float(chosen.float().sum(dim=1).mean())
        axis.bar(place, numbers.numpy(), width, color=COLORS[i], label=f"{name}, mean {mean:.2f}")
    axis.set_xticks(range(EXPERTS + 1))
    axis.legend(frameon=False, fontsize=8)
    label_axes(axis, "Experts of a token", "experts", "share of tokens")


def _top_k(axes: list[Axes]) -> None:
    logits = popular_logits()
    torch.manual_seed(0)
    noisy = make("noisy_top_k")
    rules = {
        "top_k": choose(make("top_k"), logits),
        "group_limited, 1 of 2 groups": choose(make("group_limited", num_groups=2, top_groups=1), logits),
        "noisy_top_k": choose(noisy, logits),
    }
    _draw_load(axes[0], rules)
    pairs = rules["group_limited, 1 of 2 groups"].float()
    together = (pairs.T @ pairs).fill_diagonal_(0) / pairs.size(0)
    image = axes[1].imshow(together.numpy(), cmap=DEPTH)
    axes[1].grid(False)
    label_axes(axes[1], "group_limited: which two experts meet", "expert", "expert")
    assert axes[1].figure is not None
    axes[1].figure.colorbar(image, ax=axes[1], label="share of tokens")


def _balanced(axes: list[Axes]) -> None:
    """The same popular experts, step by step: a bias that is nudged, one that is solved for, and thresholds."""
    nudged, solved, thresholds = make("top_k", expert_bias=True), make("quantile"), make("threshold")
    assert isinstance(solved, QuantileRouter) and isinstance(thresholds, ThresholdRouter)
    fullest: dict[str, list[float]] = {"top_k, expert_bias": [], "quantile": [], "threshold": []}
    for step in range(60):
        logits = popular_logits(seed=step)
        for (name, loads), router in zip(fullest.items(), (nudged, solved, thresholds), strict=True):
            counts = choose(router, logits).sum(dim=0)
            loads.append(float(counts.max() / counts.float().mean()))
            with torch.no_grad():
                if isinstance(router, QuantileRouter | ThresholdRouter):
                    router.end_step(router.observe(router(logits), None))
                else:
                    assert router.expert_bias is not None, name
                    update_expert_bias(router.expert_bias, counts, 0.01)
    for (name, loads), color in zip(fullest.items(), COLORS, strict=False):
        axes[0].plot(loads, color=color, linewidth=1.4, label=name)
    axes[0].axhline(1, color=GRAY, linestyle=":", linewidth=1)
    axes[0].legend(frameon=False, fontsize=8)
    label_axes(axes[0], "Fullest expert", "step", "load, multiples of an even share")
    scores = popular_logits(seed=60).sigmoid()
    for expert, color in ((0, BLUE), (EXPERTS - 1, ORANGE)):
        axes[1].hist(scores[:, expert].numpy(), bins=40, range=(0, 1), color=color, alpha=0.5, label=f"expert {expert}")
        axes[1].axvline(float(thresholds.thresholds[expert]), color=color, linewidth=2)
    axes[1].set_ylim(top=150)  # room for the legend
    axes[1].legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    label_axes(axes[1], "threshold: an expert takes what is right of its line", "score", "tokens")


def _batch(axes: list[Axes]) -> None:
    logits = popular_logits()
    expert_choice = choose(make("expert_choice"), logits)
    rules = {
        "expert_choice": expert_choice,
        "sinkhorn": choose(make("sinkhorn"), logits),
        "capacity, factor 1": choose(make("capacity", capacity_factor=1.0), logits),
    }
    _draw_load(axes[0], rules)
    blocks = np.arange(0, TOKENS, 128)
    for i, (name, chosen) in enumerate(rules.items()):
        numbers = [float(chosen[start : start + 128].float().sum(dim=1).mean()) for start in blocks]
        axes[1].plot(blocks + 64, numbers, color=COLORS[i], marker="o", markersize=3, linewidth=1.4, label=name)
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize=8)
    label_axes(axes[1], "Experts of a token by its place in the batch", "token", "experts, mean of 128 tokens")


def _as_needed(axes: list[Axes]) -> None:
    logits = popular_logits()
    rules = {
        "relu": choose(make("relu"), logits),
        "top_p, p = 0.5": choose(make("top_p", p=0.5, top_k=EXPERTS, score_function="softmax"), logits),
        "top_p, p = 0.8": choose(make("top_p", p=0.8, top_k=EXPERTS, score_function="softmax"), logits),
    }
    _draw_load(axes[0], rules)
    _draw_numbers(axes[1], rules)


def _fixed(axes: list[Axes]) -> None:
    """Words of a language: the i-th most frequent of 1000 ids is drawn with a probability of 1 / i."""
    vocabulary = 1000
    draw = torch.Generator().manual_seed(0)
    ids = torch.multinomial(1 / torch.arange(1, vocabulary + 1), TOKENS, replacement=True, generator=draw)
    torch.manual_seed(1)
    router = make("hash", vocab_size=vocabulary)
    rules = {
        "hash": choose(router, popular_logits(), token_ids=ids),
        "uniform": choose(make("uniform"), popular_logits()),
    }
    _draw_load(axes[0], rules)
    most = torch.bincount(ids, minlength=vocabulary).topk(12).indices
    table = torch.zeros(12, EXPERTS)
    table[torch.arange(12)[:, None], router.token_experts[most]] = 1  # type: ignore[index]
    axes[1].imshow(table.numpy(), cmap="Greys", aspect="auto", vmin=0, vmax=1.4)
    axes[1].grid(False)
    axes[1].set_yticks(range(12))
    label_axes(axes[1], "hash: experts of the most frequent ids", "expert", "id, by its frequency")


def _other_experts(axes: list[Axes]) -> None:
    """Four experts without weights beside the others, and the means that the experts of a soft mixture see."""
    draw = torch.Generator().manual_seed(0)
    free = torch.randn(TOKENS, 4, generator=draw)
    best = torch.cat((popular_logits(), free), dim=1).topk(3, dim=1).indices
    chosen = torch.zeros(TOKENS, EXPERTS + 4, dtype=torch.bool).scatter(1, best, True)[:, :EXPERTS]
    _draw_numbers(axes[0], {"top 2 of 8": choose(make("top_k"), popular_logits()), "top 3, 4 of 12 free": chosen})
    axes[0].set_ylim(top=1.35)  # room for the legend
    image = axes[1].imshow((2 * popular_logits(48)).softmax(dim=0).T.numpy(), cmap=DEPTH, aspect="auto")
    axes[1].grid(False)
    label_axes(axes[1], "SoftMoE: what each expert's mean is made of", "token of the sequence", "expert")
    assert axes[1].figure is not None
    axes[1].figure.colorbar(image, ax=axes[1], label="weight")


FAMILIES: dict[str, Callable[[list[Axes]], None]] = {
    "top_k": _top_k,
    "balanced": _balanced,
    "batch": _batch,
    "as_needed": _as_needed,
    "fixed": _fixed,
    "other_experts": _other_experts,
}
"""What draws the two panels of a family."""


def draw_routers(directory: Path) -> list[Path]:
    """Draw routers_FAMILY.png of each family; returns the files."""
    files = []
    for name, draw in FAMILIES.items():
        figure, axes = new_figure(1, 2, width=10, height=3.4)
        draw(axes)
        files.append(directory / f"routers_{name}.png")
        save_figure(figure, files[-1])
    return files


if __name__ == "__main__":
    for file in draw_routers(Path(sys.argv[1])):
        print(f"written: {file}")
