"""One training on several processes beside one process, number by number: `Workers` run it in a second or so."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, distributed

from moesaic.config import to_mapping
from moesaic.data import with_step_counts
from moesaic.layers import AttentionTemperature
from moesaic.models import AttentionConfig, DecoderConfig, MoEConfig
from moesaic.parallel.clipping import total_norm
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.workers import Workers
from moesaic.training.config import BalanceConfig, OptimizerConfig, Precision, RunConfig, TrainerConfig, TrainingConfig
from moesaic.training.lightning_options import ignore_advice, quiet_lightning
from moesaic.training.module import LanguageModel
from moesaic.training.strategies import ShardedStrategy, strategy_options

__all__ = [
    "CASES",
    "COLUMNS",
    "LAYOUTS",
    "LEFT_OUT",
    "MODELS",
    "Compared",
    "Layout",
    "Trained",
    "Training",
    "compare_all",
    "deviations",
    "fit_on_standing",
    "place",
    "train_on",
]

Batch = dict[str, Tensor]

VOCABULARY, LENGTH, SEQUENCES = 40, 12, 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """So many ranks, and how the model is laid out over them."""

    ranks: int
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)


LAYOUTS: dict[str, Layout] = {
    "one process": Layout(1),
    "copies on 2": Layout(2, ParallelConfig(shard=False)),
    "shards on 2": Layout(2),
    "shards on 4": Layout(4),
    "experts on 2": Layout(2, ParallelConfig(expert=2)),
    "experts on 4": Layout(4, ParallelConfig(expert=4)),
    "experts on 2, each sharded on 2": Layout(4, ParallelConfig(expert=2)),
    "matrices on 2": Layout(2, ParallelConfig(tensor=2)),
    "matrices on 2, each sharded on 2": Layout(4, ParallelConfig(tensor=2)),
    "matrices on 2, experts on 2": Layout(4, ParallelConfig(tensor=2, expert=2)),
}

_ATTENTION = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    attention_chunk_size=8,
    temperature=AttentionTemperature(attn_scale=0.5, floor_scale=4),
)

_small = functools.partial(
    DecoderConfig, vocab_size=VOCABULARY, init_std=0.3, attention=_ATTENTION, nope_layer_interval=2
)

MODELS: dict[str, DecoderConfig] = {
    "Llama 4: top-1 sigmoid, shared expert": _small(
        dim=8,
        hidden_dim=16,
        num_layers=2,
        moe=MoEConfig(num_experts=4, hidden_dim=12, expert_bias=True),
        interleave_moe_layer_step=1,
    ),
    "top-2 softmax, first layer dense, tied": _small(
        dim=8,
        hidden_dim=16,
        num_layers=2,
        moe=MoEConfig(
            num_experts=4,
            hidden_dim=12,
            top_k=2,
            score_function="softmax",
            normalize_scores=True,
            score_before_experts=False,
            expert_bias=True,
        ),
        interleave_moe_layer_step=2,
        tie_embeddings=True,
    ),
    "few experts, odd width, convolutions": _small(
        attention=dataclasses.replace(_ATTENTION, conv_width=3, bias=True),
        dim=6,
        hidden_dim=10,
        num_layers=2,
        moe=MoEConfig(
            num_experts=2,
            hidden_dim=12,
            expert_bias=True,
            router={"type": "mlp", "router_dim": 5, "depth_average": True},
        ),
        interleave_moe_layer_step=1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained: the same on any layout.

    Args:
        model: a name in `MODELS`.
        uneven: whether sequences have ends that do not count, other ones on every rank.
        starved: whether the second half of the experts gets no token.
    """

    model: str
    optimizer: OptimizerConfig
    precision: Precision = "64-true"
    steps: int = 3
    accumulate: int = 1
    uneven: bool = False
    starved: bool = False
    checkpoint_activations: bool = False

    def config(self, parallel: ParallelConfig) -> RunConfig:
        return RunConfig(
            model={**to_mapping(MODELS[self.model])},
            training=TrainingConfig(
                steps=self.steps,
                batch_size=SEQUENCES,
                seq_len=LENGTH,
                accumulate=self.accumulate,
                log_every=1,
                gradient_clip=0.5,
            ),
            optimizer=self.optimizer,
            balance=BalanceConfig(
                load_balance_loss_weight=0.1, router_z_loss_weight=0.01, expert_bias_update_rate=0.01
            ),
            trainer=TrainerConfig(precision=self.precision, checkpoint_activations=self.checkpoint_activations),
            parallel=parallel,
        )

    def batch(self, i: int) -> Batch:
        """Micro-batch i of all ranks."""
        draw = torch.Generator().manual_seed(i)
        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=draw)
        labels, valid = tokens[:, 1:].clone(), torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
        if self.uneven:
            for row, length in enumerate((2 + i % 3, 5, LENGTH, LENGTH - 3)):
                valid[row, length:] = False
            labels[~valid] = -100
        return {"tokens": tokens[:, :-1].contiguous(), "labels": labels, "valid": valid}


