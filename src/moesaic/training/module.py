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
from moesaic.evaluation.language_modelling import LanguageModelScore
from moesaic.evaluation.routing import RoutingHealth, routing_health
from moesaic.layers import Routing, TopKRouter, count_tokens
from moesaic.losses import linear_cross_entropy, load_balance_loss, router_z_loss, update_expert_bias
from moesaic.models import Decoder, DecoderConfig, account, build_decoder
from moesaic.training.config import RunConfig
from moesaic.training.optimizers import build_optimizer, learning_rate_factor

__all__ = ["Diverged", "LanguageModel"]

Batch = dict[str, Tensor]


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; raised before the weights are touched."""


class LanguageModel(pl.LightningModule):
    """Next-token training of a decoder.

    Args:
        config: plain mapping of a `RunConfig` (plain, so that checkpoints load with weights_only=True).
        model: plain mapping of the `DecoderConfig`, vocabulary included.
        tokenizer: what `tokenizer_from_dict` needs, or None; it makes a checkpoint self-contained.
        token_bytes: length of each token in bytes, or None if unknown.
    """

    def __init__(
        self,
        config: dict[str, Any],
        model: dict[str, Any],
        tokenizer: dict[str, Any] | None = None,
        token_bytes: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.config = from_mapping(RunConfig, config)
        model_config = from_mapping(DecoderConfig, model, "model")
        self.decoder: Decoder = build_decoder(
            model_config, checkpoint_activations=self.config.trainer.checkpoint_activations
        )
        if self.config.trainer.compile:
            from torch import _dynamo

            # blocks of another kind, and evaluation, are further variants of the same code
            _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
            for block in self.decoder.layers:
                block.compile()
        self.training_flops_per_token = account(model_config, self.config.training.seq_len).training_flops
        self.token_bytes = None if token_bytes is None else torch.tensor(token_bytes)
        self.score = LanguageModelScore(self.token_bytes)
        self.seconds = 0.0
        """Time spent in training before this process, and up to the last logged step."""
        self.tokens_per_second = 0.0
        """In training, since this process began."""
        self.step_load: dict[str, Tensor] = {}
        """Valid tokens per expert and MoE layer since the last optimiser step."""
        self.logged_load: dict[str, Tensor] = {}
        """The same since the last logged step, for the routing monitor."""
        self.health: dict[str, RoutingHealth] = {}
        """Router health on the last micro-batch of a logged step."""
        self._auxiliary: dict[str, Tensor] = {}
        self._nats = torch.zeros(())
        self._micro_batches = 0

    # ---- training

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        hidden, routing = self.decoder.hidden_states(batch["tokens"])
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.decoder.head.weight, batch["labels"].flatten())
        self._tokens_in, self._last_loss = batch["tokens"], loss.detach()
        self._nats = self._nats.to(loss.device) + self._last_loss
        self._micro_batches += 1
        valid = batch["valid"].flatten() if "valid" in batch else None
        for name, decided in routing.items():
            counts = count_tokens(decided.expert_ids, decided.logits.size(1), valid)
            self.step_load[name] = counts + self.step_load.get(name, 0)
            self.logged_load[name] = counts + self.logged_load.get(name, 0)
        if self._is_logged(self.trainer.global_step + 1):
            self.health = {name: routing_health(decided, valid) for name, decided in routing.items()}
        return loss + self._balance_loss(routing, valid)

    def _balance_loss(self, routing: dict[str, Routing], valid: Tensor | None) -> Tensor | float:
        """The weighted auxiliary losses, each the mean over MoE layers; logged unweighted."""
        balance = self.config.balance
        total: Tensor | float = 0.0
        if balance.load_balance_loss_weight and routing:
            over_global_batch = balance.load_balance_scope == "global_batch"
            terms = []
            for name, decided in routing.items():
                load = self._over_ranks(self.step_load[name]) if over_global_batch else None
                terms.append(load_balance_loss(decided.logits, decided.expert_ids, valid, load))
            term = torch.stack(terms).mean()
            self._auxiliary["train/load_balance_loss"] = term.detach()
            total = total + balance.load_balance_loss_weight * term
        if balance.router_z_loss_weight and routing:
            term = torch.stack([router_z_loss(decided.logits, valid) for decided in routing.values()]).mean()
            self._auxiliary["train/router_z_loss"] = term.detach()
            total = total + balance.router_z_loss_weight * term
        return total

    def on_train_start(self) -> None:
        self._started = time.perf_counter() - self.seconds
        self._tokens_at_start = self._tokens(self.trainer.global_step)
        self._seconds_at_start = self.seconds

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Between backward and step: move the selection biases by the counts of this whole step."""
        if rate := self.config.balance.expert_bias_update_rate:
            for name, counts in self.step_load.items():
                router = self.decoder.get_submodule(f"{name}.router")
                if isinstance(router, TopKRouter) and router.expert_bias is not None:
                    update_expert_bias(router.expert_bias, self._over_ranks(counts), rate)
        self.step_load = {}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the total norm, and stop here if it is not finite: the weights are still good."""
        limit = self.config.training.gradient_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), limit)
        if not math.isfinite(norm):
            raise Diverged(self._describe_divergence())
        self._auxiliary["train/grad_norm"] = norm

    @torch.no_grad()
    def _describe_divergence(self) -> str:
        """Name the first layer whose output is not finite, else the first parameter whose gradient is not."""
        place = None
        x = self.decoder.embedding(self._tokens_in)
        for i, block in enumerate(self.decoder.layers):
            x, _ = block(x)
            if not bool(x.isfinite().all()):
                place = f"layers.{i} is the first layer with a non-finite output"
                break
        if place is None:
            broken = [
                name
                for name, p in self.decoder.named_parameters()
                if p.grad is not None and not bool(p.grad.isfinite().all())
            ]
            place = f"all layers' outputs are finite, the gradient of {broken[0] if broken else 'no parameter'} is not"
        return (
            f"step {self.trainer.global_step}: the loss is {float(self._last_loss):.4g}; {place}. Likely cause: "
            f"optimizer.learning_rate={self.config.optimizer.learning_rate} is too high, or the weights of a "
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
        for name, health in self.health.items():
            row |= {f"router/{name}/{measure}": value for measure, value in dataclasses.asdict(health).items()}
        self.log_row(row)
        self.log_dict({"loss": loss, "tokens/s": self.tokens_per_second}, prog_bar=True, logger=False)
        self._nats = torch.zeros_like(self._nats)
        self._micro_batches = 0
        return True

    def log_row(self, row: dict[str, float]) -> None:
        """Write one row to every logger, with what it is plotted against."""
        step = self.trainer.global_step
        tokens = self._tokens(step)
        axes = {"tokens": tokens, "seconds": self.seconds, "active_flops": tokens * self.training_flops_per_token}
        for logger in self.loggers:
            logger.log_metrics({**axes, **row}, step=step)

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self.score = LanguageModelScore(self.token_bytes)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.score.update(self.decoder(batch["tokens"]), batch["labels"], batch.get("valid"))

    def on_validation_epoch_end(self) -> None:
        metrics = {"validation/loss": self.score.loss}
        if self.score.bits_per_byte is not None:
            metrics["validation/bits_per_byte"] = self.score.bits_per_byte
        self.log_dict(metrics, prog_bar=False, logger=False, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.log_row(metrics)

    # ---- optimiser and state

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.decoder, self.config.optimizer)
        factor = learning_rate_factor(self.config.schedule, self.config.training.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["moesaic"] = {
            "seconds": self.seconds,
            "nats": self._nats,
            "micro_batches": self._micro_batches,
            "logged_load": self.logged_load,
            "torch_rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["moesaic"]
        self.seconds = state["seconds"]
        self._nats, self._micro_batches = state["nats"], state["micro_batches"]
        self.logged_load = state["logged_load"]
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
