"""The example of pipeline parallelism trains as one process does."""

import dataclasses

import pytest
import torch
from torch import Tensor, distributed

from moesaic.examples.pipeline import (
    BALANCE_WEIGHT,
    CONFIG,
    LEARNING_RATE,
    MICRO_BATCHES,
    Stage,
    Step,
    batches,
    cross_entropy,
    train_in_stages,
)
from moesaic.losses import load_balance_loss
from moesaic.models import Decoder, MoEConfig, build_decoder
from moesaic.parallel.workers import Workers

STEPS = 3


def decoder() -> Decoder:
    torch.manual_seed(0)
    return build_decoder(CONFIG, dtype=torch.float64)


def on_a_rank() -> tuple[list[Step], dict[str, Tensor]]:
    steps, stage = train_in_stages(decoder(), batches(STEPS))
    assert len(stage.layers) == CONFIG.num_layers // distributed.get_world_size()
    return steps, {name: each.detach().clone() for name, each in stage.named_parameters()}


def on_one() -> tuple[list[Step], dict[str, Tensor]]:
    """The whole decoder, with one loss of all that counts."""
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = []
    for tokens, labels in batches(STEPS):
        losses, balances = [], []
        for x, y in zip(tokens.chunk(MICRO_BATCHES), labels.chunk(MICRO_BATCHES), strict=True):
            logits, routing = model(x)
            losses.append(cross_entropy(logits, y))
            balances.append(sum(load_balance_loss(each.logits, each.expert_ids) for each in routing.values()))
        loss, balance = (torch.stack(each).mean() for each in (losses, balances))
        optimizer.zero_grad()
        (loss + BALANCE_WEIGHT * balance).backward()
        optimizer.step()
        steps.append(Step(loss.item(), balance.item()))
    return steps, {name: each.detach() for name, each in model.named_parameters()}


@pytest.mark.parametrize("stages", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stages_train_as_one_process(workers: Workers, stages: int) -> None:
    steps, weights = on_one()
    results = workers.run(on_a_rank, stages)
    for found, _ in results:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(steps), atol=1e-12, rtol=0)
    held = {name: each for _, part in results for name, each in part.items()}
    assert held.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(held[name], weight, atol=1e-9, rtol=0)


def test_tied_embeddings_are_refused() -> None:
    model = decoder()
    model.tie_embeddings = True
    with pytest.raises(ValueError, match="tie_embeddings=True: must be False"):
        Stage(model, range(2))


def test_a_router_that_asks_for_more_than_x_is_refused() -> None:
    moe = MoEConfig(num_experts=4, hidden_dim=24, router="hash")
    with pytest.raises(ValueError, match="layer 1: its router asks for more than x"):
        Stage(build_decoder(dataclasses.replace(CONFIG, moe=moe)), range(2))
