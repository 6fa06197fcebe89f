"""The LightningModule: losses, balancing, optimizer, and everything a resumed run needs."""

import dataclasses
import math
import random
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from moesaic.config import from_mapping, to_mapping
from moesaic.data import with_step_counts
from moesaic.distillation import TargetSource
from moesaic.distillation.config import teacher_mapping
from moesaic.errors import InputError
from moesaic.evaluation.drift import RunningDrift, Watched
from moesaic.evaluation.language_modeling import LanguageModelScore
from moesaic.evaluation.routing import RoutingSums, routing_sums
from moesaic.layers import MovingRouter, Routing, count_tokens
from moesaic.layers.routers.moving import observed_by
from moesaic.losses import (
    SoftWeight,
    linear_cross_entropy,
    load_balance_loss,
    router_z_loss,
    update_expert_bias,
)
from moesaic.models import Account, Decoder, DecoderConfig, account, build_decoder
from moesaic.models.custom import custom_modules, source_hashes
from moesaic.parallel.clipping import clip_gradients
from moesaic.parallel.shards import differing_buffers, whole
from moesaic.training.codistillation import Codistillation
from moesaic.training.config import RunConfig, TrainingConfig
from moesaic.training.forensics import describe_break
from moesaic.training.optimizers import apply_settings, build_optimizer, learning_rate_factor, settings_of
from moesaic.training.progress import Progress, move_positions
from moesaic.training.spent import widths_of
from moesaic.training.step_log import StepLog
from moesaic.training.stored_state import optimizer_steps
from moesaic.training.strategies import ShardedStrategy
from moesaic.training.utilization import peak_of_device

__all__ = ["Diverged", "LanguageModel"]

Batch = dict[str, Tensor]