_LLAMA, _SOFTMAX, _ODD = MODELS
_ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-2, eps=1e-3)
_MUON = OptimizerConfig(name="muon", learning_rate=1e-2, muon_learning_rate=1e-2, eps=1e-3)

CASES: dict[str, Training] = {
    "AdamW": Training(_LLAMA, _ADAMW),
    "Muon": Training(_SOFTMAX, _MUON),
    "accumulated, uneven": Training(_LLAMA, _MUON, accumulate=2, uneven=True),
    "uneven": Training(_SOFTMAX, _ADAMW, uneven=True),
    "starved, recomputed": Training(_LLAMA, _ADAMW, starved=True, checkpoint_activations=True),
    "odd sizes": Training(_ODD, _MUON),
}

LEFT_OUT = {("experts on 4", "odd sizes"): "it has 2 experts"}
"""Pairs of layout and case that are not compared, and why."""

IN_FP32 = ("Muon", "uneven")
"""Cases that are compared in fp32 as well."""

TOLERANCES: dict[Precision, float] = {"64-true": 1e-10, "32-true": 1e-5}

COLUMNS = {
    "loss": ("train/loss",),
    "balance": ("train/load_balance_loss", "train/router_z_loss"),
    "experts": ("norm/experts",),
    "attention": ("norm/mixer",),
    "router": ("norm/router",),
    "clipped": ("train/grad_norm", "norm/clipped"),
    "bias": ("expert bias",),
    "weights": ("weights",),
}
"""Columns of a table, and the numbers of which each has the largest deviation."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A training on one layout beside one process."""

    layout: str
    case: str
    precision: Precision
    deviations: dict[str, float]

    @property
    def exceeding(self) -> dict[str, float]:
        """Deviations beyond what rounding explains; entropies and margins of routers are sums in fp32 in any run."""
        within = TOLERANCES[self.precision]
        return {
            name: each
            for name, each in self.deviations.items()
            if not each <= max(within, 1e-6 * name.startswith("router/"))
        }


def compare_all(workers: Workers) -> Iterator[Compared]:
    """Every case on every layout in fp64, and some in fp32, one after the other."""
    one = LAYOUTS["one process"]
    of_precision: dict[Precision, tuple[str, ...]] = {"64-true": tuple(CASES), "32-true": IN_FP32}
    for precision, cases in of_precision.items():
        for case in cases:
            training = dataclasses.replace(CASES[case], precision=precision)
            alone = train_on(workers, training, one)
            for name, layout in LAYOUTS.items():
                if layout != one and (name, case) not in LEFT_OUT:
                    found = train_on(workers, training, layout)
                    yield Compared(name, case, precision, deviations(found, alone))


@dataclasses.dataclass(frozen=True)
class Trained:
    """What came of a training: numbers of each step by name, and whole weights and buffers at the end."""

    steps: list[dict[str, float]]
    weights: dict[str, Tensor]


