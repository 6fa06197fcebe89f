"""What a study is: its arms, seeds, axes, variants and what is prepared for them."""

import dataclasses
from typing import Any, Literal

from moesaic.config import LARGEST_SEED
from moesaic.distillation import TargetFormat

__all__ = [
    "EVALUATION_OPTIONS",
    "PREPARED",
    "AxisConfig",
    "CacheConfig",
    "Cell",
    "Overrides",
    "PrepareConfig",
    "StudyConfig",
    "TuneConfig",
    "VariantConfig",
]


Overrides = dict[str, Any]
"""Dotted keys of the run config and their values."""

PREPARED = "prepared:"

EVALUATION_OPTIONS = "evaluation_options."


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """The learning rates of each cell are multiplied by each factor on a seed of its own; the best one is measured."""

    seed: int = dataclasses.field(metadata={"most": LARGEST_SEED})
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    keys: tuple[str, ...] = ("optimizer.learning_rate", "optimizer.muon_learning_rate")
    # both: what is best at the first value of an axis is measured at the other values too, beside their own best
    # first: it is all that is measured there, because the rates transfer
    at: Literal["every", "both", "first"] = "every"

    def __post_init__(self) -> None:
        if len(set(self.factors)) < 2 or len(set(self.factors)) < len(self.factors) or min(self.factors) <= 0:
            raise ValueError(f"factors={list(self.factors)}: must be two or more different numbers > 0")
        if not self.keys:
            raise ValueError("keys=[]: name at least one learning rate")


