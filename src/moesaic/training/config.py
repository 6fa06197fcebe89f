"""The configuration of a whole run: what conf/train.yaml composes, as strict frozen dataclasses."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from moesaic.data import DataConfig
from moesaic.errors import InputError
from moesaic.evaluation.long_context import LossByPositionConfig
from moesaic.losses import DIVERGENCES, SoftWeightConfig

__all__ = [
    "BalanceConfig",
    "DistillationConfig",
    "OptimizerConfig",
    "Precision",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "TrainerConfig",
    "TrainingConfig",
    "require_accelerator",
    "teacher_mapping",
]


Precision = Literal["auto", "32-true", "bf16-mixed", "bf16-true", "64-true"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            _check(self, name, getattr(self, name) > 0, "numbers > 0")
        _check(self, "weight_decay", self.weight_decay >= 0, "numbers >= 0")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "0 <= value < 1")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then constant, cosine, or stable and linear decay (wsd)."""

    name: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_steps: int = 50
    decay_fraction: float = 0.3
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "warmup_steps", self.warmup_steps >= 0, "numbers >= 0")
        _check(self, "decay_fraction", 0 < self.decay_fraction <= 1, "0 < value <= 1")
        _check(self, "final_factor", 0 <= self.final_factor <= 1, "0 <= value <= 1")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps experts in use; a weight or rate of 0 switches a term off. Losses are means over the MoE layers."""

    load_balance_loss_weight: float = 0.0
    load_balance_scope: Literal["micro_batch", "global_batch"] = "micro_batch"
    router_z_loss_weight: float = 0.0
    expert_bias_update_rate: float = 0.0  # needs model.moe.expert_bias=true

    def __post_init__(self) -> None:
        for name in ("load_balance_loss_weight", "router_z_loss_weight", "expert_bias_update_rate"):
            _check(self, name, getattr(self, name) >= 0, "numbers >= 0")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How much is trained on what. One optimiser step sees batch_size * seq_len * accumulate tokens per process."""

    steps: int
    batch_size: int
    seq_len: int
    accumulate: int = 1
    fixed_windows: bool = False  # the same windows in every epoch, as runs from cached targets have them
    gradient_clip: float = 1.0  # norm; 0 switches it off
    validate_every: int = 200  # optimiser steps
    validation_batches: int | None = 16  # of each check during the run, spread over the split; null: all
    validation_seq_len: int | None = None  # null: seq_len
    log_every: int = 10
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "validate_every", "log_every", "checkpoint_every"):
            _check(self, name, getattr(self, name) >= 1, "numbers >= 1")
        for name in ("validation_batches", "validation_seq_len"):
            _check(self, name, (getattr(self, name) or 1) >= 1 and getattr(self, name) != 0, "numbers >= 1, or null")
        _check(self, "gradient_clip", self.gradient_clip >= 0, "numbers >= 0 (0: off)")


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """Where and in what precision."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    precision: Precision = "32-true"  # auto: what is faster here
    compile: bool = False  # torch.compile of every block
    checkpoint_activations: bool = False
    threads: int | None = None  # CPU threads; null: torch's choice
    keep_freed_memory: bool = False  # glibc on a CPU: do not return memory to the system, which is slow to get again

    def __post_init__(self) -> None:
        _check(self, "threads", self.threads is None or self.threads >= 1, "numbers >= 1, or null")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end of a run."""

    prompt: str = "class "
    max_new_tokens: int = 200
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = 0.95

    def __post_init__(self) -> None:
        _check(self, "max_new_tokens", self.max_new_tokens >= 0, "numbers >= 0")
        _check(self, "temperature", self.temperature >= 0, "numbers >= 0 (0: greedy)")
        _check(self, "top_k", self.top_k is None or self.top_k >= 1, "numbers >= 1, or null")
        _check(self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "0 < top_p <= 1, or null")


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Soft targets beside the labels, and where they come from.

    `frozen`: a trained teacher looks on. `joint`: the teacher trains along, as if alone, with the run's seed, balance
    and schedule. `cached`: targets from disk, which serve any number of students; what they lack, `teacher` adds.
    """

    source: Literal["frozen", "joint", "cached"]
    teacher: str | None = None  # frozen, cached: a checkpoint or a transformers directory
    cache: str | None = None  # cached: directory
    teacher_model: dict[str, Any] = dataclasses.field(default_factory=dict)  # joint: what differs from `model`
    teacher_learning_rate: float | None = None  # joint; null: optimizer.learning_rate
    teacher_muon_learning_rate: float | None = None  # joint; null: optimizer.muon_learning_rate
    divergence: str = "forward_kl"
    coefficient: float = 0.5  # of jsd and the skew divergences
    temperature: float = 1.0  # of the soft term
    soft_weight: SoftWeightConfig | None = None  # null: see `weight_policy`

    def __post_init__(self) -> None:
        needs = {"frozen": "teacher", "cached": "cache"}.get(self.source)
        if needs is not None and not getattr(self, needs):
            example = {"teacher": "RUN/checkpoints/last.ckpt", "cache": "TARGETS"}[needs]
            raise ValueError(f"{needs}=None: source={self.source} needs one (distillation.{needs}={example})")
        takes = {"frozen": ("teacher",), "joint": (), "cached": ("teacher", "cache")}[self.source]
        for name in ("teacher", "cache"):
            if getattr(self, name) is not None and name not in takes:
                raise ValueError(f"{name}={getattr(self, name)!r}: source={self.source} takes none; allowed is null")
        for name in ("teacher_model", "teacher_learning_rate", "teacher_muon_learning_rate"):
            if getattr(self, name) and self.source != "joint":
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: the teacher of source={self.source} is built already"
                )
        if "vocab_size" in self.teacher_model:
            raise ValueError("teacher_model.vocab_size: the teacher has the student's; leave it out")
        _check(self, "divergence", self.divergence in DIVERGENCES, ", ".join(DIVERGENCES))
        _check(self, "coefficient", 0 < self.coefficient < 1, "0 < value < 1")
        _check(self, "temperature", 0 < self.temperature < math.inf, "numbers > 0")
        for name in ("teacher_learning_rate", "teacher_muon_learning_rate"):
            _check(self, name, getattr(self, name) is None or getattr(self, name) > 0, "numbers > 0, or null")

    @property
    def weight_policy(self) -> SoftWeightConfig:
        """`soft_weight`, by default under gap control, up to .5 for a teacher that trains along, else .9."""
        return self.soft_weight or SoftWeightConfig(value=0.5 if self.source == "joint" else 0.9, gap=0.1)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything about one run. `model` stays a mapping until the data has said how large the vocabulary is."""

    name: str
    model: dict[str, Any]
    training: TrainingConfig
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    trainer: TrainerConfig = dataclasses.field(default_factory=TrainerConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    distillation: DistillationConfig | None = None  # null: labels only
    seed: int = 0
    output_dir: str = "outputs"
    run_dir: str | None = None  # null: a new directory under output_dir
    resume: bool = False  # continue run_dir, or the newest unfinished run of this name
    ckpt_path: str | None = None  # continue from this checkpoint, in a new run directory
    extend_context: LossByPositionConfig | None = None  # start from ckpt_path's weights alone, at a longer length

    def __post_init__(self) -> None:
        _check(self, "name", bool(self.name) and "/" not in self.name, "a directory name")
        _check(self, "seed", self.seed >= 0, "integers >= 0")
        if self.resume and self.ckpt_path is not None:
            raise ValueError(
                f"ckpt_path={self.ckpt_path!r}: resume=true already says which checkpoint; give one of them"
            )
        if self.extend_context is not None and self.ckpt_path is None and not self.resume:
            raise ValueError("ckpt_path=None: extend_context needs one (ckpt_path=RUN/checkpoints/last.ckpt)")
        if self.extend_context is not None and self.distillation is not None:
            raise ValueError("extend_context: allowed without distillation only")
        moe = self.model.get("moe")
        has_bias = isinstance(moe, dict) and bool(moe.get("expert_bias"))
        if self.balance.expert_bias_update_rate > 0 and not has_bias:
            raise ValueError(
                f"balance.expert_bias_update_rate={self.balance.expert_bias_update_rate}: it needs "
                "model.moe.expert_bias=true"
            )


def teacher_mapping(model: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a teacher that trains along: the student's with `distillation.teacher_model` merged into it."""
    merged = dict(model)
    for key, value in overrides.items():
        below = merged.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = teacher_mapping(below, value) if nested else value  # type: ignore[arg-type]
    return merged


def require_accelerator(key: str, accelerator: str) -> None:
    """Raise InputError that names `key` if this machine does not have the accelerator that was asked for."""
    if accelerator not in ("auto", "cpu", "gpu", "mps"):
        raise InputError(f"{key}={accelerator!r}: allowed are auto, cpu, gpu, mps")
    found = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(accelerator, True):
        raise InputError(
            f"{key}={accelerator!r}: torch {torch.__version__} finds none on this machine; allowed here: auto, cpu"
        )


def _check(config: Any, name: str, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={getattr(config, name)!r}: allowed are {allowed}")
