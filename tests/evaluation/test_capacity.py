"""Stored bits: of models that know everything, one attribute, nothing, and less than nothing."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from moesaic.data import TaskEvaluationLoader
from moesaic.data.tasks import AssociativeRecall, Biographies
from moesaic.evaluation.capacity import capacity_numbers
from moesaic.evaluation.language_modeling import LanguageModelScore, evaluate_language_model
from moesaic.models import Decoder, account, llama4_toy

TASK = Biographies(people=30, name_parts=6, attributes=3, values=16)
BITS = 30 * 3 * 4
ACCOUNT = account(llama4_toy(), 16)


class Rigged(nn.Module):
    """A decoder whose logits are a function of the tokens."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.logits = logits
        self.head = nn.Linear(TASK.vocab_size, TASK.vocab_size, bias=False)
        nn.init.eye_(self.head.weight)  # hidden states are logits

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.logits(tokens), {}


def known_to(logits: Callable[[Tensor], Tensor], batch_size: int = 4) -> LanguageModelScore:
    batches = TaskEvaluationLoader(TASK, seq_len=22, batch_size=batch_size)  # four people, and two fillers
    return evaluate_language_model(cast(Decoder, Rigged(logits)), batches)


def uniform(tokens: Tensor) -> Tensor:
    """Every value alike, and nothing else."""
    logits = torch.full((*tokens.shape, TASK.vocab_size), -1e9)
    logits[..., TASK.name_parts : TASK.name_parts + TASK.values] = 0
    return logits


def oracle(tokens: Tensor) -> Tensor:
    """The next token, which is the answer wherever one is asked for."""
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
    return 1e4 * nn.functional.one_hot(following, TASK.vocab_size).float()


def knows_the_first(tokens: Tensor) -> Tensor:
    """The first attribute of each person only."""
    after_name = (torch.arange(tokens.size(1)) % TASK.length == TASK.name_length - 1)[None, :, None]
    return torch.where(after_name, oracle(tokens), uniform(tokens))


@pytest.mark.parametrize(
    ("logits", "share"), [(oracle, 1.0), (uniform, 0.0), (knows_the_first, 1 / 3)], ids=["all", "nothing", "a third"]
)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_known_bits_are_counted(logits: Callable[[Tensor], Tensor], share: float, batch_size: int) -> None:
    numbers = capacity_numbers(known_to(logits, batch_size), TASK, ACCOUNT)
    assert numbers["capacity/data_bits"] == BITS
    assert numbers["capacity/known_bits"] == pytest.approx(share * BITS, abs=1e-4)
    assert numbers["capacity/share"] == pytest.approx(share, abs=1e-6)
    assert numbers["capacity/bits_per_parameter"] == pytest.approx(share * BITS / ACCOUNT.parameters, abs=1e-8)
    active = numbers["capacity/bits_per_active_parameter"]
    assert active == pytest.approx(share * BITS / ACCOUNT.active_parameters, abs=1e-8)
    assert ACCOUNT.active_parameters < ACCOUNT.parameters


def test_who_may_also_name_a_name_knows_less_than_nothing() -> None:
    """Uniform over the whole vocabulary: the answers cost more than among the values alone."""
    numbers = capacity_numbers(known_to(lambda tokens: torch.zeros(*tokens.shape, TASK.vocab_size)), TASK, ACCOUNT)
    assert numbers["capacity/known_bits"] == pytest.approx(-90 * math.log2(TASK.vocab_size / TASK.values), abs=1e-3)


def test_other_data_have_no_capacity() -> None:
    score = LanguageModelScore()
    assert capacity_numbers(score, None, ACCOUNT) == {}
    assert capacity_numbers(score, AssociativeRecall(), ACCOUNT) == {}
