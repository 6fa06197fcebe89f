"""One batch of n is n micro-batches of 1: every label of an optimizer step counts the same."""

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from moesaic.config import to_mapping
from moesaic.data import Data, DataConfig, TokenStream, load_data
from moesaic.distillation import FrozenTeacher
from moesaic.distillation.config import DistillationConfig
from moesaic.errors import InputError
from moesaic.losses import SoftWeightConfig, linear_cross_entropy, load_balance_loss
from moesaic.models import DecoderConfig, build_decoder, llama4_toy
from moesaic.training.batches import RunBatches, require_same_batches
from moesaic.training.config import BalanceConfig, RunConfig, TrainerConfig, TrainingConfig
from moesaic.training.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]

MANY, STEPS, LENGTH = 4, 2, 64


def text() -> Data:
    ids = np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint16)
    stream = TokenStream(ids, None)
    return Data(train=stream, validation=stream, tokenizer=None, vocab_size=64, facts={})


DATA: dict[str, Any] = {
    "text": text,
    "associative_recall": lambda: load_data(DataConfig(source="associative_recall")),
    "selective_copying": lambda: load_data(DataConfig(source="selective_copying", task={"copies": [2, 9]})),
    "induction": lambda: load_data(DataConfig(source="induction", task={"triggers": [1, 6]})),
}
POLICY = SoftWeightConfig(value=0.7, gap=0.1, gate="confidence", ema=0.5)
TEACHERS = {
    "no teacher": None,
    "frozen": DistillationConfig(source="frozen", teacher="given", soft_weight=POLICY, divergence="jsd"),
    "joint": DistillationConfig(source="joint", soft_weight=POLICY),
}


class Fitted:
    """Gradients of every step by name, and the logged rows."""

    def __init__(
        self,
        data: Data,
        distillation: DistillationConfig | None,
        accumulate: int,
        balance: BalanceConfig | None = None,
        **options: Any,
    ) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.rows: list[dict[str, float]] = []
        model: DecoderConfig = llama4_toy(vocab_size=data.vocab_size, num_layers=2)
        config = RunConfig(
            name="test",
            model=to_mapping(model),
            training=TrainingConfig(
                steps=STEPS,
                batch_size=MANY // accumulate,
                seq_len=LENGTH,
                accumulate=accumulate,
                log_every=1,
                gradient_clip=0,
                validation_batches=1,
                validation_seq_len=None,
            ),
            balance=balance or BalanceConfig(load_balance_loss_weight=0.0, router_z_loss_weight=0.1),
            distillation=distillation,
            seed=3,
        )
        torch.manual_seed(1)
        teacher = FrozenTeacher(build_decoder(model, dtype=torch.float64))
        torch.manual_seed(3)
        module = LanguageModel(to_mapping(config), to_mapping(model), targets=teacher)
        self.config, self.decoder = config, copy.deepcopy(module.decoder).double()
        fitted = self

        class Logger(DummyLogger):
            def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
                fitted.rows.append({key: value for key, value in metrics.items() if "second" not in key})

        class Watch(pl.Callback):
            def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
                named = module.named_parameters()
                fitted.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

            def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
                module.log_step()

        trainer = pl.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_steps=STEPS,
            accumulate_grad_batches=accumulate,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            logger=Logger(),
            callbacks=[Watch()],
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **options,
        )
        trainer.fit(module, datamodule=RunBatches(config, data))


@pytest.mark.slow_but_for("copying")
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("source", DATA)
def test_gradients_and_rows_of_a_batch_are_those_of_its_micro_batches(source: str, teacher: str) -> None:
    data = DATA[source]()
    whole, parts = (Fitted(data, TEACHERS[teacher], accumulate) for accumulate in (1, MANY))
    assert len(parts.gradients) == len(whole.gradients) == STEPS
    for found, expected in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-7)
    for row, wanted in zip(parts.rows, whole.rows, strict=True):
        for name in wanted:
            if name.startswith(("train/loss", "distillation/", "train/grad_norm")):  # the log keeps fp32
                assert row[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-7), name


def test_a_balance_loss_over_the_global_batch_sees_the_counts_so_far() -> None:
    """That of the last micro-batch is exact, and so is a step of one."""
    data = DATA["text"]()
    balance = BalanceConfig(load_balance_loss_weight=1.0, load_balance_scope="global_batch")
    parts, whole = (Fitted(data, None, accumulate, balance) for accumulate in (2, 1))
    batches = [RunBatches(parts.config, data).training().batch(i) for i in range(2)]
    everything = {key: torch.cat([batch[key] for batch in batches]) for key in ("tokens", "labels")}
    num_valid = everything["labels"].numel()

    def gradients(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        decoder, seen = copy.deepcopy(parts.decoder), dict[str, Tensor]()
        for batch in steps:
            hidden, routing = decoder.hidden_states(batch["tokens"])
            loss = linear_cross_entropy(
                hidden.flatten(0, 1), decoder.head.weight, batch["labels"].flatten(), num_valid=num_valid
            )
            for name, decided in routing.items():
                seen[name] = seen.get(name, 0) + decided.tokens_per_expert
                balance_loss = load_balance_loss(
                    decided.logits, decided.expert_ids, load=seen[name], num_valid=num_valid
                )
                loss = loss + balance_loss / len(routing)
            loss.backward()
        return {f"decoder.{name}": p.grad for name, p in decoder.named_parameters() if p.grad is not None}

    for fitted, steps in ((parts, batches), (whole, [everything])):
        torch.testing.assert_close(fitted.gradients[0], gradients(steps), atol=1e-11, rtol=1e-7)
    found, exact = (each.gradients[0]["decoder.layers.1.ffn.router.weight"] for each in (parts, whole))
    assert (found - exact).norm() > 0.01 * exact.norm(), "they are not the same, as the config says"


def test_micro_batches_differ_in_their_labels() -> None:
    """Else the test above could not fail."""
    for source in ("associative_recall", "selective_copying", "induction"):
        task = DATA[source]().task
        counts = {int((torch.as_tensor(task.example("train", 3, i, LENGTH).labels) != -100).sum()) for i in range(MANY)}
        assert len(counts) > 1, source


@pytest.mark.parametrize(("count", "accumulate"), [(3, 2), (4, 2), (0.5, 1)])
def test_the_same_batches_are_a_number_of_whole_steps(count: float, accumulate: int) -> None:
    options = TrainerConfig(lightning={"overfit_batches": count})
    config = RunConfig(training=TrainingConfig(accumulate=accumulate), trainer=options)
    with pytest.raises(InputError, match=rf"trainer\.overfit_batches={count}, training\.accumulate={accumulate}: must"):
        require_same_batches(config)