def train_on(workers: Workers, training: Training, layout: Layout) -> Trained:
    """Train on as many processes as the layout has."""
    first: Trained = workers.run(_train, layout.ranks, training, layout.parallel)[0]
    return first


def deviations(found: Trained, wanted: Trained) -> dict[str, float]:
    """The largest difference of each number over the steps, relative where it is above 1, and of all weights."""
    differences = {
        name: max(
            _number(abs(here[name] - there[name]) / max(1.0, abs(there[name])))
            for here, there in zip(found.steps, wanted.steps, strict=True)
        )
        for name in wanted.steps[0]
    }
    for name, weight in wanted.weights.items():
        what = "expert bias" if name.endswith("expert_bias") else "weights"
        difference = _number(float((found.weights[name] - weight).abs().max()))
        differences[what] = max(differences.get(what, 0.0), difference)
    return differences


def _number(difference: float) -> float:
    """Infinite, where it is no number: `max` would drop that."""
    return math.inf if math.isnan(difference) else difference


class _Watched(LanguageModel):
    """Keeps the norms of gradients, before and after they are clipped."""

    def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None:
        gradients = {name: each.grad for name, each in self.decoder.named_parameters() if each.grad is not None}
        for kind in ("experts", "mixer", "router"):
            self.norms[f"norm/{kind}"] = float(total_norm(g for name, g in gradients.items() if f".{kind}." in name))
        super().configure_gradient_clipping(*arguments, **named)
        self.norms["norm/clipped"] = float(total_norm(gradients.values()))

    norms: dict[str, float]


class _Log(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, LanguageModel)
        module.log_step()


class _Rows(DummyLogger):
    """Keeps what is logged, without what a clock says."""

    def __init__(self, norms: dict[str, float]) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self._norms = norms

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({name: value for name, value in metrics.items() if "second" not in name} | self._norms)


class _Standing(LightningEnvironment):
    """Processes that have met already."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return distributed.get_world_size()

    def global_rank(self) -> int:
        return distributed.get_rank()

    def local_rank(self) -> int:
        return distributed.get_rank()

    def node_rank(self) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class _Batches:
    """The share of one rank among those with other rows."""

    training: Training
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[Batch]:
        size = SEQUENCES // self.ranks
        mine = slice(self.rank * size, (self.rank + 1) * size)
        for step in range(self.training.steps):
            numbers = range(step * self.training.accumulate, (step + 1) * self.training.accumulate)
            yield from with_step_counts(
                [{name: each[mine] for name, each in self.training.batch(i).items()} for i in numbers]
            )


def _train(training: Training, parallel: ParallelConfig) -> Trained:
    rank, ranks = place()
    torch.manual_seed(0)
    config = training.config(parallel)
    module = _Watched(to_mapping(config), to_mapping(MODELS[training.model]))
    module.norms = {}
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if training.starved and name.endswith("expert_bias"):
                buffer[buffer.numel() // 2 :] = -10.0
    rows = _Rows(module.norms)
    batches = _Batches(training, rank // parallel.tensor, ranks // parallel.tensor)
    fit_on_standing(module, batches, training.steps, training.precision, rows, accumulate=training.accumulate)
    weights = ShardedStrategy.gather(module.decoder.state_dict())
    return Trained(rows.rows, weights)


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def fit_on_standing(
    module: LanguageModel, batches: Iterable[Batch], steps: int, precision: Precision, logger: Any, accumulate: int = 1
) -> None:
    """Train on the processes that stand by here, without checkpoints and validation; every step is logged."""
    _, ranks = place()
    parallel = module.config.parallel
    quiet_lightning()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=logger,
        callbacks=[_Log()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **_with(strategy_options("auto", parallel, precision, ranks), _Standing() if ranks > 1 else None),
    )
    with warnings.catch_warnings():
        ignore_advice()
        warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
        trainer.fit(module, batches)


def _with(options: dict[str, Any], environment: LightningEnvironment | None) -> dict[str, Any]:
    return {**options, "plugins": [*options.get("plugins", []), *([environment] if environment else [])]}
