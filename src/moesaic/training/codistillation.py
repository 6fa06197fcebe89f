"""Soft targets beside the labels: the loss, what it measured, and what the teacher cost."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moesaic.distillation import CacheThrough, FrozenTeacher, TargetSource
from moesaic.distillation.config import DistillationConfig
from moesaic.layers import Routing
from moesaic.losses import HeadTargets, SoftWeight, Targets, linear_codistillation_loss
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import Account, Decoder, account
from moesaic.parallel.shards import whole
from moesaic.training.config import OptimizerConfig

__all__ = ["Codistillation"]

STATISTICS = ("soft_weight", "hard", "soft", "teacher_loss", "agreement")
"""Fields of `CodistillationOutput` whose means over the micro-batches since the last logged step are logged."""


class Codistillation:
    """Computes the loss of a student with soft targets. It owns no weights: those belong to the LightningModule.

    Args:
        soft_weight: the weight policy, with its running losses.
        teacher: the decoder that trains along, or None.
        targets: where other targets come from; None where this process evaluates only.
        seq_len: training length, for the teacher's FLOPs.
    """

    def __init__(
        self,
        config: DistillationConfig,
        soft_weight: SoftWeight,
        teacher: Decoder | None,
        targets: TargetSource | None,
        seq_len: int,
    ) -> None:
        self.config = config
        self.soft_weight = soft_weight
        self.teacher = teacher
        self.targets = targets
        self.seq_len = seq_len
        self.teacher_account: Account | None = None
        """Account of whoever computes targets in this run."""
        if (whoever := teacher or _teacher_of(targets)) is not None:
            assert whoever.config is not None  # as `build_decoder` leaves it
            self.teacher_account = account(whoever.config, seq_len)
        self.hard = torch.zeros(())
        """Loss of the student on the labels of the last micro-batch, its share of the mean over the step."""
        self.teacher_loss = torch.zeros(())
        self.statistics = torch.zeros(len(STATISTICS))
        self._step_losses = torch.zeros(3)
        """Sums since the last optimizer step: the student's nats, the teacher's nats, valid labels."""

    def loss(
        self,
        hidden: Tensor,
        head: Tensor,
        batch: dict[str, Tensor],
        progress: float,
        num_valid: Tensor,
        share: int,
    ) -> tuple[Tensor, dict[str, Routing]]:
        """Compute the student's loss, plus that of a teacher that trains along; balance is not in it.

        Args:
            hidden: (B, L, D) of the student.
            head: (V, D) weight of its head.
            progress: share of the run that is done.
            num_valid: labels of the whole optimizer step, () int64; all means are over these.
            share: micro-batches of the step, a factor on the loss and on what is logged.

        Returns:
            (scalar loss, what a teacher that trains along decided in its MoE layers).
        """
        routing: dict[str, Routing] = {}
        if self.teacher is not None:  # its one forward pass is for its own loss and for the student
            teacher_hidden, routing = self.teacher.hidden_states(batch["tokens"])
            targets: Targets = HeadTargets(teacher_hidden.flatten(0, 1), whole(self.teacher.head.weight))
        else:
            assert self.targets is not None, "a source of targets is needed to train, not to evaluate"
            targets = self.targets.targets(batch)
        labels = batch["labels"].flatten()
        output = linear_codistillation_loss(
            hidden.flatten(0, 1),
            head,
            labels,
            targets,
            soft_weight=self.soft_weight.weight(progress),
            divergence=self.config.divergence,
            coefficient=self.config.coefficient,
            temperature=self.config.temperature,
            gate=self.soft_weight.gate,
            num_valid=num_valid,
            train_teacher=self.teacher is not None,
        )
        own = (labels != IGNORE_INDEX).sum()
        sums = torch.stack(
            (output.hard * num_valid, output.teacher_loss.detach() * num_valid, own.to(output.hard.dtype))
        )
        self._step_losses = self._step_losses.to(hidden.device) + sums
        output = output._replace(**{name: value * share for name, value in output._asdict().items()})
        self.hard, self.teacher_loss = output.hard, output.teacher_loss.detach()
        statistics = torch.stack([getattr(output, name).detach() for name in STATISTICS])
        self.statistics = self.statistics.to(hidden.device) + statistics
        return (output.loss if self.teacher is None else output.loss + output.teacher_loss), routing

    @property
    def step_losses(self) -> Tensor:
        """Sums over the micro-batches of this step: the student's nats, the teacher's nats, valid labels."""
        return self._step_losses

    def end_step(self, sums: Tensor) -> None:
        """Move the weight policy by `step_losses` summed over all ranks (3,), and begin the next step."""
        student, teacher, num_valid = sums
        if num_valid:
            self.soft_weight.update(student / num_valid, teacher / num_valid)
        self._step_losses = torch.zeros_like(self._step_losses)

    def row(self, micro_batches: int) -> dict[str, float]:
        """Means over the micro-batches since the last row, which begin anew."""
        means = (self.statistics / micro_batches).tolist()
        self.statistics = torch.zeros_like(self.statistics)
        row = {f"distillation/{name}": mean for name, mean in zip(STATISTICS, means, strict=True)}
        return {**row, "distillation/loss_gap": self.soft_weight.loss_gap().item()}

    def teacher_flops(self, tokens: int) -> float:
        """FLOPs of the teacher's passes over so many tokens: forward and backward if it trains along, else forward.

        A cache costs nothing, but for the windows that it lacked.
        """
        if self.teacher_account is None:
            return 0.0
        if self.teacher is not None:
            return tokens * self.teacher_account.training_flops
        if isinstance(self.targets, CacheThrough):
            tokens = self.targets.misses * self.seq_len
        return tokens * self.teacher_account.forward_flops

    def teacher_optimizer(self, student: OptimizerConfig) -> OptimizerConfig:
        """The student's settings with the teacher's own learning rates, where it has some."""
        return dataclasses.replace(
            student,
            learning_rate=self.config.teacher_learning_rate or student.learning_rate,
            muon_learning_rate=self.config.teacher_muon_learning_rate or student.muon_learning_rate,
        )

    def save(self, state: dict[str, Any]) -> None:
        """Add to what a checkpoint keeps below "moesaic"."""
        state["distillation"] = self.statistics
        if isinstance(self.targets, CacheThrough):
            state["targets"] = self.targets.state_dict()

    def load(self, state: dict[str, Any], *, same_run: bool) -> None:
        self.statistics = state.get("distillation", self.statistics)
        if isinstance(self.targets, CacheThrough) and "targets" in state:
            self.targets.load_state_dict(state["targets"], same_run=same_run)


def _teacher_of(targets: TargetSource | None) -> Decoder | None:
    """The one that computes these targets, all or some."""
    if isinstance(targets, CacheThrough):
        return targets.teacher.decoder
    return targets.decoder if isinstance(targets, FrozenTeacher) else None
