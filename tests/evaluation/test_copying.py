"""Copying a passage: a model that is rigged to know, one that knows nothing, and a hand-made example."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.evaluation.copying import CopyingConfig, copying_score, passages
from moesaic.models import Decoder

VOCABULARY = 11


class Copier(nn.Module):
    """Looks back `distance` tokens for what comes next; knows nothing before."""

    def __init__(self, distance: int) -> None:
        super().__init__()
        self.distance = distance
        self.device = torch.device("cpu")
        self.head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        nn.init.eye_(self.head.weight)

    def hidden_states(self, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits = torch.zeros(*tokens.shape, VOCABULARY)
        for t in range(self.distance - 1, tokens.size(1)):
            logits[torch.arange(tokens.size(0)), t, tokens[:, t + 1 - self.distance]] = 50.0
        return logits, {}


def test_a_copier_knows_the_second_copy_only() -> None:
    first = passages(CopyingConfig(length=7, sequences=20), None, VOCABULARY)
    found = copying_score(cast(Decoder, Copier(7)), first, batch_size=6)
    assert found["accuracy"] == 1.0
    assert found["second"] == pytest.approx(0.0, abs=1e-6)
    assert found["gain"] == found["first"] - found["second"]
    assert found["first"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_who_knows_nothing_is_at_chance_in_both() -> None:
    first = passages(CopyingConfig(length=7, sequences=20), None, VOCABULARY)
    found = copying_score(cast(Decoder, Copier(1000)), first)
    assert found["first"] == found["second"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert found["accuracy"] < 0.5


def test_passages_are_seeded_and_of_the_stream() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    config = CopyingConfig(length=5, sequences=8, seed=3)
    found = passages(config, tokens, 100)
    assert found.shape == (8, 5) and torch.equal(found, passages(config, tokens, 100))
    assert bool((found.diff(dim=1) == 1).all())
    assert not torch.equal(found, passages(CopyingConfig(length=5, sequences=8, seed=4), tokens, 100))
    with pytest.raises(InputError, match="the split has 100 tokens"):
        passages(CopyingConfig(length=101), tokens, 100)
    with pytest.raises(ValueError, match="length=1: must be an integer >= 2"):
        CopyingConfig(length=1)
