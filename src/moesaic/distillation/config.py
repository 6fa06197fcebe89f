"""The `distillation` block of a run: where soft targets come from and how much they weigh."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from moesaic.config import require
from moesaic.losses import DIVERGENCES, SoftWeightConfig
from moesaic.overrides import merge

__all__ = ["DistillationConfig", "teacher_mapping"]


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
                raise ValueError(f"{name}={getattr(self, name)!r}: source={self.source} takes none; must be null")
        for name in ("teacher_model", "teacher_learning_rate", "teacher_muon_learning_rate"):
            if getattr(self, name) and self.source != "joint":
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: the teacher of source={self.source} is built already"
                )
        if "vocab_size" in self.teacher_model:
            raise ValueError("teacher_model.vocab_size: the teacher has the student's; leave it out")
        require(self, "divergence", self.divergence in DIVERGENCES, ", ".join(DIVERGENCES))
        require(self, "coefficient", 0 < self.coefficient < 1, "0 < value < 1")
        require(self, "temperature", 0 < self.temperature < math.inf, "a number > 0")
        for name in ("teacher_learning_rate", "teacher_muon_learning_rate"):
            require(self, name, getattr(self, name) is None or getattr(self, name) > 0, "a number > 0, or null")

    @property
    def weight_policy(self) -> SoftWeightConfig:
        """`soft_weight`, by default under gap control, up to .5 for a teacher that trains along, else .9."""
        return self.soft_weight or SoftWeightConfig(value=0.5 if self.source == "joint" else 0.9, gap=0.1)


def teacher_mapping(model: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The model of a teacher that trains along: the student's with `distillation.teacher_model` merged into it."""
    return merge(model, overrides)
