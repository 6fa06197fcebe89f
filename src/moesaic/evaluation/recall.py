"""Accuracy on tasks, by slice and by length."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesaic.data import Task, TaskEvaluationLoader
from moesaic.evaluation.plotting import COLORS, GRAY, label_axes, mark_chance, new_figure, save_figure
from moesaic.losses import likeliest_tokens
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import Decoder

__all__ = ["RecallScore", "evaluate_recall", "plot_recall", "recall_numbers", "score_recall"]

PREFIX = "slices/"


@dataclasses.dataclass
class RecallScore:
    """Running counts over batches; `update` adds one. An answer is right if no token has a larger logit."""

    answers: int = 0
    correct: int = 0
    slices: dict[str, dict[int, list[int]]] = dataclasses.field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: [0, 0]))
    )
    """Name -> value -> [answers, correct]."""

    @torch.no_grad()
    def update(self, decoder: Decoder, batch: Mapping[str, Tensor]) -> None:
        """Run `decoder` on a batch of "tokens", "labels" and "slices/<name>", each (B, L), and add its answers.

        The (B, L, V) logits are never built, and those of no other place than the answers'.
        """
        asked = batch["labels"] != IGNORE_INDEX
        hidden = decoder.hidden_states(batch["tokens"])[0]
        right = likeliest_tokens(hidden[asked], decoder.head.weight) == batch["labels"][asked]
        self.answers += right.numel()
        self.correct += int(right.sum())
        for key in batch:
            if not key.startswith(PREFIX):
                continue
            counts = self.slices[key.removeprefix(PREFIX)]
            under = batch[key][asked]
            for value in under.unique().tolist():
                chosen = right[under == value]
                counts[value][0] += chosen.numel()
                counts[value][1] += int(chosen.sum())

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 without any."""
        return self.correct / max(1, self.answers)

    def by_slice(self, name: str) -> dict[int, float]:
        """Accuracy for each value of a slice that occurred, in rising order."""
        return {value: correct / answers for value, (answers, correct) in sorted(self.slices[name].items())}


@torch.inference_mode()
def evaluate_recall(decoder: Decoder, batches: Iterable[dict[str, Tensor]]) -> RecallScore:
    """Score `decoder` in evaluation mode on batches of tokens, labels and slices, each (B, L)."""
    was_training = decoder.training
    device = decoder.device
    score = RecallScore()
    decoder.eval()
    try:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            score.update(decoder, batch)
    finally:
        decoder.train(was_training)
    return score


def recall_numbers(scores: Mapping[int, RecallScore]) -> dict[str, float]:
    """What metrics.json holds of the scores at multiples (1 among them) of the training length.

    recall/accuracy and recall/accuracy/<slice>=<value> at the training length, recall/accuracy/length=4x and
    recall/accuracy/length=4x/<slice>=<value> at four times it.
    """
    numbers = {}
    for multiple, score in sorted(scores.items()):
        name = "recall/accuracy" if multiple == 1 else f"recall/accuracy/length={multiple}x"
        numbers[name] = score.accuracy
        for slice_name in sorted(score.slices):
            for value, accuracy in score.by_slice(slice_name).items():
                numbers[f"{name}/{slice_name}={value}"] = accuracy
    return numbers


def plot_recall(scores: Mapping[int, RecallScore], out: Path, train_length: int, chance: float) -> None:
    """Accuracy by slice, one panel per slice and one line per length of the sequences, beside chance."""
    names = sorted({name for score in scores.values() for name in score.slices})
    figure, axes = new_figure(1, len(names), width=2 + 4 * len(names), height=4)
    for axis, name in zip(axes, names, strict=True):
        for i, (multiple, score) in enumerate(sorted(scores.items())):
            found = score.by_slice(name)
            axis.plot(
                list(found), list(found.values()), color=COLORS[i % len(COLORS)], marker="o", markersize=4,
                label=f"length {multiple * train_length}: {score.accuracy:.3f}",
            )  # fmt: skip
        mark_chance(axis, chance)
        if name == "distance":
            axis.set_xscale("log", base=2)
            axis.axvline(train_length, color=GRAY, linestyle="--", linewidth=1)
            axis.annotate(
                f"training length {train_length}", (train_length, 0.02), xycoords=("data", "axes fraction"),
                xytext=(4, 0), textcoords="offset points", color=GRAY, fontsize=8,
            )  # fmt: skip
        else:
            values = sorted({value for score in scores.values() for value in score.slices[name]})
            if values[0] > 0:  # places count from 0, amounts from 1
                axis.set_xscale("log", base=2)
            axis.set_xticks(values)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.set_ylim(-0.03, 1.03)
        label_axes(axis, f"Accuracy by {name}", name if name != "distance" else "distance (tokens, up to)", "accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, out)


def score_recall(decoder: Decoder, task: Task, seq_len: int, batch_size: int) -> dict[int, RecallScore]:
    """Multiple of the training length -> score; `recall_numbers` makes metrics of them.

    Args:
        seq_len: the training length.
        batch_size: of sequences of that length; as many tokens of longer ones run together.

    Raises:
        InputError: the test sequences do not fit seq_len.
    """
    scores = {}
    for multiple in task.multiples:
        loader = TaskEvaluationLoader(
            task,
            seq_len=multiple * seq_len,
            batch_size=max(1, batch_size // multiple),
            growth=task.growth(multiple),
        )
        scores[multiple] = evaluate_recall(decoder, loader)
    return scores