@dataclasses.dataclass(frozen=True)
class AxisConfig:
    """A second dimension: every arm is run at every value, except arms that the axis does not change."""

    values: dict[str, Overrides]
    fixed: tuple[str, ...] = ()  # arms that are run once, without the axis, and compared at each of its values
    # arm: {value: what this arm has there}, where no set of keys fits all arms; it counts before those of the arm
    of_arm: dict[str, dict[str, Overrides]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """The checkpoints of an arm, evaluated under other keys of the model or other options; nothing is trained."""

    arm: str
    overrides: Overrides  # model.... and evaluation_options....

    @property
    def model(self) -> Overrides:
        return {key: value for key, value in self.overrides.items() if not key.startswith(EVALUATION_OPTIONS)}

    @property
    def options(self) -> Overrides:
        return {key: value for key, value in self.overrides.items() if key.startswith(EVALUATION_OPTIONS)}


@dataclasses.dataclass(frozen=True)
class CacheConfig(TargetFormat):
    """A teacher's targets for the whole training split; keys as in conf/cache_targets.yaml."""

    teacher: str = ""  # name of a prepared run; windows and data are those of the study's base config

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher='': name a prepared run")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What is made once before the arms that name it as the value prepared:NAME; one of the two.

    A run of the base config with overrides on the seed of tuning, stands for its checkpoint, a cache for its directory.
    """

    train: Overrides | None = None
    cache: CacheConfig | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.cache is None):
            raise ValueError("train, cache: give one of the two")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The `study` block of an experiment. The rest of the experiment is the run that all arms start from."""

    question: str
    equal: str  # what is held equal, in words
    baseline: str  # the arm that all others are compared with
    arms: dict[str, Overrides]
    seeds: tuple[int, ...] = dataclasses.field(metadata={"most": LARGEST_SEED})
    metric: str = "validation/bits_per_byte"  # of metrics.json or of an evaluation
    higher_is_better: bool = False
    also: tuple[str, ...] = ()  # more metrics for the table; of a pattern with * the mean over what it matches
    judged: dict[str, str] = dataclasses.field(default_factory=dict)  # another metric: the arm it has a verdict against
    tune: TuneConfig | None = None  # null: every arm at the learning rates of the config
    prepare: dict[str, PrepareConfig] = dataclasses.field(default_factory=dict)  # in this order
    axes: dict[str, AxisConfig] = dataclasses.field(default_factory=dict)
    variants: dict[str, VariantConfig] = dataclasses.field(default_factory=dict)
    evaluations: tuple[str, ...] = ()  # dotted paths of `Evaluation` functions
    evaluation_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    # arm: what is said of it wherever it is named, such as "sees later tokens"
    marks: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = ", ".join(self.arms)
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline!r}: unknown arm; must be one of {known}")
        for metric, arm in self.judged.items():
            if arm not in self.arms:
                raise ValueError(f"judged.{metric}: unknown arm {arm!r}; must be one of {known}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)}: must be one or more different integers >= 0")
        if self.tune is not None and self.tune.seed < 0:
            raise ValueError(f"tune.seed={self.tune.seed}: must be an integer >= 0")
        if self.tune is not None and self.tune.seed in self.seeds:
            raise ValueError(f"tune.seed={self.tune.seed}: it must not be one of seeds={list(self.seeds)}")
        for name, axis in self.axes.items():
            for arm in axis.fixed:
                if arm not in self.arms:
                    raise ValueError(f"axes.{name}.fixed: unknown arm {arm!r}; must be one of {known}")
            for arm, values in axis.of_arm.items():
                if arm not in self.arms:
                    raise ValueError(f"axes.{name}.of_arm: unknown arm {arm!r}; must be one of {known}")
                if unknown := [value for value in values if value not in axis.values]:
                    raise ValueError(
                        f"axes.{name}.of_arm.{arm}: unknown value {unknown[0]!r}; must be one of "
                        + ", ".join(axis.values)
                    )
        for name, variant in self.variants.items():
            if variant.arm not in self.arms:
                raise ValueError(f"variants.{name}.arm={variant.arm!r}: unknown arm; must be one of {known}")
            if name in self.arms:
                raise ValueError(f"variants.{name}: an arm has this name already")
            for key in variant.overrides:
                if not key.startswith(("model.", EVALUATION_OPTIONS)):
                    raise ValueError(
                        f"variants.{name}.overrides.{key}: must be keys of the model (model....) and of the "
                        "evaluations' options (evaluation_options....)"
                    )

        for name, mark in self.marks.items():
            if name not in self.arms:
                raise ValueError(f"marks.{name}: unknown arm; must be one of {known}")
            if not mark.strip() or "\n" in mark:
                raise ValueError(f"marks.{name}={mark!r}: must be a few words on one line")

        trained: list[str] = []
        for name, step in self.prepare.items():
            if step.cache is None:
                trained.append(name)
            elif step.cache.teacher not in trained:
                raise ValueError(
                    f"prepare.{name}.cache.teacher={step.cache.teacher!r}: must be the prepared runs above it: "
                    + (", ".join(trained) or "none")
                )

    def mark_of(self, name: str) -> str | None:
        """The mark of an arm, or of the arm that a variant evaluates; None without one."""
        return self.marks.get(self.variants[name].arm if name in self.variants else name)

    def shown(self, name: str) -> str:
        """The name of an arm or a variant with its mark, as people read it."""
        mark = self.mark_of(name)
        return name if mark is None else f"{name} ({mark})"

    @property
    def points(self) -> list[tuple[str, str] | None]:
        """(axis, value) of every place at which arms are compared; [None] without axes."""
        return [(name, value) for name, axis in self.axes.items() for value in axis.values] or [None]

    def cell(self, arm: str, point: tuple[str, str] | None) -> "Cell":
        """Where the runs of an arm (not of a variant) at a point are kept."""
        if point is None or arm in self.axes[point[0]].fixed:
            return Cell(arm, None, self.arms[arm])
        name, value = point
        axis = self.axes[name]
        own = axis.of_arm.get(arm, {}).get(value, {})
        return Cell(arm, f"{name}={value}", {**axis.values[value], **self.arms[arm], **own})

    def first_cell(self, cell: "Cell") -> "Cell":
        """The same arm at the first value of the axis."""
        if cell.axis is None:
            return cell
        axis = cell.axis.partition("=")[0]
        return self.cell(cell.arm, (axis, next(iter(self.axes[axis].values))))

    def result_cell(self, name: str, point: tuple[str, str] | None) -> "Cell":
        """As `cell`, of an arm or of the arm that a variant evaluates."""
        return self.cell(self.variants[name].arm if name in self.variants else name, point)

    @property
    def cells(self) -> list["Cell"]:
        cells = [self.cell(arm, point) for point in self.points for arm in self.arms]
        return list({(cell.arm, cell.axis): cell for cell in cells}.values())


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm at one value of an axis: what learning rates are tuned for. Where both set a key, the arm wins."""

    arm: str
    axis: str | None  # "experts=4"
    overrides: Overrides
