"""Accuracy on recall tasks: predictors that know everything, nothing, or one slice, and the numbers made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from moesaic.data import TaskEvaluationLoader
from moesaic.data.tasks import AssociativeRecall, Induction, RecallTask, SelectiveCopying
from moesaic.evaluation.recall import RecallScore, evaluate_recall, plot_recall, recall_numbers
from moesaic.models import Decoder

Batch = dict[str, Tensor]
TASKS = [AssociativeRecall(), SelectiveCopying(), Induction()]
BY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


class Rigged(nn.Module):
    """A decoder whose answers are a function of the batch."""

    def __init__(self, batches: list[Batch], answer: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.batches = iter(batches)
        self.answer = answer

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert not self.training
        batch = next(self.batches)
        assert torch.equal(batch["tokens"], tokens)
        logits = self.answer(batch)
        self.head = nn.Linear(logits.size(-1), logits.size(-1), bias=False)
        nn.init.eye_(self.head.weight)  # hidden states are logits
        return logits, {}


def score(task: RecallTask, answer: Callable[[Batch], Tensor], seq_len: int = 64) -> RecallScore:
    batches = list(TaskEvaluationLoader(task, seq_len=seq_len, batch_size=16))
    decoder = Rigged(batches, answer).train()
    found = evaluate_recall(cast(Decoder, decoder), batches)
    assert decoder.training
    return found


def logits_of(labels: Tensor, vocab_size: int) -> Tensor:
    """Finite, and largest for the label; for 0 where there is none."""
    return nn.functional.one_hot(labels.clamp(min=0), vocab_size).float()


@BY_TASK
def test_who_knows_scores_one_and_who_is_always_wrong_zero(task: RecallTask) -> None:
    right = score(task, lambda batch: logits_of(batch["labels"], task.vocab_size))
    wrong = score(task, lambda batch: -logits_of(batch["labels"], task.vocab_size))
    assert right.accuracy == 1.0
    assert wrong.accuracy == 0.0
    assert right.answers == task.test_sequences * sum(task.sizes) / len(task.sizes)
    for name in right.slices:
        assert set(right.by_slice(name).values()) == {1.0}, name
        assert set(wrong.by_slice(name).values()) == {0.0}, name
        assert sum(answers for answers, _ in right.slices[name].values()) == right.answers, name


@BY_TASK
def test_who_guesses_scores_chance(task: RecallTask) -> None:
    """A uniform guess among the tokens that are answers."""
    kinds = torch.cat([batch["labels"] for batch in TaskEvaluationLoader(task, seq_len=64, batch_size=256)]).unique()
    kinds = kinds[kinds >= 0]
    assert task.chance == 1 / len(kinds)

    def guess(batch: Batch) -> Tensor:
        logits = torch.full((*batch["tokens"].shape, task.vocab_size), -1.0)
        logits[..., kinds] = torch.rand(*batch["tokens"].shape, len(kinds))
        return logits

    found = score(task, guess)
    standard_error = (task.chance * (1 - task.chance) / found.answers) ** 0.5
    assert abs(found.accuracy - task.chance) < 4 * standard_error
    assert found.accuracy > 0


def test_slices_tell_apart_what_is_known() -> None:
    """A predictor that looks back 16 tokens at most."""
    task = AssociativeRecall(pairs=(2, 4))

    def near_sighted(batch: Batch) -> Tensor:
        return logits_of(batch["labels"].where(batch["slices/distance"] <= 16, 0), task.vocab_size)

    found = score(task, near_sighted)
    assert found.by_slice("distance") == {2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 0.0, 64: 0.0}
    assert 0 < found.accuracy < 0.5
    assert list(found.by_slice("pairs")) == [2, 4]


def test_counts_by_hand() -> None:
    found = RecallScore()
    labels = torch.tensor([[-100, 1, 0], [2, -100, 1]])
    slices = torch.tensor([[-1, 4, 8], [4, -1, 8]])
    logits = torch.zeros(2, 3, 3)
    logits[0, 0, 2] = logits[0, 1, 1] = logits[0, 2, 2] = logits[1, 0, 2] = logits[1, 1, 0] = logits[1, 2, 1] = 5.0
    batch = {"labels": labels, "slices/pairs": slices, "valid": torch.ones(2, 3)}
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for _ in range(2):
        decoder = Rigged([{"tokens": tokens}], lambda _: logits).eval()
        found.update(cast(Decoder, decoder), {"tokens": tokens, **batch})
    assert (found.answers, found.correct) == (8, 6)
    assert found.by_slice("pairs") == {4: 1.0, 8: 0.5}
    longer = RecallScore(answers=4, correct=1)
    assert recall_numbers({4: longer, 1: found}) == {
        "recall/accuracy": 0.75,
        "recall/accuracy/pairs=4": 1.0,
        "recall/accuracy/pairs=8": 0.5,
        "recall/accuracy/length=4x": 0.25,
    }


def test_without_an_answer() -> None:
    assert RecallScore().accuracy == 0.0


@pytest.mark.slow
def test_plot(tmp_path: Path) -> None:
    task = SelectiveCopying(copies=(2,), test_sequences=8)
    scores = {
        multiple: score(task, lambda batch: logits_of(batch["labels"], task.vocab_size), seq_len=16 * multiple)
        for multiple in (1, 4)
    }
    plot_recall(scores, tmp_path / "plots" / "recall.png", 16, task.chance)
    assert (tmp_path / "plots" / "recall.png").read_bytes().startswith(b"\x89PNG")
