"""Balancing inside the training module: what is counted, when the bias moves, and that losses reach the router."""

import pytest
import torch
from small_fits import batches, fit, make

from moesaic.models import MoEConfig, llama4_toy
from moesaic.training.module import LanguageModel

BIASED = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, expert_bias=True))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]


def bias(module: LanguageModel, layer: int = 1) -> torch.Tensor:
    return module.decoder.get_buffer(f"layers.{layer}.ffn.router.expert_bias")


def test_bias_moves_once_per_step_by_the_counts_of_the_whole_step() -> None:
    micro = fit(make(BIASED, accumulate=2, expert_bias_update_rate=0.5), batches(2))
    assert set(bias(micro).abs().tolist()) <= {0.0, 0.5}, "one update of one rate, not one per micro-batch"
    both = batches(2)
    joined = [{key: torch.cat([batch[key] for batch in both]) for key in ("tokens", "labels")}]
    whole = fit(make(BIASED, expert_bias_update_rate=0.5), joined)
    assert torch.equal(bias(micro), bias(whole))


def test_validation_does_not_move_the_bias_and_padding_does_not_count() -> None:
    with_validation = fit(make(BIASED, expert_bias_update_rate=0.5), batches(1), validation=batches(3, size=4))
    without = fit(make(BIASED, expert_bias_update_rate=0.5), batches(1))
    assert torch.equal(bias(with_validation), bias(without))

    [batch] = batches(1)
    padding = torch.zeros(2, 48, dtype=torch.int64)
    padded = {
        "tokens": torch.cat((batch["tokens"], padding), dim=1),
        "labels": torch.cat((batch["labels"], padding - 100), dim=1),
        "valid": torch.arange(64).expand(2, 64) < 16,
    }
    module = fit(make(BIASED, expert_bias_update_rate=0.5), [padded])
    assert torch.equal(bias(module), bias(without))


def test_activation_checkpointing_counts_once_and_changes_nothing() -> None:
    plain = fit(make(BIASED, expert_bias_update_rate=0.5, load_balance_loss_weight=0.1), batches(3))
    recomputed = fit(
        make(BIASED, checkpoint_activations=True, expert_bias_update_rate=0.5, load_balance_loss_weight=0.1), batches(3)
    )
    for (name, a), b in zip(plain.state_dict().items(), recomputed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("weight", ["load_balance_loss_weight", "router_z_loss_weight"])
def test_each_loss_reaches_every_router(weight: str) -> None:
    plain = fit(make(llama4_toy()), batches(1))
    balanced = fit(make(llama4_toy(), **{weight: 1.0}), batches(1))
    for layer in (1, 3):
        name = f"layers.{layer}.ffn.router.weight"
        a, b = plain.decoder.get_parameter(name), balanced.decoder.get_parameter(name)
        assert not torch.allclose(a, b, atol=1e-6), name


def test_global_batch_scope_uses_the_counts_of_all_micro_batches() -> None:
    options = {"accumulate": 2, "load_balance_loss_weight": 1.0}
    micro = fit(make(llama4_toy(), **options), batches(2))
    whole = fit(make(llama4_toy(), **options, load_balance_scope="global_batch"), batches(2))
    name = "layers.1.ffn.router.weight"
    assert not torch.allclose(micro.decoder.get_parameter(name), whole.decoder.get_parameter(name), atol=1e-7)


@pytest.mark.slow
def test_balance_loss_balances() -> None:
    data = batches(1) * 60

    def violation(module: LanguageModel) -> float:
        output = module.decoder(data[0]["tokens"])
        counts = output.routing["layers.1.ffn"].tokens_per_expert.float()
        return float(counts.max() / counts.mean()) - 1

    assert violation(fit(make(llama4_toy(), load_balance_loss_weight=0.3), data)) < 0.5
