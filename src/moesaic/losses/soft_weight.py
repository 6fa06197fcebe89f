"""How much soft targets count: schedule(progress) x control by the loss gap for a batch, times a gate per token."""

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.layers.checks import require_numbers

__all__ = ["Gate", "SoftWeight", "SoftWeightConfig", "TokenStatistics"]


class TokenStatistics(NamedTuple):
    """What a gate may look at: each token's own numbers, detached, at temperature 1. All (N,), entropies in nats."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    student_log_prob: Tensor
    """Log-probability of the label, in nats."""
    teacher_log_prob: Tensor
    """Log-probability of the label, in nats."""
    vocab_size: int


Gate = Callable[[TokenStatistics], Tensor]
"""(N,) factors in [0, 1] on the weight of the soft loss; a token's factor depends on that token only."""


@dataclasses.dataclass(frozen=True)
class SoftWeightConfig:
    """The weight of a batch is clip(schedule(progress) * gap control, minimum, maximum), progress from 0 to 1.

    Schedules: `constant` is value; `linear` and `cosine` go from start to end; `wsd` rises from 0 to value, stays, and
    falls to 0 (Peng et al. 2024, arXiv 2410.16215); `piecewise` is linear between points.

    Gap control multiplies by clip((student's loss - teacher's loss) / gap, 0, 1), over running means of steps already
    taken and 0 before the first: soft targets count while the teacher knows more, not while it is young or bad.

    Gates, per token: `entropy` leaves out the soft loss where the teacher is sure, its entropy below gate_threshold
    (token routing, Goyal et al. 2025, arXiv 2509.01649); `confidence` is p(label) ** gate_power; `agreement` is
    sigmoid(gate_slope * (log p(label) - log q(label)) + gate_offset); `student_uncertainty` is the student's entropy
    over log V (DynamicKD, Li et al. 2021).
    """

    schedule: Literal["constant", "linear", "cosine", "wsd", "piecewise"] = "constant"
    value: float = 0.5  # constant, wsd
    start: float = 0.9  # linear, cosine
    end: float = 0.5  # linear, cosine
    warmup_fraction: float = 0.1  # wsd
    decay_fraction: float = 0.2  # wsd
    points: tuple[tuple[float, ...], ...] = ()  # piecewise: (progress, weight), progress rising; constant beyond them
    gap: float | None = None  # loss gap that counts in full; null: no control
    gap_relative: bool = True  # gap is a share of the teacher's loss; false: nats
    ema: float = 0.99  # of the running means, per step
    gate: Literal["none", "entropy", "confidence", "agreement", "student_uncertainty"] = "none"
    gate_threshold: float = 0.5  # entropy: nats
    gate_power: float = 1.0  # confidence
    gate_slope: float = 1.0  # agreement
    gate_offset: float = 0.0  # agreement
    minimum: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", ("constant", "linear", "cosine", "wsd", "piecewise")),
            ("gate", ("none", "entropy", "confidence", "agreement", "student_uncertainty")),
        ):
            self._check(name, getattr(self, name) in allowed, ", ".join(allowed))
        for field in dataclasses.fields(self):
            if field.type in (float, float | None) and not (field.name == "gap" and self.gap is None):
                self._check(field.name, _is_number(getattr(self, field.name)), "a number")
        for name in ("value", "start", "end", "warmup_fraction", "decay_fraction", "minimum", "maximum"):
            self._check(name, 0 <= getattr(self, name) <= 1, "0 <= value <= 1")
        self._check("decay_fraction", self.warmup_fraction + self.decay_fraction <= 1, "1 - warmup_fraction or less")
        self._check("maximum", self.minimum <= self.maximum, f"a number >= minimum={self.minimum}")
        pairs = isinstance(self.points, (tuple, list)) and all(
            isinstance(point, (tuple, list)) and len(point) == 2 and all(_is_number(x) and 0 <= x <= 1 for x in point)
            for point in self.points
        )
        rising = pairs and all(a[0] < b[0] for a, b in itertools.pairwise(self.points))
        needed = self.schedule == "piecewise" and not self.points
        self._check("points", rising and not needed, "pairs (progress, weight) within 0 to 1, progress rising")
        self._check("gap", self.gap is None or 0 < self.gap < math.inf, "a number > 0, or null")
        self._check("ema", 0 <= self.ema < 1, "0 <= value < 1")
        self._check("gate_threshold", 0 <= self.gate_threshold < math.inf, "a number >= 0")
        self._check("gate_power", 0 < self.gate_power < math.inf, "a number > 0")
        for name in ("gate_slope", "gate_offset"):
            self._check(name, math.isfinite(getattr(self, name)), "finite numbers")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")


