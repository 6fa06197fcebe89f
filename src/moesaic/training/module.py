"""The LightningModule: losses, balancing, metrics, optimiser, and everything a resumed run needs."""

import dataclasses
import math
import random
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from moesaic.config import from_mapping
from moesaic.distillation import CacheThrough, FrozenTeacher, TargetSource
from moesaic.distillation.config import teacher_mapping
from moesaic.evaluation.drift import RunningDrift
from moesaic.evaluation.language_modelling import LanguageModelScore
from moesaic.evaluation.routing import RoutingHealth, routing_health
from moesaic.layers import Routing, TopKRouter, count_tokens
from moesaic.losses import (
    HeadTargets,
    SoftWeight,
    Targets,
    linear_codistillation_loss,
    linear_cross_entropy,
    load_balance_loss,
    router_z_loss,
    update_expert_bias,
)
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import Account, Decoder, DecoderConfig, account, build_decoder
from moesaic.training.config import OptimizerConfig, RunConfig
from moesaic.training.optimizers import build_optimizer, learning_rate_factor

__all__ = ["Diverged", "LanguageModel"]

Batch = dict[str, Tensor]

DISTILLATION_STATISTICS = ("soft_weight", "hard", "soft", "teacher_loss", "agreement")
"""Of `CodistillationOutput`, means over the micro-batches since the last logged step."""


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; raised before the weights are touched."""


class LanguageModel(pl.LightningModule):
    """Next-token training of a decoder, with `distillation` in its config towards soft targets as well.

    A teacher that trains along is `teacher`, a second decoder with losses, balancing, clipping and parameter groups of
    its own: it ends bit-equal to a run of its own with this seed. The source of other targets is no submodule, so that
    no checkpoint and no optimiser holds a frozen teacher.

    Args:
        config: plain mapping of a `RunConfig` (plain, so that checkpoints load with weights_only=True).
        model: plain mapping of the `DecoderConfig`, vocabulary included.
        tokenizer: what `tokenizer_from_dict` needs, or None; it makes a checkpoint self-contained.
        token_bytes: length of each token in bytes, or None if unknown.
        targets: where the targets of distillation.source frozen or cached come from.
    """

    def __init__(
        self,
        config: dict[str, Any],
        model: dict[str, Any],
        tokenizer: dict[str, Any] | None = None,
        token_bytes: list[int] | None = None,
        targets: TargetSource | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["targets"])
        self.config = from_mapping(RunConfig, config)
        model_config = from_mapping(DecoderConfig, model, "model")
        recompute, distillation = self.config.trainer.checkpoint_activations, self.config.distillation
        self.teacher: Decoder | None = None
        """Trains along."""
        if distillation is not None and distillation.source == "joint":
            teacher_config = from_mapping(DecoderConfig, teacher_mapping(model, distillation.teacher_model))
            with torch.random.fork_rng(devices=[]):  # both begin as they would in a run of their own
                torch.default_generator.manual_seed(self.config.seed)
                self.teacher = build_decoder(teacher_config, checkpoint_activations=recompute)
        self.decoder: Decoder = build_decoder(model_config, checkpoint_activations=recompute)
        self.soft_weight = None if distillation is None else SoftWeight(distillation.weight_policy)
        self.targets = targets
        seq_len = self.config.training.seq_len
        self.teacher_account: Account | None = None
        """Of whoever computes targets in this run."""
        if (teacher := self.teacher or _teacher_of(targets)) is not None:
            assert teacher.config is not None  # as `build_decoder` leaves it
            self.teacher_account = account(teacher.config, seq_len)
        if self.config.trainer.compile:
            from torch import _dynamo

            # blocks of another kind, and evaluation, are further variants of the same code
            _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
            for block in (*self.decoder.layers, *(() if self.teacher is None else self.teacher.layers)):
                block.compile()
        self.training_flops_per_token = account(model_config, seq_len).training_flops
        self.token_bytes = None if token_bytes is None else torch.tensor(token_bytes)
        self.score = LanguageModelScore(self.token_bytes)
        self.teacher_score = LanguageModelScore(self.token_bytes)
        self.drift = RunningDrift()
        self.seconds = 0.0
        """Time spent in training before this process, and up to the last logged step."""
        self.tokens_per_second = 0.0
        """In training, since this process began."""
        self.step_load: dict[str, Tensor] = {}
        """Valid tokens per expert and MoE layer since the last optimiser step."""
        self.logged_load: dict[str, Tensor] = {}
        """The same since the last logged step, for the routing monitor."""
        self.teacher_step_load: dict[str, Tensor] = {}
        """`step_load` of a teacher that trains along."""
        self.health: dict[str, RoutingHealth] = {}
        """Router health on the last micro-batch of a logged step."""
        self._auxiliary: dict[str, Tensor] = {}
        self._nats = torch.zeros(())
        self._distillation = torch.zeros(len(DISTILLATION_STATISTICS))
        self._step_losses = torch.zeros(3)
        """Sums since the last optimiser step: the student's nats, the teacher's nats, valid labels."""
        self._micro_batches = 0

    # ---- training

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        valid = batch["valid"].flatten() if "valid" in batch else None
        hidden, routing = self.decoder.hidden_states(batch["tokens"])
        if self.soft_weight is None:
            loss = linear_cross_entropy(hidden.flatten(0, 1), self.decoder.head.weight, batch["labels"].flatten())
            self._last_loss = loss.detach()
        else:
            loss = self._codistillation_loss(hidden, batch, valid)
        self._tokens_in = batch["tokens"]
        self._nats = self._nats.to(loss.device) + self._last_loss
        self._micro_batches += 1
        for name, counts in _count(routing, valid).items():
            self.step_load[name] = counts + self.step_load.get(name, 0)
            self.logged_load[name] = counts + self.logged_load.get(name, 0)
        if self._is_logged(self.trainer.global_step + 1):
            self.health = {name: routing_health(decided, valid) for name, decided in routing.items()}
        return loss + self._balance_loss("train", routing, valid, self.step_load)

    def _codistillation_loss(self, hidden: Tensor, batch: Batch, valid: Tensor | None) -> Tensor:
        """The student's loss, and to it that of a teacher that trains along, balance included."""
        distillation = self.config.distillation
        assert distillation is not None
        assert self.soft_weight is not None
        teacher_routing: dict[str, Routing] = {}
        if self.teacher is not None:  # its one forward pass is for its own loss and for the student
            teacher_hidden, teacher_routing = self.teacher.hidden_states(batch["tokens"])
            targets: Targets = HeadTargets(teacher_hidden.flatten(0, 1), self.teacher.head.weight)
        else:
            assert self.targets is not None, "a source of targets is needed to train, not to evaluate"
            targets = self.targets.targets(batch)
        labels = batch["labels"].flatten()
        output = linear_codistillation_loss(
            hidden.flatten(0, 1),
            self.decoder.head.weight,
            labels,
            targets,
            soft_weight=self.soft_weight.weight(min(1.0, self.trainer.global_step / self.config.training.steps)),
            divergence=distillation.divergence,
            coefficient=distillation.coefficient,
            temperature=distillation.temperature,
            gate=self.soft_weight.gate,
            train_teacher=self.teacher is not None,
        )
        hard, teacher_loss = output.hard, output.teacher_loss.detach()
        self._last_loss, self._last_teacher_loss = hard, teacher_loss
        statistics = torch.stack([getattr(output, name).detach() for name in DISTILLATION_STATISTICS])
        self._distillation = self._distillation.to(hidden.device) + statistics
        num_valid = (labels != IGNORE_INDEX).sum()
        sums = torch.stack((hard * num_valid, teacher_loss * num_valid, num_valid.to(hard.dtype)))
        self._step_losses = self._step_losses.to(hidden.device) + sums
        if self.teacher is None:
            return output.loss
        for name, counts in _count(teacher_routing, valid).items():
            self.teacher_step_load[name] = counts + self.teacher_step_load.get(name, 0)
        balance = self._balance_loss("teacher", teacher_routing, valid, self.teacher_step_load)
        return output.loss + output.teacher_loss + balance

    def _balance_loss(
        self, network: str, routing: dict[str, Routing], valid: Tensor | None, step_load: dict[str, Tensor]
    ) -> Tensor | float:
        """The weighted auxiliary losses, each the mean over MoE layers; logged unweighted below the network's name."""
        balance = self.config.balance
        total: Tensor | float = 0.0
        if balance.load_balance_loss_weight and routing:
            over_global_batch = balance.load_balance_scope == "global_batch"
            terms = []
            for name, decided in routing.items():
                load = self._over_ranks(step_load[name]) if over_global_batch else None
                terms.append(load_balance_loss(decided.logits, decided.expert_ids, valid, load))
            term = torch.stack(terms).mean()
            self._auxiliary[f"{network}/load_balance_loss"] = term.detach()
            total = total + balance.load_balance_loss_weight * term
        if balance.router_z_loss_weight and routing:
            term = torch.stack([router_z_loss(decided.logits, valid) for decided in routing.values()]).mean()
            self._auxiliary[f"{network}/router_z_loss"] = term.detach()
            total = total + balance.router_z_loss_weight * term
        return total

    def on_train_start(self) -> None:
        self._started = time.perf_counter() - self.seconds
        self._tokens_at_start = self._tokens(self.trainer.global_step)
        self._seconds_at_start = self.seconds

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Between backward and step: what moves by the counts and losses of this whole step."""
        self._move_biases(self.decoder, self.step_load)
        self.step_load = {}
        if self.teacher is not None:
            self._move_biases(self.teacher, self.teacher_step_load)
            self.teacher_step_load = {}
        if self.soft_weight is not None:
            student, teacher, num_valid = self._over_ranks(self._step_losses)
            if num_valid:
                self.soft_weight.update(student / num_valid, teacher / num_valid)
            self._step_losses = torch.zeros_like(self._step_losses)

    def _move_biases(self, decoder: Decoder, step_load: dict[str, Tensor]) -> None:
        if rate := self.config.balance.expert_bias_update_rate:
            for name, counts in step_load.items():
                router = decoder.get_submodule(f"{name}.router")
                if isinstance(router, TopKRouter) and router.expert_bias is not None:
                    update_expert_bias(router.expert_bias, self._over_ranks(counts), rate)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by its own total norm, and stop if one is not finite: the weights are still good."""
        limit = self.config.training.gradient_clip or math.inf
        # the teacher first: if it is broken, so are the student's gradients
        for name, decoder in (("teacher", self.teacher), ("train", self.decoder)):
            if decoder is None:
                continue
            norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), limit)
            if not math.isfinite(norm):
                raise Diverged(self._describe_divergence(decoder))
            self._auxiliary[f"{name}/grad_norm"] = norm

    @torch.no_grad()
    def _describe_divergence(self, decoder: Decoder) -> str:
        """Name the first layer whose output is not finite, else the first parameter whose gradient is not."""
        place = None
        x = decoder.embedding(self._tokens_in)
        for i, block in enumerate(decoder.layers):
            x, _ = block(x)
            if not bool(x.isfinite().all()):
                place = f"layers.{i} is the first layer with a non-finite output"
                break
        if place is None:
            broken = [
                name
                for name, p in decoder.named_parameters()
                if p.grad is not None and not bool(p.grad.isfinite().all())
            ]
            place = f"all layers' outputs are finite, the gradient of {broken[0] if broken else 'no parameter'} is not"
        if self.soft_weight is not None and decoder is self.decoder and not self._last_teacher_loss.isfinite():
            place = f"the loss of the teacher is {float(self._last_teacher_loss):.4g}"
        optimizer, key = self.config.optimizer, "optimizer.learning_rate"
        loss, whose = self._last_loss, "the loss"
        if decoder is self.teacher:
            optimizer, key = self._teacher_optimizer(), "distillation.teacher_learning_rate"
            loss, whose = self._last_teacher_loss, "the loss of the teacher that trains along"
        return (
            f"step {self.trainer.global_step}: {whose} is {float(loss):.4g}; {place}. Likely cause: "
            f"{key}={optimizer.learning_rate} is too high, or the weights of a "
            "checkpoint were already broken. Training stops before this step; the last checkpoint is good."
        )

    def log_step(self) -> bool:
        """Write this step's row if it is a logged step; called by `RunMonitor` before any checkpoint is taken."""
        step = self.trainer.global_step
        if self._micro_batches < self.config.training.accumulate or not self._is_logged(step):
            return False
        self.seconds = time.perf_counter() - self._started
        tokens = self._tokens(step)
        trained, elapsed = tokens - self._tokens_at_start, self.seconds - self._seconds_at_start
        self.tokens_per_second = trained / max(1e-9, elapsed)
        loss = (self._nats / self._micro_batches).item()
        row = {"train/loss": loss, "tokens_per_second": self.tokens_per_second}
        row["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        row |= {name: value.item() for name, value in self._auxiliary.items()}
        if self.soft_weight is not None:
            means = (self._distillation / self._micro_batches).tolist()
            row |= {f"distillation/{name}": mean for name, mean in zip(DISTILLATION_STATISTICS, means, strict=True)}
            row["distillation/loss_gap"] = self.soft_weight.loss_gap().item()
        for name, health in self.health.items():
            row |= {f"router/{name}/{measure}": value for measure, value in dataclasses.asdict(health).items()}
        self.log_row(row)
        self.log_dict({"loss": loss, "tokens/s": self.tokens_per_second}, prog_bar=True, logger=False)
        self._nats = torch.zeros_like(self._nats)
        self._distillation = torch.zeros_like(self._distillation)
        self._micro_batches = 0
        return True

    def log_row(self, row: dict[str, float]) -> None:
        """Write one row to every logger, with what it is plotted against."""
        step = self.trainer.global_step
        tokens = self._tokens(step)
        axes = {"tokens": tokens, "seconds": self.seconds, "active_flops": tokens * self.training_flops_per_token}
        if self.soft_weight is not None:
            axes["teacher_flops"] = self.teacher_flops
        for logger in self.loggers:
            logger.log_metrics({**axes, **row}, step=step)

    @property
    def teacher_flops(self) -> float:
        """What the teacher's passes cost so far: one that trains along forward and backward, a frozen one forward.

        A cache costs nothing, but for the windows that it lacked.
        """
        seq_len, tokens = self.config.training.seq_len, self._tokens(self.trainer.global_step)
        if self.teacher_account is None:
            return 0.0
        if self.teacher is not None:
            return tokens * self.teacher_account.training_flops
        if isinstance(self.targets, CacheThrough):
            tokens = self.targets.misses * seq_len
        return tokens * self.teacher_account.forward_flops

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self.score = LanguageModelScore(self.token_bytes)
        self.teacher_score = LanguageModelScore(self.token_bytes)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        output = self.decoder(batch["tokens"])
        self.score.update(output, batch["labels"], batch.get("valid"))
        self.drift.update(output, batch)
        if self.teacher is not None:
            self.teacher_score.update(self.teacher(batch["tokens"]), batch["labels"], batch.get("valid"))

    def on_validation_epoch_end(self) -> None:
        metrics = {"validation/loss": self.score.loss}
        if self.score.bits_per_byte is not None:
            metrics["validation/bits_per_byte"] = self.score.bits_per_byte
        if self.teacher is not None:
            metrics["validation/teacher_loss"] = self.teacher_score.loss
        metrics |= self.drift.finish()
        self.log_dict(metrics, prog_bar=False, logger=False, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.log_row(metrics)

    # ---- optimiser and state

    def configure_optimizers(self) -> Any:
        beside = None if self.teacher is None else (self.teacher, self._teacher_optimizer())
        optimizer = build_optimizer(self.decoder, self.config.optimizer, beside)
        factor = learning_rate_factor(self.config.schedule, self.config.training.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _teacher_optimizer(self) -> OptimizerConfig:
        distillation, optimizer = self.config.distillation, self.config.optimizer
        assert distillation is not None
        return dataclasses.replace(
            optimizer,
            learning_rate=distillation.teacher_learning_rate or optimizer.learning_rate,
            muon_learning_rate=distillation.teacher_muon_learning_rate or optimizer.muon_learning_rate,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["moesaic"] = {
            "seconds": self.seconds,
            "nats": self._nats,
            "micro_batches": self._micro_batches,
            "logged_load": self.logged_load,
            "drift": self.drift.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
        }
        if self.soft_weight is not None:
            checkpoint["moesaic"]["distillation"] = self._distillation
        if isinstance(self.targets, CacheThrough):
            checkpoint["moesaic"]["targets"] = self.targets.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["moesaic"]
        self.seconds = state["seconds"]
        self._nats, self._micro_batches = state["nats"], state["micro_batches"]
        self.logged_load = state["logged_load"]
        self.drift.load_state_dict(state.get("drift", {}))
        self._distillation = state.get("distillation", self._distillation)
        if isinstance(self.targets, CacheThrough) and "targets" in state:
            self.targets.load_state_dict(state["targets"], same_run=self.config.resume)
        torch.set_rng_state(state["torch_rng"].cpu())
        version, internal, gauss = state["python_rng"]
        random.setstate((version, tuple(internal), gauss))

    def _is_logged(self, step: int) -> bool:
        training = self.config.training
        return step % training.log_every == 0 or step in (1, training.steps)

    def _tokens(self, step: int) -> int:
        training = self.config.training
        return step * training.batch_size * training.seq_len * training.accumulate * self.trainer.world_size

    def _over_ranks(self, counts: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return counts
        return self.trainer.strategy.reduce(counts.clone(), reduce_op="sum")


def _teacher_of(targets: TargetSource | None) -> Decoder | None:
    """The one that computes these targets, all or some."""
    if isinstance(targets, CacheThrough):
        return targets.teacher.decoder
    return targets.decoder if isinstance(targets, FrozenTeacher) else None


def _count(routing: dict[str, Routing], valid: Tensor | None) -> dict[str, Tensor]:
    """Valid tokens per expert (E,) of each MoE layer."""
    return {name: count_tokens(decided.expert_ids, decided.logits.size(1), valid) for name, decided in routing.items()}
