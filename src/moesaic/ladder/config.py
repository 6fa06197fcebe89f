"""What a ladder is: arms, rungs of compute, and the one rule by which a rung follows from its FLOPs."""

import dataclasses
import math

from moesaic.config import LARGEST_SEED
from moesaic.studies.config import Overrides, TuneConfig

__all__ = ["DropConfig", "LadderConfig", "name_of"]

FEWEST_RUNGS = 3
"""Below it a law with a free asymptote has more numbers than there are rungs."""


@dataclasses.dataclass(frozen=True)
class DropConfig:
    """After which rung an arm goes no further, and how far behind the baseline it must be for that."""

    rung: float  # one of ladder.rungs, but the largest
    behind: float  # share of the baseline's bits per byte, in the mean over the seeds
    keep: int | None = None  # how many arms go on at most, beside the baseline; null: all that are not behind

    def __post_init__(self) -> None:
        if not 0 < self.behind < math.inf:
            raise ValueError(f"behind={self.behind}: must be a share > 0 of the baseline's bits per byte, such as 0.02")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep={self.keep}: must be a number of arms >= 1, or null")


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """The `ladder` block of an experiment. The rest of it is the run that all rungs start from."""

    question: str
    baseline: str  # the arm that all others are compared with
    arms: dict[str, Overrides]  # widths in them are those at model.dim, and grow with the rung
    rungs: tuple[float, ...] = (1e11, 3e11, 1e12, 3e12, 1e13)  # active FLOPs of the baseline's training
    targets: tuple[float, ...] = ()  # larger rungs that are on record by moesaic predict, and in no fit
    seeds: tuple[int, ...] = dataclasses.field(default=(0, 1, 2), metadata={"most": LARGEST_SEED})
    tune: TuneConfig | None = dataclasses.field(default_factory=lambda: TuneConfig(seed=100))  # at the lowest rung
    drop: DropConfig | None = None  # null: every arm has every rung
    tokens_per_parameter: float = 20.0  # a parameter is two forward FLOPs per token
    batch: int = 2048  # tokens of an optimizer step at the lowest rung
    batch_exponent: float = 0.5  # it grows as tokens to this power
    warmup: float = 0.1  # share of the steps
    asymptote: float = 0.4  # bits per byte at infinite compute, where it is pinned
    least: float = 0.0  # FLOPs of the smallest rung that laws are fitted to; below it rungs are run and shown

    def __post_init__(self) -> None:
        for key in ("rungs", "targets"):
            flops = getattr(self, key)
            if any(not math.isfinite(each) or each <= 0 for each in flops) or list(flops) != sorted(set(flops)):
                raise ValueError(f"{key}={_listed(flops)}: must be different numbers of FLOPs > 0, the smallest first")
        if len(self.rungs) < FEWEST_RUNGS:
            raise ValueError(
                f"rungs={_listed(self.rungs)}: too few for a law; must be {FEWEST_RUNGS} or more different numbers of "
                "FLOPs, such as [1e11, 3e11, 1e12]"
            )
        if self.drop is not None and self.drop.rung not in self.rungs[:-1]:
            raise ValueError(
                f"drop.rung={_shown(self.drop.rung)}: must be one of rungs={_listed(self.rungs)}, but the largest"
            )
        if self.targets and self.targets[0] <= self.rungs[-1]:
            raise ValueError(
                f"targets={_listed(self.targets)}: must be above the largest rung, {name_of(self.rungs[-1])}"
            )
        if not 0 < self.tokens_per_parameter < math.inf:
            raise ValueError(f"tokens_per_parameter={self.tokens_per_parameter}: must be a number > 0")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be a number of tokens >= 1")
        if not 0 <= self.batch_exponent <= 1:
            raise ValueError(f"batch_exponent={self.batch_exponent}: must be 0 <= value <= 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: must be 0 <= value < 1")
        if not 0 <= self.asymptote < math.inf:
            raise ValueError(f"asymptote={self.asymptote}: must be a number of bits per byte >= 0")
        if not 0 <= self.least < math.inf or len(self.fitted()) < FEWEST_RUNGS:
            raise ValueError(
                f"least={_shown(self.least)}: must be a number of FLOPs >= 0 that leaves {FEWEST_RUNGS} or more of "
                f"rungs={_listed(self.rungs)}"
            )
        if self.tune is not None and self.tune.at != "every":
            raise ValueError(f"tune.at={self.tune.at!r}: must be left out, a ladder is tuned at its lowest rung")

    def fitted(self, least: float = 0.0) -> tuple[str, ...]:
        """The names of the rungs that laws are fitted to, of those with `least` FLOPs or more."""
        return tuple(name_of(flops) for flops in self.rungs if flops >= max(least, self.least))


def name_of(flops: float) -> str:
    """The name of a rung: 3e11 of 3 * 10 ** 11 FLOPs."""
    mantissa, _, exponent = f"{flops:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _shown(flops: float) -> str:
    """As `name_of`, of numbers that no rung can have, too."""
    return name_of(flops) if math.isfinite(flops) and flops else f"{flops:g}"


def _listed(flops: tuple[float, ...]) -> str:
    return "[" + ", ".join(map(_shown, flops)) + "]"