class StepCounts(NamedTuple):
    """What a whole optimizer step holds, all its micro-batches on all ranks: every mean of a loss is over these.

    A micro-batch of a rank gives its sum over them. Lightning divides by the micro-batches, so it is multiplied by
    `share`.
    """

    labels: Tensor
    """Labels that are not ignored, () int64."""
    tokens: Tensor
    """Valid tokens, () int64."""
    share: int
    """Micro-batches of the step."""


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; raised before the weights are touched."""


class LanguageModel(pl.LightningModule):
    """Next-token training of a decoder, with `distillation` in its config towards soft targets as well.

    A teacher that trains along is `teacher`, a second decoder with losses, balancing, clipping and parameter groups of
    its own: it ends bit-equal to a run of its own with this seed. The source of other targets is no submodule, so that
    no checkpoint and no optimizer holds a frozen teacher.

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
        recompute, seq_len = self.config.trainer.checkpoint_activations, self.config.training.seq_len
        self.teacher = _build_teacher(self.config, model)
        """The teacher that trains along."""
        self.decoder: Decoder = build_decoder(model_config, checkpoint_activations=recompute)
        self.sources = source_hashes(model_config)
        """Hashes of the code that trains: a file may change while it does."""
        distillation = self.config.distillation
        self.soft_weight = None if distillation is None else SoftWeight(distillation.weight_policy)
        self.codistillation: Codistillation | None = None
        if distillation is not None and self.soft_weight is not None:
            self.codistillation = Codistillation(distillation, self.soft_weight, self.teacher, targets, seq_len)
        if self.config.trainer.compile:
            _compile_blocks(self.decoder, self.teacher)
        self.training_flops_per_token = account(model_config, seq_len).training_flops
        self.token_bytes = None if token_bytes is None else torch.tensor(token_bytes)
        self.score, self.teacher_score = LanguageModelScore(self.token_bytes), LanguageModelScore(self.token_bytes)
        self.drift = RunningDrift()
        self.log_book = StepLog()
        self.progress = Progress(0, self.training_flops_per_token)
        """Tokens and FLOPs so far; `setup` fills in the ranks."""
        self._continues = False
        self._is_spread = False
        self.step_load: dict[str, Tensor] = {}
        """Valid tokens per expert and MoE layer since the last optimizer step."""
        self.logged_load: dict[str, Tensor] = {}
        """The same since the last logged step, for the routing monitor."""
        self.step_routing: dict[str, RoutingSums] = {}
        """What the routers did in all micro-batches of a logged step."""
        self.teacher_step_load: dict[str, Tensor] = {}
        """`step_load` of a teacher that trains along."""
        self.step_observed: dict[str, Tensor] = {}
        """What routers with a state of their own saw since the last optimizer step."""
        self.teacher_step_observed: dict[str, Tensor] = {}
        self._step_counts: StepCounts | None = None

    # ---- training

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        valid = batch["valid"].flatten() if "valid" in batch else None
        if self._step_counts is None:  # a step begins
            self.step_routing, self.log_book.auxiliary = {}, {}
        counts = self._step_counts = self._step_counts or self._count_step(batch)
        hidden, routing = self.hidden_states(batch)
        if self.codistillation is None:
            loss = self.label_loss(hidden, batch, counts) * counts.share
            self._last_loss = loss.detach()
        else:
            loss = self._codistillation_loss(self.codistillation, hidden, batch, valid, counts)
            self._last_loss = self.codistillation.hard
        self._tokens_in = batch["tokens"]
        self.log_book.add(self._last_loss)
        for name, load in _count(routing, valid).items():
            self.step_load[name] = load + self.step_load.get(name, 0)
            self.logged_load[name] = load + self.logged_load.get(name, 0)
        _observe(self.decoder, routing, valid, self.step_observed)
        if self._is_logged(self.trainer.global_step + 1):
            for name, decided in routing.items():
                self.step_routing[name] = routing_sums(decided, valid).plus(self.step_routing.get(name))
        loss = loss + self._balance_loss("train", self.decoder, routing, valid, self.step_load, counts)
        # gradients are sums over ranks; where a strategy averages them, this makes sums of its means
        return loss if self._averaged_ranks == 1 else loss * self._averaged_ranks

    def hidden_states(self, batch: Batch) -> tuple[Tensor, dict[str, Routing]]:
        """What the head sees of a batch, (B, L, D), and the routing by layer."""
        return self.decoder.hidden_states(batch["tokens"])

    def label_loss(self, hidden: Tensor, batch: Batch, counts: StepCounts) -> Tensor:
        """This batch's part of the mean over the labels of the step."""
        labels = batch["labels"].flatten()
        return linear_cross_entropy(hidden.flatten(0, 1), self.decoder.head.weight, labels, num_valid=counts.labels)

    def load_balance_term(
        self, decided: Routing, valid: Tensor | None, load: Tensor | None, counts: StepCounts
    ) -> Tensor:
        """The load-balance loss of a layer, this batch's part of the mean over the tokens of the step."""
        return load_balance_loss(decided.logits, decided.expert_ids, valid, load, num_valid=counts.tokens)

    @property
    def beside(self) -> str | None:
        """What trains beside the decoder and what it costs, in words; None if nothing does."""
        return None

    @property
    def trained(self) -> torch.nn.Module:
        """What the optimizer steps and clipping sees as one; a teacher that trains along has its own."""
        return self.decoder

    @property
    def _averaged_ranks(self) -> int:
        """Ranks by which the strategy divides gradients."""
        return 1 if isinstance(self.trainer.strategy, ShardedStrategy) else self.trainer.world_size

    def _count_step(self, batch: Batch) -> StepCounts:
        """The counts of the optimizer step that `batch` begins.

        Raises:
            ValueError: several micro-batches make a step, and they do not come `with_step_counts`.
        """
        accumulate = self.trainer.accumulate_grad_batches
        if "step_labels" not in batch:
            if accumulate > 1:
                raise ValueError(
                    f"training.accumulate={accumulate}: a batch has no `step_labels`; batches must come as "
                    "moesaic.data.with_step_counts gives them"
                )
            [batch] = with_step_counts([batch])
        counts = torch.stack((batch["step_labels"], batch["step_tokens"]))
        labels, tokens = self._over_ranks(counts.to(batch["tokens"].device))
        return StepCounts(labels, tokens, accumulate)

    def _codistillation_loss(
        self,
        codistillation: Codistillation,
        hidden: Tensor,
        batch: Batch,
        valid: Tensor | None,
        counts: StepCounts,
    ) -> Tensor:
        """The student's loss, and to it that of a teacher that trains along, its balance included."""
        progress = min(1.0, self.trainer.global_step / self.config.training.steps)
        loss, routing = codistillation.loss(
            hidden, whole(self.decoder.head.weight), batch, progress, counts.labels, counts.share
        )
        if self.teacher is None:
            return loss
        for name, load in _count(routing, valid).items():
            self.teacher_step_load[name] = load + self.teacher_step_load.get(name, 0)
        _observe(self.teacher, routing, valid, self.teacher_step_observed)
        return loss + self._balance_loss("teacher", self.teacher, routing, valid, self.teacher_step_load, counts)

    def _balance_loss(
        self,
        network: str,
        decoder: Decoder,
        routing: dict[str, Routing],
        valid: Tensor | None,
        step_load: dict[str, Tensor],
        counts: StepCounts,
    ) -> Tensor | float:
        """The weighted auxiliary losses, each the mean over MoE layers; logged unweighted below the network's name.

        A router that has a loss of its own weights it itself.
        """
        balance = self.config.balance
        total: Tensor | float = 0.0
        if balance.load_balance_loss_weight and routing:
            over_global_batch = balance.load_balance_scope == "global_batch"
            terms = []
            for name, decided in routing.items():
                load = None
                if over_global_batch:
                    load = self._over_ranks(step_load[name])
                elif self.trainer.world_size > 1:  # a micro-batch is that of all ranks
                    load = self._over_ranks(count_tokens(decided.expert_ids, decided.logits.size(1), valid))
                terms.append(self.load_balance_term(decided, valid, load, counts))
            term = torch.stack(terms).mean() * counts.share
            self._note(f"{network}/load_balance_loss", term.detach(), counts)
            total = total + balance.load_balance_loss_weight * term
        if balance.router_z_loss_weight and routing:
            terms = [router_z_loss(decided.logits, valid, num_valid=counts.tokens) for decided in routing.values()]
            term = torch.stack(terms).mean() * counts.share
            self._note(f"{network}/router_z_loss", term.detach(), counts)
            total = total + balance.router_z_loss_weight * term
        own = [
            loss(decided, valid, counts.tokens)
            for name, decided in routing.items()
            if (loss := getattr(_router_of(decoder, name), "auxiliary_loss", None)) is not None
        ]
        if own:
            term = torch.stack(own).sum() / len(routing) * counts.share
            self._note(f"{network}/router_loss", term.detach(), counts)
            total = total + term
        return total

    def _note(self, name: str, term: Tensor, counts: StepCounts) -> None:
        """Log the mean over the micro-batches of a step."""
        noted, part = self.log_book.auxiliary, term / counts.share
        noted[name] = noted[name] + part if name in noted else part

    def on_train_start(self) -> None:
        self._began_at = self.trainer.global_step
        self._peak_flops = peak_of_device(self.device, self.config.trainer.precision)
        if self._continues:
            scheduler = self.trainer.lr_scheduler_configs[0].scheduler
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)  # see `configure_optimizers`
            apply_settings(self.trainer.optimizers[0], scheduler, self._settings)
        self.log_book.start(self.progress.tokens(self.trainer.global_step))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Between backward and step: what moves by the counts and losses of this whole step."""
        for weight in self.parameters():
            if weight.requires_grad and weight.grad is None:  # no row needed it, on any rank: like a starved expert
                weight.grad = torch.zeros_like(weight)
        self._step_counts = None
        self._move_biases(self.decoder, self.step_load, self.step_observed)
        self.step_load, self.step_observed = {}, {}
        if self.teacher is not None:
            self._move_biases(self.teacher, self.teacher_step_load, self.teacher_step_observed)
            self.teacher_step_load, self.teacher_step_observed = {}, {}
        if self.codistillation is not None:
            self.codistillation.end_step(self._over_ranks(self.codistillation.step_losses))

    def _move_biases(self, decoder: Decoder, step_load: dict[str, Tensor], observed: dict[str, Tensor]) -> None:
        for name, seen in observed.items():
            cast(MovingRouter, _router_of(decoder, name)).end_step(self._over_ranks(seen))
        if rate := self.config.balance.expert_bias_update_rate:
            for name, counts in step_load.items():
                expert_bias = getattr(_router_of(decoder, name), "expert_bias", None)
                if isinstance(expert_bias, Tensor):
                    update_expert_bias(expert_bias, self._over_ranks(counts), rate)

    def configure_model(self) -> None:
        """Give the weights the dtype of the run, and spread them over the ranks of a sharded one, once.

        Lightning would convert them after it has restored a checkpoint, and so round fp64 weights to fp32 first.
        """
        strategy = self.trainer.strategy
        strategy.precision_plugin.convert_module(self)
        if self._is_spread or not isinstance(strategy, ShardedStrategy):
            return
        self._is_spread = True
        for decoder in (self.teacher, self.decoder):
            if decoder is not None:
                strategy.parallelize(decoder)

    def make_whole(self) -> None:
        """Put the student together again on rank 0, where a sharded run has spread it. Every rank must call it."""
        if not self._is_spread:
            return
        for name in ("teacher", "decoder"):
            if (spread := getattr(self, name)) is None:
                continue
            weights = ShardedStrategy.gather(spread.state_dict())
            if weights:
                with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
                    decoder = build_decoder(spread.config, device=spread.device, dtype=spread.dtype)
                decoder.load_state_dict(weights)
                setattr(self, name, decoder)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by its own total norm, and stop if one is not finite: the weights are still good."""
        limit = self.config.training.gradient_clip or math.inf
        # the teacher first: if it is broken, so are the student's gradients
        for name, network in (("teacher", self.teacher), ("train", self.trained)):
            if network is None:
                continue
            norm = clip_gradients(network.parameters(), limit)
            if not math.isfinite(norm):
                decoder = self.teacher if network is self.teacher else self.decoder
                raise Diverged(self._describe_divergence(decoder))
            self.log_book.auxiliary[f"{name}/grad_norm"] = norm

    def _describe_divergence(self, decoder: Decoder) -> str:
        """What broke, and the likely cause."""
        place, codistillation = describe_break(decoder, self._tokens_in), self.codistillation
        loss, whose = self._over_ranks(self._last_loss), "the loss"
        key, rate = "optimizer.learning_rate", self.config.optimizer.learning_rate
        if codistillation is not None and decoder is self.teacher:
            loss, whose = self._over_ranks(codistillation.teacher_loss), "the loss of the teacher that trains along"
            rate = codistillation.teacher_optimizer(self.config.optimizer).learning_rate
            key = "distillation.teacher_learning_rate"
        elif codistillation is not None and not codistillation.teacher_loss.isfinite():
            place = f"the loss of the teacher is {float(codistillation.teacher_loss):.4g}"
        if self.trainer.global_step == self._began_at:  # no rate has moved anything yet
            cause = "the model itself: its weights, its config or a custom module; no step was made"
        else:
            cause = f"{key}={rate} is too high"
        return (
            f"step {self.trainer.global_step}: {whose} is {float(loss):.4g}; {place}. Likely cause: {cause}. Training "
            "stops before this step, which no checkpoint holds."
        )

    # ---- rows

    def log_step(self) -> bool:
        """Write this step's row if it is a logged step; called by `RunMonitor` before any checkpoint is taken."""
        step, book = self.trainer.global_step, self.log_book
        if book.micro_batches < self.config.training.accumulate or not self._is_logged(step):
            return False
        if self.trainer.world_size > 1:
            self._add_up_ranks()
        distillation = {} if self.codistillation is None else self.codistillation.row(book.micro_batches)
        row = book.row(self.progress.tokens(step), self.trainer.optimizers[0].param_groups[0]["lr"], distillation)
        row |= self._utilization(book.tokens_per_second) | self._router_row()
        self.log_row(row)
        self.log_dict({"loss": row["train/loss"], "tokens/s": book.tokens_per_second}, prog_bar=True, logger=False)
        return True

    def _add_up_ranks(self) -> None:
        """Make those of all ranks of the sums since the last row.

        Raises:
            InputError: a custom module keeps something that each rank has seen otherwise.
        """
        config = self.decoder.config
        if (config is None or custom_modules(config)) and (names := differing_buffers(self.decoder)):
            place, _, name = names[0].rpartition(".")
            kind = type(self.decoder.get_submodule(place)).__name__
            raise InputError(
                f"{kind}: its buffer {names[0]} follows the tokens of a rank, so each process has another; {name} must "
                "be the same on all of them, or trainer.devices must be 1"
            )
        book = self.log_book
        book.nats = self._over_ranks(book.nats)
        book.auxiliary = {
            name: value if name.endswith("/grad_norm") else self._over_ranks(value)
            for name, value in book.auxiliary.items()
        }
        self.logged_load = {name: self._over_ranks(load) for name, load in self.logged_load.items()}
        if self.codistillation is not None:
            self.codistillation.statistics = self._over_ranks(self.codistillation.statistics)

    def _utilization(self, tokens_per_second: float) -> dict[str, float]:
        """MFU, the student's active FLOPs per second over the dense peak of all GPUs, where that is known."""
        if self._peak_flops is None:
            return {}
        return {"mfu": tokens_per_second * self.training_flops_per_token / (self._peak_flops * self.trainer.world_size)}

    def _router_row(self) -> dict[str, float]:
        """Router health of the step, of all its micro-batches on all ranks."""
        row: dict[str, float] = {}
        shares: dict[str, float] = {}
        for name, sums in self.step_routing.items():
            sums = RoutingSums(*(self._over_ranks(each) for each in sums))
            row |= {f"router/{name}/{measure}": value for measure, value in dataclasses.asdict(sums.health()).items()}
            if getattr(_router_of(self.decoder, name), "may_skip", True):
                shares[f"router/{name}/no_expert_share"] = sums.no_expert_share()
                shares[f"router/{name}/experts_per_token"] = sums.experts_per_token()
            if (widths := widths_of(self.decoder, name)) is not None:
                shares[f"router/{name}/active_width"] = sums.active_width(widths)
        return row | shares

    def log_row(self, row: dict[str, float]) -> None:
        """Write one row to every logger, with what it is plotted against."""
        step = self.trainer.global_step
        progress, seconds = self.progress, self.log_book.seconds
        axes = {"tokens": progress.tokens(step), "seconds": seconds, "active_flops": self.active_flops}
        if self.codistillation is not None:
            axes["teacher_flops"] = self.teacher_flops
        for logger in self.loggers:
            logger.log_metrics({**axes, **row}, step=step)

    @property
    def active_flops(self) -> float:
        """What training cost so far, in FLOPs."""
        return self.progress.flops(self.trainer.global_step)

    @property
    def teacher_flops(self) -> float:
        """What the teacher's passes cost so far, in FLOPs."""
        tokens = self.progress.tokens(self.trainer.global_step)
        return 0.0 if self.codistillation is None else self.codistillation.teacher_flops(tokens)

    @property
    def teacher_account(self) -> Account | None:
        """Account of whoever computes targets in this run."""
        return None if self.codistillation is None else self.codistillation.teacher_account

    # ---- validation

    def on_validation_epoch_start(self) -> None:
        self.log_book.read_clock()  # a check is at its own second, not at that of the last logged step
        self.score = LanguageModelScore(self.token_bytes)
        self.teacher_score = LanguageModelScore(self.token_bytes)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.drift.update(self.score_batch(batch), batch, self._of_all_ranks)
        if self.teacher is not None:
            self.teacher_score.score_batch(self.teacher, batch)

    def score_batch(self, batch: Batch) -> dict[str, Routing]:
        """Add a batch to the score of this check; returns the routing by layer that drift watches."""
        return self.score.score_batch(self.decoder, batch)

    def validation_numbers(self) -> dict[str, float]:
        """What a check has found besides the loss."""
        return {}

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            for score in (self.score, self.teacher_score)[: 1 if self.teacher is None else 2]:
                score.add_up(self._over_ranks)
        metrics = {"validation/loss": self.score.loss}
        if self.score.bits_per_byte is not None:
            metrics["validation/bits_per_byte"] = self.score.bits_per_byte
        if self.teacher is not None:
            metrics["validation/teacher_loss"] = self.teacher_score.loss
        metrics |= self.validation_numbers() | self.drift.finish()
        self.log_dict(metrics, prog_bar=False, logger=False, sync_dist=True)
        if not self.trainer.sanity_checking:
            self.log_row(metrics)

    # ---- optimizer and state

    def configure_optimizers(self) -> Any:
        beside = None
        if self.teacher is not None and self.codistillation is not None:
            beside = (self.teacher, self.codistillation.teacher_optimizer(self.config.optimizer_at_scale()))
        optimizer = build_optimizer(self.trained, self.config.optimizer_at_scale(), beside)
        factor = learning_rate_factor(self.config.schedule, self.config.training.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._settings = settings_of(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state: dict[str, Any] = {
            "sources": self.sources,
            "logged_load": {name: self._over_ranks(load) for name, load in self.logged_load.items()},
            "drift": self.drift.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "python_rng": random.getstate(),
        }
        state["progress"] = dataclasses.asdict(self.progress)
        for optimizer in checkpoint.get("optimizer_states", []):
            state["optimizer_steps"] = optimizer_steps(optimizer)
        self.log_book.save(state)
        state["nats"] = self._over_ranks(state["nats"])
        if self.codistillation is not None:
            self.codistillation.save(state)
            state["distillation"] = self._over_ranks(state["distillation"])
        checkpoint["moesaic"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["moesaic"]
        self._continues = not self.config.resume
        self._go_on_from(checkpoint)
        self.log_book.load(state)
        self.logged_load = state["logged_load"]
        self.drift.load_state_dict(state.get("drift", {}))
        if self.codistillation is not None:
            self.codistillation.load(state, same_run=self.config.resume)
        if self.trainer.global_rank // self.config.parallel.tensor:  # sums of all ranks go on in the first
            self.log_book.nats = torch.zeros_like(self.log_book.nats)
            self.logged_load = {name: torch.zeros_like(load) for name, load in self.logged_load.items()}
            if self.codistillation is not None:
                self.codistillation.statistics = torch.zeros_like(self.codistillation.statistics)
        torch.set_rng_state(state["torch_rng"].cpu())
        version, internal, gauss = state["python_rng"]
        random.setstate((version, tuple(internal), gauss))

    def _is_logged(self, step: int) -> bool:
        training = self.config.training
        return step % training.log_every == 0 or step in (1, training.steps)

    def setup(self, stage: str) -> None:
        if self.progress.tokens_per_step == 0:
            self.progress = Progress(self.config.training.tokens_per_step, self.training_flops_per_token)

    def _go_on_from(self, checkpoint: dict[str, Any]) -> None:
        """Count on from where a checkpoint is, though it may have had batches of another size."""
        stored, step = checkpoint["hyper_parameters"], checkpoint["global_step"]
        before = to_mapping(from_mapping(TrainingConfig, stored["config"]["training"], "training"))
        if "progress" in checkpoint["moesaic"]:
            progress = Progress(**checkpoint["moesaic"]["progress"])
        else:  # of a version that ran one process and kept no sums
            tokens = before["batch_size"] * before["seq_len"] * before["accumulate"]
            model = from_mapping(DecoderConfig, stored["model"], "model")
            progress = Progress(tokens, account(model, before["seq_len"]).training_flops)
        move_positions(checkpoint, before, self.config.training)
        self.progress = progress.then(step, self.config.training.tokens_per_step, self.training_flops_per_token)

    def _of_all_ranks(self, watched: Watched) -> list[Watched]:
        """What ranks with other rows have, in their order."""
        if self.trainer.world_size == 1:
            return [watched]
        found: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(found, watched)
        return found[:: self.config.parallel.tensor]

    def over_ranks(self, loss: Tensor) -> float:
        """The loss of all ranks, of which `training_step` gave this one its part. Every rank must ask."""
        return float(self._over_ranks(loss.detach()) / self._averaged_ranks)

    def _over_ranks(self, counts: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return counts
        strategy = self.trainer.strategy
        # ranks that share matrices count the same rows
        group = strategy.rows_group if isinstance(strategy, ShardedStrategy) else None
        return strategy.reduce(counts.to(self.device, copy=True), group, reduce_op="sum")


def _build_teacher(config: RunConfig, model: dict[str, Any]) -> Decoder | None:
    """The teacher that trains along, if one does. It begins as in a run of its own, and so does the student."""
    distillation = config.distillation
    if distillation is None or distillation.source != "joint":
        return None
    teacher = from_mapping(DecoderConfig, teacher_mapping(model, distillation.teacher_model))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_decoder(teacher, checkpoint_activations=config.trainer.checkpoint_activations)


def _compile_blocks(*decoders: Decoder | None) -> None:
    from torch import _dynamo

    # blocks of another kind, and evaluation, are further variants of the same code
    _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
    for decoder in decoders:
        for block in () if decoder is None else decoder.layers:
            block.compile()


def _router_of(decoder: Decoder, name: str) -> torch.nn.Module | None:
    """The router of the MoE layer of this name, if it is a module of that name."""
    return getattr(decoder.get_submodule(name), "router", None)


def _observe(decoder: Decoder, routing: dict[str, Routing], valid: Tensor | None, sums: dict[str, Tensor]) -> None:
    """Add what each router with a state of its own sees in what it decided; in what was replayed it sees nothing."""
    for name, decided in routing.items():
        router = _router_of(decoder, name)
        if isinstance(router, MovingRouter) and not decided.replayed:
            sums[name] = observed_by(router, decided, valid) + sums.get(name, 0)


def _count(routing: dict[str, Routing], valid: Tensor | None) -> dict[str, Tensor]:
    """Valid tokens per expert (E,) of each MoE layer whose router chose them: a replayed choice balances nothing."""
    return {
        name: decided.tokens_per_expert
        if valid is None
        else count_tokens(decided.expert_ids, decided.logits.size(1), valid)
        for name, decided in routing.items()
        if not decided.replayed
    }
