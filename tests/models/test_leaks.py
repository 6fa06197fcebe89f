"""What the parts of a model state of later tokens and other sequences."""

from typing import Any

import pytest
import torch

from moesaic.config import from_mapping
from moesaic.layers import TopKRouter
from moesaic.layers.routers import ROUTERS
from moesaic.models import DecoderConfig
from moesaic.models.leaks import SEES_LATER, SEES_OTHERS, Leaks, leaks_of

SIZES: dict[str, Any] = {"vocab_size": 16, "dim": 8, "num_layers": 2, "hidden_dim": 8, "attention": {"num_heads": 2}}


class Silent(TopKRouter):
    """A choice of somebody else's, who says nothing of it."""

    def select(self, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return (logits + logits.flip(0)).topk(self.top_k, dim=-1).indices


class Outspoken(Silent):
    """The same, that says so."""

    causal = False
    depends_on_batch = True


def model(router: Any = "top_k", ffn: Any = "moe", mixer: Any = "rope") -> DecoderConfig:
    moe = {"num_experts": 4, "hidden_dim": 8, "router": router}
    return from_mapping(DecoderConfig, {**SIZES, "moe": moe, "pattern": [{"mixer": mixer, "ffn": ffn}]})


@pytest.mark.parametrize("name", ROUTERS)
def test_a_built_in_router_says_what_its_class_says(name: Any) -> None:
    found = leaks_of(model({"type": name}))
    assert (found.causal, found.depends_on_batch) == (ROUTERS[name].causal, ROUTERS[name].depends_on_batch)


@pytest.mark.parametrize(
    ("parts", "words", "mark"),
    [
        ({}, ("yes", "no"), None),
        ({"ffn": "dense", "router": "expert_choice"}, ("yes", "no"), None),
        ({"router": "expert_choice"}, ("no", "yes"), SEES_LATER),
        ({"router": "capacity"}, ("yes", "yes"), SEES_OTHERS),
        ({"router": "uniform"}, ("yes", "yes"), None),
        ({"router": {"type": f"{__name__}.Silent"}}, ("not stated", "not stated"), None),
        ({"router": {"type": f"{__name__}.Outspoken"}}, ("no", "yes"), SEES_LATER),
        ({"ffn": {"type": "moesaic.layers.SoftMoE", "hidden_dim": 8, "num_experts": 2}}, ("no", "no"), SEES_LATER),
        ({"mixer": {"type": "moesaic.examples.custom_modules.GatedAverage"}}, ("not stated", "not stated"), None),
    ],
)
def test_words_and_marks(parts: dict[str, Any], words: tuple[str, str], mark: str | None) -> None:
    found = leaks_of(model(**parts))
    assert (found.words, found.mark) == (words, mark)
    assert Leaks(None, None).words == ("not stated", "not stated")
