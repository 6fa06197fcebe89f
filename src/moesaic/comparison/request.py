"""What a comparison is asked, and its arms as models that can be compared."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moesaic.comparison.arms import Arm, differences, folder_name, named_apart
from moesaic.comparison.budget import parse_budget
from moesaic.comparison.costs import Candidate
from moesaic.comparison.fairness import Equal
from moesaic.config import from_mapping
from moesaic.data import Data, DataConfig, evaluation_loader, load_data, training_loader
from moesaic.devices import require_accelerator
from moesaic.errors import InputError, naming
from moesaic.models import DecoderConfig
from moesaic.studies.config import Overrides
from moesaic.training.config import RunConfig
from moesaic.training.memory import require_memory_of_run
from moesaic.training.optimizers import build_optimizer
from moesaic.training.run import fit_vocabulary

__all__ = [
    "OF_BATCHES",
    "STEPS",
    "Request",
    "Subject",
    "candidate_of",
    "own_differences",
    "read_arms",
    "unequal_training",
]

SAME = ("seed", "name", "output_dir", "run_dir", "resume", "ckpt_path")
"""Keys that belong to the comparison and not to an arm."""

STEPS = "training.steps"
"""The budget sets it for all arms, unless the person does."""

OF_BATCHES = (
    STEPS,
    *(f"training.{key}" for key in ("batch_size", "seq_len", "accumulate", "fixed_windows")),
    *("data.tokenizer", "data.vocab_size"),
)
"""Keys that decide what is in the batches: arms that differ in none of them are trained on the same tokens."""

SCORED = ("training.validation_seq_len", "training.score_windows")
"""Keys that decide what a score means."""

OF_DATA = ("data.tokenizer", "data.vocab_size", "data.cache_dir")
"""Keys of the data under which bits per byte are still of the same text."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked."""

    baseline: Arm
    new: tuple[Arm, ...]
    directory: Path
    """Keeps everything: what was decided, rows, report, and the folders of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 1200.0
    """Seconds that all runs may take together; nothing if `fixed` has training.steps."""
    equal: Equal = "active_flops"
    rates: tuple[float, ...] | None = None
    """Factors on the learning rates that are tried; None: as the budget allows."""
    workers: int = 2
    rounds: int = 5
    """Steps that are timed of each arm."""
    only: Literal["costs"] | None = None
    """Where to stop: after the costs, without training."""
    in_process: bool = False
    """Whether runs take place in this process, one after another: parts that were handed in exist nowhere else."""
    handed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Digests of the parts that were handed in, by name: another part may have the same name."""
    fixed: frozenset[str] = frozenset()
    """Dotted keys that the person set for all arms. The budget leaves them."""

    def __post_init__(self) -> None:
        distinct = set(self.seeds)
        if not distinct or len(distinct) < len(self.seeds) or any(type(x) is not int or x < 0 for x in distinct):
            raise InputError(f"seeds={list(self.seeds)}: must be one or more different integers >= 0")
        if self.rates is not None and (
            not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates)
        ):
            raise InputError(f"rates={list(self.rates)}: must be one or more different factors > 0")
        if self.workers < 1:
            raise InputError(f"workers={self.workers}: must be a number >= 1")
        if self.rounds < (self.only is None):
            raise InputError(f"rounds={self.rounds}: must be a number >= 1, or >= 0 with only=costs")
        for arm in self.new:
            asked = [word.lstrip("+").partition("=")[0] for word in arm.words]
            if STEPS in asked and STEPS not in self.fixed:
                raise InputError(
                    f"new: {arm.name}: training.steps: the budget sets it for all arms; to compare lengths, give "
                    "training.steps of the baseline beside new= as well"
                )
            if not differences(self.baseline.config, arm.config):
                raise InputError(f"new: {arm.name} is the baseline itself; must differ from it")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise InputError(f"new: two arms are called {max(names, key=names.count)}; must have different names")

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (self.baseline, *self.new)

    @classmethod
    def as_given(
        cls,
        arms: Sequence[Arm],
        *,
        seeds: Any,
        budget: Any,
        results_dir: str | Path | None,
        name: str | None = None,
        **others: Any,
    ) -> "Request":
        """A request as people give it: seeds as a number of them or a list, the budget as text.

        Args:
            arms: the baseline and the new ones; those of one name are named apart.
            results_dir: None for comparisons/`name`.
            name: None for the names of the arms.
            others: the other fields.

        Raises:
            InputError: a value that cannot be.
        """
        if type(seeds) is int:
            if not 1 <= seeds <= 1000:
                raise InputError(f"seeds={seeds}: must be a number from 1 to 1000, or a list of seeds")
            seeds = range(seeds)
        if not isinstance(budget, str):
            raise InputError(f"budget={budget}: must be a duration such as 90s, 10m or 1h30m")
        baseline, *new = named_apart(arms)
        name = name or folder_name([arm.name for arm in new], baseline.name)
        directory = Path(results_dir) if results_dir else Path("comparisons") / name
        return cls(baseline, tuple(new), directory, seeds=tuple(seeds), budget=parse_budget(budget), **others)