class SoftWeight(nn.Module):
    """The weight policy of one run. Its only state are running means of both losses, as buffers."""

    student_loss: Tensor
    teacher_loss: Tensor
    updates: Tensor

    def __init__(self, config: SoftWeightConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("student_loss", torch.zeros(()))
        self.register_buffer("teacher_loss", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SoftWeight":
        """`.to(bfloat16)` and the like leave the running means in fp32, where small steps are not lost."""
        kept = {name: getattr(self, name) for name in ("student_loss", "teacher_loss")}
        super()._apply(fn, recurse)
        for name, mean in kept.items():
            setattr(self, name, mean.to(getattr(self, name).device))
        return self

    def weight(self, progress: float) -> float | Tensor:
        """The weight of the soft loss in [0, 1] for the next step: a float, or a scalar tensor under gap control.

        Args:
            progress: share of the run that is done, 0 to 1.
        """
        config = self.config
        scheduled = _scheduled(config, progress)
        if config.gap is None:
            return min(max(scheduled, config.minimum), config.maximum)
        gap = self.loss_gap() / config.gap
        if config.gap_relative:
            teacher_loss = self.teacher_loss / self._bias_correction()
            gap = gap / teacher_loss.clamp(min=torch.finfo(torch.float32).tiny)
        return (scheduled * gap.clamp(0, 1)).clamp(config.minimum, config.maximum)

    @torch.no_grad()
    def update(self, student_loss: Tensor | float, teacher_loss: Tensor | float) -> None:
        """Take in both cross-entropies (scalars) of a finished step: means over its global batch, over all ranks."""
        for mean, loss in ((self.student_loss, student_loss), (self.teacher_loss, teacher_loss)):
            mean.lerp_(torch.as_tensor(loss).to(mean), 1 - self.config.ema)
        self.updates += 1

    def loss_gap(self) -> Tensor:
        """Running mean of the student's loss minus that of the teacher's, in nats; 0 before the first update."""
        return (self.student_loss - self.teacher_loss) / self._bias_correction()

    def _bias_correction(self) -> Tensor:
        """What the means, begun at 0, have seen of the losses (Adam's correction); 1 before the first update."""
        log_ema = math.log(max(self.config.ema, 1e-300))
        return torch.where(self.updates > 0, -torch.expm1(log_ema * self.updates.float()), 1.0)

    @property
    def gate(self) -> Gate | None:
        return None if self.config.gate == "none" else self._gate

    def _gate(self, tokens: TokenStatistics) -> Tensor:
        config = self.config
        if config.gate == "entropy":
            return (tokens.teacher_entropy >= config.gate_threshold).to(tokens.teacher_entropy.dtype)
        if config.gate == "confidence":
            return (config.gate_power * tokens.teacher_log_prob).exp()
        if config.gate == "agreement":
            lead = tokens.teacher_log_prob - tokens.student_log_prob
            return torch.sigmoid(config.gate_slope * lead + config.gate_offset)
        return (tokens.student_entropy / math.log(max(tokens.vocab_size, 2))).clamp(0, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _scheduled(config: SoftWeightConfig, progress: float) -> float:
    require_numbers(progress=progress)
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress!r}: must be 0 <= progress <= 1")
    if config.schedule == "constant":
        return config.value
    if config.schedule == "linear":
        return config.start + (config.end - config.start) * progress
    if config.schedule == "cosine":
        return config.end + (config.start - config.end) * (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "wsd":
        risen = progress / config.warmup_fraction if config.warmup_fraction else 1.0
        left = (1 - progress) / config.decay_fraction if config.decay_fraction else 1.0
        return config.value * min(risen, 1.0, left)
    points = config.points
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= progress <= x1:
            return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)
    return points[0][1] if progress < points[0][0] else points[-1][1]
