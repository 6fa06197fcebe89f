"""The configuration of a whole run: what conf/train.yaml composes, as strict frozen dataclasses."""

import dataclasses
import re
from typing import Any, Literal

from moesaic.config import LARGEST_SEED, from_mapping, require, to_mapping
from moesaic.data import DataConfig
from moesaic.data.images import PICTURES
from moesaic.data.tasks import TASKS
from moesaic.distillation.config import DistillationConfig
from moesaic.evaluation.long_context import LossByPositionConfig
from moesaic.evaluation.sampling import SampleConfig
from moesaic.layers import Fp8Recipe
from moesaic.models import DecoderConfig
from moesaic.models.presets import small
from moesaic.models.resizing import resized
from moesaic.parallel.config import ParallelConfig
from moesaic.training.fusion_config import FusionConfig
from moesaic.training.lightning_options import DOUBLES, TENSORBOARD, option_names
from moesaic.training.transfer import TransferConfig, settings_at

__all__ = [
    "BalanceConfig",
    "OptimizerConfig",
    "Precision",
    "RunConfig",
    "ScheduleConfig",
    "TrainerConfig",
    "TrainingConfig",
]


Precision = Literal["auto", "32-true", "bf16-mixed", "bf16-true", "64-true", "fp8"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "muon"
    learning_rate: float = dataclasses.field(default=1.6e-2, metadata={"most": 1000.0})
    muon_learning_rate: float = dataclasses.field(default=4e-3, metadata={"most": 1000.0})  # on AdamW's scale
    weight_decay: float = dataclasses.field(default=0.1, metadata={"most": 1000.0})
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = dataclasses.field(default=1e-8, metadata={"most": 1.0})

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            require(self, name, getattr(self, name) > 0, "a number > 0")
        require(self, "weight_decay", self.weight_decay >= 0, "a number >= 0")
        for name in ("beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "0 <= value < 1")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then constant, cosine, or stable and linear decay (wsd)."""

    name: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.4
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        require(self, "warmup_steps", self.warmup_steps >= 0, "a number >= 0")
        require(self, "decay_fraction", 0 < self.decay_fraction <= 1, "0 < value <= 1")
        require(self, "final_factor", 0 <= self.final_factor <= 1, "0 <= value <= 1")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps experts in use; a weight or rate of 0 switches a term off. Losses are means over the MoE layers.

    With load_balance_scope=global_batch the loss takes its counts from all ranks and from the micro-batches of the step
    so far, as Qiu et al. 2025 (arXiv 2501.11873) do. Only the last micro-batch sees the counts of the whole step. With
    training.accumulate > 1 the gradient therefore differs from that of one batch of the same sequences; with 1 it is
    exact. Exact counts would cost a forward pass over the whole step before its first backward pass.
    """

    load_balance_loss_weight: float = dataclasses.field(default=0.01, metadata={"most": 1e6})
    load_balance_scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    router_z_loss_weight: float = dataclasses.field(default=0.0, metadata={"most": 1e6})
    # needs model.moe.expert_bias=true
    expert_bias_update_rate: float = dataclasses.field(default=0.0, metadata={"most": 100.0})

    def __post_init__(self) -> None:
        for name in ("load_balance_loss_weight", "router_z_loss_weight", "expert_bias_update_rate"):
            require(self, name, getattr(self, name) >= 0, "a number >= 0")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How much is trained on what. One optimizer step sees batch_size * seq_len * accumulate tokens, of all processes.

    So one configuration is one training, whatever the number of processes that share its batches.
    """

    steps: int = dataclasses.field(default=1200, metadata={"most": 10**9})
    batch_size: int = dataclasses.field(default=8, metadata={"most": 2**20})
    seq_len: int = dataclasses.field(default=256, metadata={"most": 2**24})
    accumulate: int = dataclasses.field(default=1, metadata={"most": 2**20})
    fixed_windows: bool = False  # the same windows in every epoch, as runs from cached targets have them
    gradient_clip: float = 1.0  # norm; 0 switches it off
    validate_every: int = 200  # optimizer steps
    # of each check during the run, spread over the split; null: all
    validation_batches: int | None = dataclasses.field(default=16, metadata={"most": 2**20})
    # beyond the training length, which iRoPE is for; null: seq_len
    validation_seq_len: int | None = dataclasses.field(default=1024, metadata={"most": 2**24})
    # of the final score, drawn with a fixed seed, the same for every run; null: the whole validation split
    score_windows: int | None = dataclasses.field(default=None, metadata={"most": 10**9})
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "validate_every", "log_every", "checkpoint_every"):
            require(self, name, getattr(self, name) >= 1, "a number >= 1")
        for name in ("validation_batches", "validation_seq_len", "score_windows"):
            require(self, name, (getattr(self, name) or 1) >= 1 and getattr(self, name) != 0, "numbers >= 1, or null")
        require(self, "gradient_clip", self.gradient_clip >= 0, "a number >= 0 (0: off)")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step sees, of all processes."""
        return self.batch_size * self.seq_len * self.accumulate


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Where and in what precision; what else Lightning's Trainer takes is passed on as it is."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "cpu"
    precision: Precision = "auto"  # auto: what is faster here
    fp8: Fp8Recipe = dataclasses.field(default_factory=Fp8Recipe)  # what precision=fp8 rounds
    compile: bool = False  # torch.compile of every block
    checkpoint_activations: bool = False
    # CPU threads of each process; null: torch's choice, and of several processes the cores shared among them
    threads: int | None = dataclasses.field(default=None, metadata={"most": 2**10})
    keep_freed_memory: bool = True  # glibc on a CPU: do not return memory to the system, which is slow to get again
    # of each node: a number, auto, or a list of indices
    devices: int | str | tuple[int, ...] = dataclasses.field(default=1, metadata={"most": 2**10})
    num_nodes: int = dataclasses.field(default=1, metadata={"most": 2**16})
    strategy: str = "auto"  # what `parallel` says, or a name of Lightning's
    max_time: str | None = None  # DD:HH:MM:SS of training per process; resume=true continues
    lightning: dict[str, Any] = dataclasses.field(default_factory=dict, metadata={"other_keys": option_names})

    def __post_init__(self) -> None:
        for name, ours in DOUBLES.items():
            if name in self.lightning:
                raise ValueError(f"{name}={self.lightning[name]!r}: it must be set as {ours}")
        require(
            self,
            "max_time",
            self.max_time is None or re.fullmatch(r"\d+:\d\d:\d\d:\d\d", self.max_time) is not None,
            "DD:HH:MM:SS, or null",
        )
        if self.precision != "fp8" and self.fp8 != Fp8Recipe():
            raise ValueError(f"precision={self.precision!r}: must be fp8, as only that reads the keys below fp8")
        require(self, "threads", self.threads is None or self.threads >= 1, "a number >= 1, or null")


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
    """A dense checkpoint whose weights a mixture of experts begins with, see `moesaic.models.upcycle`."""

    checkpoint: str | None = dataclasses.field(default=None, metadata={"key": "from"})
    noise: float = 0.0  # on each copy, in units of the std of its weights

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise ValueError("from=None: must be a checkpoint (upcycle.from=RUN/checkpoints/last.ckpt)")
        require(self, "noise", self.noise >= 0, "a number >= 0")


def default_model() -> dict[str, Any]:
    """The keys of conf/model/small.yaml, with the vocabulary left to the data."""
    model = {**to_mapping(small(vocab_size=1)), "vocab_size": None}
    del model["format"]  # as in the file: only stored configs say it
    return model


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything about one run. `model` stays a mapping until the data has said how large the vocabulary is."""

    name: str = "default"
    model: dict[str, Any] = dataclasses.field(default_factory=default_model)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    distillation: DistillationConfig | None = None  # null: labels only
    fusion: FusionConfig | None = None  # null: text only
    finish: Literal["all", "score"] = "all"  # score: numbers alone, without pictures, sample and TensorBoard
    seed: int = dataclasses.field(default=0, metadata={"most": LARGEST_SEED})
    output_dir: str = "outputs"
    run_dir: str | None = None  # null: a new directory under output_dir
    resume: bool = False  # continue run_dir, or the newest unfinished run of this name
    ckpt_path: str | None = None  # continue from this checkpoint, in a new run directory
    extend_context: LossByPositionConfig | None = None  # start from ckpt_path's weights alone, at a longer length
    upcycle: UpcycleConfig | None = None  # start from a dense checkpoint's weights, made into experts
    callbacks: dict[str, Any] = dataclasses.field(default_factory=dict)  # {name: {_target_: class, argument: value}}
    logger: dict[str, Any] = dataclasses.field(default_factory=lambda: {"tensorboard": {**TENSORBOARD}})

    def __post_init__(self) -> None:
        if self.model.get("parametrization") == "transfer" and self.model.get("base") is None:
            base = {"dim": self.transfer.base.dim, "num_layers": self.transfer.base.num_layers}
            object.__setattr__(self, "model", {**self.model, "base": base})
        if self.transfer.proxy:
            for section, value in self._at_base().items():
                object.__setattr__(self, section, value)
        require(self, "name", bool(self.name) and "/" not in self.name, "a directory name")
        require(self, "seed", 0 <= self.seed <= LARGEST_SEED, f"an integer from 0 to {LARGEST_SEED}")
        if self.resume and self.ckpt_path is not None:
            raise ValueError(
                f"ckpt_path={self.ckpt_path!r}: resume=true already says which checkpoint; give one of them"
            )
        if self.extend_context is not None and self.ckpt_path is None and not self.resume:
            raise ValueError("ckpt_path=None: extend_context needs one (ckpt_path=RUN/checkpoints/last.ckpt)")
        if self.upcycle is not None and self.ckpt_path is not None:
            raise ValueError(
                f"ckpt_path={self.ckpt_path!r}: upcycle.from already says which weights to start from; give one of them"
            )
        if self.extend_context is not None and self.distillation is not None:
            raise ValueError("extend_context: allowed without distillation only")
        if self.fusion is not None:
            self._require_fusible()
        moe = self.model.get("moe")
        has_bias = isinstance(moe, dict) and bool(moe.get("expert_bias"))
        if self.balance.expert_bias_update_rate > 0 and not has_bias:
            raise ValueError(
                f"balance.expert_bias_update_rate={self.balance.expert_bias_update_rate}: it needs "
                "model.moe.expert_bias=true"
            )

    def _require_fusible(self) -> None:
        """Refuse what a run on pictures cannot have besides."""
        for name in ("distillation", "extend_context", "upcycle", "ckpt_path"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value!r}: must be null with fusion; weights come from fusion.text and encoder"
                )
        if self.data.source in ("memmap", *TASKS, *PICTURES):
            raise ValueError(
                f"data.source={self.data.source!r}: must be text with a tokenizer; fusion.pictures are the pictures"
            )
        if self.model.get("parametrization") == "transfer":
            raise ValueError("model.parametrization='transfer': must be another with fusion, as it has no encoder")
        if (
            self.fusion is not None
            and self.fusion.balance_per_modality
            and self.balance.load_balance_scope != "micro_batch"
        ):
            raise ValueError(
                f"balance.load_balance_scope={self.balance.load_balance_scope!r}: must be micro_batch with "
                "fusion.balance_per_modality=true"
            )

    def _at_base(self) -> dict[str, Any]:
        """The sections that a proxy changes; those of a proxy are as they are."""
        if self.model.get("parametrization") != "transfer":
            raise ValueError(
                "transfer.proxy=True: needs model.parametrization=transfer, as under no other the rates of a proxy hold"
            )
        base, training = self.transfer.base, self.training
        window = training.seq_len * training.accumulate
        if base.batch % window:
            raise ValueError(
                f"transfer.base.batch={base.batch}: must be a multiple of training.seq_len * training.accumulate = "
                f"{window}, so that transfer.proxy=true can have it"
            )
        vocabulary = self.model.get("vocab_size")
        model = from_mapping(DecoderConfig, {**self.model, "vocab_size": vocabulary or 1}, "model")
        smaller = to_mapping(resized(model, dim=base.dim, num_layers=base.num_layers))
        steps = max(1, round(base.tokens / base.batch))
        warmup = round(self.schedule.warmup_steps * steps / training.steps)
        return {
            "model": {**smaller, "vocab_size": vocabulary},
            "training": dataclasses.replace(training, steps=steps, batch_size=base.batch // window),
            "schedule": dataclasses.replace(self.schedule, warmup_steps=warmup),
        }

    def optimizer_at_scale(self) -> OptimizerConfig:
        """The optimizer of this batch and so many tokens: as `optimizer` says, unless settings transfer."""
        if self.model.get("parametrization") != "transfer":
            return self.optimizer
        batch = self.training.tokens_per_step
        settings = settings_at(self.transfer.base, batch, batch * self.training.steps)
        at = self.optimizer
        return dataclasses.replace(
            at,
            learning_rate=at.learning_rate * settings.rate,
            muon_learning_rate=at.muon_learning_rate * settings.rate,
            weight_decay=at.weight_decay * settings.rate,
            eps=at.eps * settings.eps,
            beta1=max(0.0, 1 - (1 - at.beta1) * settings.forgetting),
            beta2=max(0.0, 1 - (1 - at.beta2) * settings.forgetting),
        )