@dataclasses.dataclass(frozen=True)
class Subject:
    """An arm, read and checked, with the vocabulary of its data."""

    arm: Arm
    run: RunConfig
    candidate: Candidate


def read_arms(request: Request) -> tuple[dict[str, Subject], Data]:
    """Every arm as a config of its own, with the vocabulary of its data; and the baseline's data."""
    base = request.baseline.config
    runs: dict[str, RunConfig] = {}
    for arm in request.arms:  # what a model says wrongly is refused before any data is read
        with naming(arm.name) if arm.words else contextlib.nullcontext():  # else it holds for all arms
            _require_comparable(base, arm.config)
            run = runs[arm.name] = from_mapping(RunConfig, arm.config)
            model = {**run.model, "vocab_size": run.model["vocab_size"] or 1}
            require_accelerator("trainer.accelerator", run.trainer.accelerator)
            require_memory_of_run(run, from_mapping(DecoderConfig, model, "model"))
    subjects: dict[str, Subject] = {}
    loaded: dict[str, Data] = {}
    for arm in request.arms:
        run = runs[arm.name]
        key = repr(run.data)
        if key not in loaded:  # the baseline's are those of all arms, but for the tokenizer
            with naming(arm.name) if loaded else contextlib.nullcontext():
                loaded[key] = load_data(run.data)
        with naming(arm.name) if arm.words else contextlib.nullcontext():
            _require_windows(run, loaded[key])
            subjects[arm.name] = Subject(arm, run, candidate_of(run, fit_vocabulary(run, loaded[key])))
    first = from_mapping(DataConfig, base["data"], "data")
    return subjects, loaded[repr(first)]


def _require_windows(run: RunConfig, data: Data) -> None:
    """Refuse splits that no window of training or of the score fits into.

    Raises:
        InputError: it names the length, and how many tokens there are.
    """
    training = run.training
    training_loader(data, seq_len=training.seq_len, batch_size=training.batch_size, num_batches=1, seed=0)
    evaluation_loader(data, seq_len=training.validation_seq_len or training.seq_len, batch_size=1, max_batches=1)


def candidate_of(run: RunConfig, model: DecoderConfig) -> Candidate:
    """What is counted and timed of a run."""
    return Candidate(
        model=model,
        batch_size=run.training.batch_size,
        seq_len=run.training.seq_len,
        optimizer=run.optimizer.name,
        make_optimizer=functools.partial(build_optimizer, config=run.optimizer),
        checkpoint_activations=run.trainer.checkpoint_activations,
    )


def own_differences(request: Request, arm: Arm) -> Overrides:
    """What makes an arm of the baseline, but for its number of steps where the budget sets that."""
    found = differences(request.baseline.config, arm.config)
    return {key: value for key, value in found.items() if key != STEPS or STEPS in request.fixed}


def unequal_training(request: Request, arm: Arm) -> tuple[str, ...]:
    """The respects in which a new arm is trained on other batches, such as "2.00 times the tokens"."""
    base, changed = request.baseline.config["training"], own_differences(request, arm)

    def both(name: str) -> tuple[int, int]:
        return changed.get(f"training.{name}", base[name]), base[name]

    sizes = [both(name) for name in ("batch_size", "seq_len", "accumulate")]
    ours, theirs = (math.prod(pair[i] for pair in sizes) for i in (0, 1))
    steps = both("steps")
    found = []
    if ours * steps[0] != theirs * steps[1]:
        found.append(f"{ours * steps[0] / theirs / steps[1]:.2f} times the tokens")
    if ours != theirs:
        found.append(f"{ours:,} tokens in a step instead of {theirs:,}")
    if sizes[1][0] != sizes[1][1]:
        found.append(f"windows of {sizes[1][0]:,} tokens instead of {sizes[1][1]:,}")
    if {"data.tokenizer", "data.vocab_size"} & changed.keys():
        found.append("another tokenizer, so that other windows are trained and scored on")
    return tuple(found)


def _require_comparable(base: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for key in differences(base, config):
        root = key.split(".")[0]
        if key in SAME or root in ("logger", "sample"):
            raise InputError(f"{key}: must be the same in all arms; give it beside new= and baseline=")
        if (
            key in SCORED
            or (key == "training.seq_len" and base["training"]["validation_seq_len"] is None)
            or (root == "data" and key not in OF_DATA)
        ):
            raise InputError(f"{key}: scores would be of different texts or lengths; must be the same in all arms")
