"""Balancing inside the training module: what is counted, when the bias moves, and that losses reach the router."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from moesaic.config import to_mapping
from moesaic.data import with_step_counts
from moesaic.models import DecoderConfig, MoEConfig, llama4_toy
from moesaic.training.config import BalanceConfig, RunConfig, TrainerConfig, TrainingConfig
from moesaic.training.module import LanguageModel

Batch = dict[str, torch.Tensor]


def batches(count: int, size: int = 2, length: int = 16) -> list[Batch]:
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 512, (size, length + 1), generator=draw) for _ in range(count)]
    return [{"tokens": t[:, :-1], "labels": t[:, 1:]} for t in tokens]


def make(
    model: DecoderConfig, *, accumulate: int = 1, checkpoint_activations: bool = False, **balance: Any
) -> LanguageModel:
    torch.manual_seed(0)
    config = RunConfig(
        name="test",
        model=to_mapping(model),
        training=TrainingConfig(steps=3, batch_size=2, seq_len=16, accumulate=accumulate, log_every=1),
        balance=BalanceConfig(**balance),
        trainer=TrainerConfig(checkpoint_activations=checkpoint_activations),
    )
    return LanguageModel(to_mapping(config), to_mapping(model))


def fit(module: LanguageModel, data: list[Batch], validation: list[Batch] | None = None) -> LanguageModel:
    training = module.config.training
    steps = [data[i : i + training.accumulate] for i in range(0, len(data), training.accumulate)]
    data = [batch for step in steps for batch in with_step_counts(step)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=len(data) // training.accumulate,
        accumulate_grad_batches=training.accumulate,
        val_check_interval=1 if validation else None,
        num_sanity_val_steps=0,
        logger=DummyLogger(),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(
        module, DataLoader(data, batch_size=None), DataLoader(validation, batch_size=None) if validation else None
    )  # type: ignore[arg-type]
    return module


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
