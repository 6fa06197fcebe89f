"""The sizes at which a new model costs as much as the baseline, and what stays unequal."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import torch

from moesaic.comparison.costs import Candidate, Costs, forward_costs, measure_costs, time_steps
from moesaic.errors import InputError
from moesaic.models.config import DecoderConfig

__all__ = ["WIDTH_STEP", "Equal", "Fair", "default_width", "make_fair", "solve_width", "unequal", "with_sizes"]

WIDTH_STEP = 8
"""Widths are multiples of it: kernels that group experts want rows of 16 bytes in bf16."""

EXPERT_WIDTH, DENSE_WIDTH, NUM_EXPERTS = "model.moe.hidden_dim", "model.hidden_dim", "model.moe.num_experts"
NAMES = {
    EXPERT_WIDTH: "the width of each expert",
    DENSE_WIDTH: "the width of the dense layers",
    NUM_EXPERTS: "the number of experts",
}

ENOUGH = 0.01
"""Relative difference of a cost below which it counts as equal."""

ENOUGH_SECONDS = 0.1
"""The same of seconds, which vary by several percent from one measurement to the next."""

EQUAL_SECONDS = 0.05
"""The difference of seconds below which no width is solved for: both were timed side by side."""

Equal = Literal["active_flops", "parameters", "both", "seconds", "none"]


@dataclasses.dataclass(frozen=True)
class Fair:
    """A new model beside its baseline, at sizes that make them cost the same."""

    overrides: dict[str, int]
    """The sizes that were solved, by dotted key; empty if nothing was."""
    reason: str
    """Sentences: why these sizes, or why none."""
    unequal: tuple[str, ...]
    """What still differs, such as "22% fewer parameters" of the new model."""
    notes: tuple[str, ...]
    """Sentences about the costs: how they were counted, and which part says something else of itself."""
    baseline: Costs
    before: Costs
    """The costs of the new model as it was given."""
    after: Costs
    """The costs of the new model with `overrides`."""


def make_fair(
    baseline: Candidate,
    new: Candidate,
    equal: Equal,
    *,
    given: Collection[str] = frozenset(),
    rounds: int = 5,
    device: str = "cpu",
    costs: Costs | None = None,
) -> Fair:
    """Solve the width of the new model, for "both" its number of experts too, and say what is unequal.

    The width is that of every expert, `model.moe.hidden_dim`, or `model.hidden_dim` in a model without experts. What
    cannot be solved is no error: then nothing changes, and `reason` says why.

    Args:
        equal: what shall be equal. "both" are active FLOPs and parameters, as near as can be.
        given: dotted keys that the user set for the new model. They stay as they are.
        rounds: steps to time of each model; 0 leaves seconds out.
        device: where steps are timed.
        costs: those of the baseline, if they have been measured.

    Raises:
        InputError: equal="seconds" with rounds=0, or models that cannot be timed in memory.
    """
    if equal == "seconds" and rounds == 0:
        raise InputError("rounds=0: equal=seconds needs measured steps; must be a number >= 1")
    costs, before = costs or measure_costs(baseline), measure_costs(new)
    if equal == "seconds":
        overrides, reason = _solve_seconds(baseline, new, given, rounds, device)
    else:
        overrides, reason = _solve(costs, new, before, equal, given)
    made = dataclasses.replace(new, model=with_sizes(new.model, overrides))
    after = measure_costs(made) if overrides else before
    if rounds:
        seconds = time_steps([baseline, made], rounds=rounds, device=device)
        costs, after = (
            dataclasses.replace(each, step_seconds=found) for each, found in zip((costs, after), seconds, strict=True)
        )
    uncounted = sorted({*costs.unknown_operators, *after.unknown_operators})
    if uncounted and equal in ("active_flops", "both"):
        reason += f" FLOPs of {', '.join(uncounted)} are not counted, so active FLOPs are at least these."
    notes = [*(f"The baseline: {note}" for note in costs.notes), *after.notes]
    return Fair(overrides, reason, unequal(costs, after), tuple(notes), costs, before, after)


# ---- what is unequal


class _Quantity(NamedTuple):
    name: str
    few: str
    is_enough: float = ENOUGH


QUANTITIES = {
    "parameters": _Quantity("parameters", "fewer"),
    "active_parameters": _Quantity("active parameters", "fewer"),
    "forward_flops": _Quantity("active FLOPs", "fewer"),
    "activation_bytes": _Quantity("activation memory", "less"),
    "step_seconds": _Quantity("seconds per step", "fewer", ENOUGH_SECONDS),
}


def unequal(baseline: Costs, new: Costs) -> tuple[str, ...]:
    """Everything in which the new model costs more or less, such as "22% fewer parameters".

    Differences below 1% are left out, of seconds below 10%.
    """
    found = []
    for key, quantity in QUANTITIES.items():
        ours, theirs = getattr(new, key), getattr(baseline, key)
        if ours and theirs and abs(ours / theirs - 1) > quantity.is_enough:
            found.append(_told(ours / theirs, quantity))
    return tuple(found)


def _told(ratio: float, quantity: _Quantity) -> str:
    if ratio >= 1.2 or ratio < 0.5:
        return f"{ratio:.2f} times the {quantity.name}"
    percent = abs(ratio - 1)
    return f"{percent:.{0 if percent >= 0.0995 else 1}%} {'more' if ratio > 1 else quantity.few} {quantity.name}"


# ---- the sizes


def default_width(model: DecoderConfig) -> str | None:
    """The key of the width to solve: of the experts or their dense twins, else of dense layers; None without either."""
    kinds = [layer.ffn for layer in model.layers]
    if "moe" in kinds or "dense_twin" in kinds:
        return EXPERT_WIDTH
    return DENSE_WIDTH if "dense" in kinds else None


def with_sizes(model: DecoderConfig, sizes: dict[str, int]) -> DecoderConfig:
    """`model` with other sizes, by dotted key: one of the two widths, the number of experts."""
    if DENSE_WIDTH in sizes:
        model = dataclasses.replace(model, hidden_dim=sizes[DENSE_WIDTH])
    of_experts: dict[str, Any] = {key.rpartition(".")[2]: size for key, size in sizes.items() if key != DENSE_WIDTH}
    if of_experts:
        assert model.moe is not None  # there is no such key otherwise
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **of_experts))
    return model


def _size(model: DecoderConfig, key: str) -> int:
    if key == DENSE_WIDTH:
        return model.hidden_dim
    assert model.moe is not None
    return int(getattr(model.moe, key.rpartition(".")[2]))


def _free_sizes(model: DecoderConfig, equal: Equal, given: Collection[str]) -> tuple[list[str], str]:
    """The keys that may be solved, and a sentence about those that may not."""
    width = default_width(model)
    if width is None:
        return [], "No layer of the new model has a width that could be solved."
    wanted = [width]
    if equal == "both" and any(layer.ffn == "moe" for layer in model.layers):
        wanted.append(NUM_EXPERTS)
    yours = [key for key in wanted if key in given]
    stay = "it stays" if len(yours) == 1 else "they stay"
    why = f"You set {_listed({key: _size(model, key) for key in yours})}, so {stay}." if yours else ""
    return [key for key in wanted if key not in given], why


TARGETS = {"active_flops": ("forward_flops",), "parameters": ("parameters",), "both": ("forward_flops", "parameters")}
FAR = 64
"""Largest factor on a width that is tried."""


def _solve(
    baseline: Costs, new: Candidate, before: Costs, equal: Equal, given: Collection[str]
) -> tuple[dict[str, int], str]:
    """Sizes for equal FLOPs, parameters or both, and the reason."""
    if equal == "none":
        return {}, "Nothing is made equal, as you asked."
    targets = {key: float(getattr(baseline, key)) for key in TARGETS[equal]}
    names = " and ".join(QUANTITIES[key].name for key in targets)
    now = {key: float(getattr(before, key)) for key in targets}
    off = _largest_difference(now, targets)
    if off <= ENOUGH:
        return {}, f"Equal already: {names} differ by {off:.1%}."
    keys, why = _free_sizes(new.model, equal, given)
    if not keys:
        return {}, why
    start = {key: _size(new.model, key) for key in keys}
    try:
        surface = _Surface(new, start, before)
    except InputError as error:
        if NUM_EXPERTS not in keys or len(keys) == 1:
            return {}, f"No other size can be built: {error}."
        keys = [key for key in keys if key != NUM_EXPERTS]
        start = {key: _size(new.model, key) for key in keys}
        why = f"The number of experts stays, because no other can be built: {error}."
        try:
            surface = _Surface(new, start, before)
        except InputError as again:
            return {}, f"No other size can be built: {again}."
    if surface.is_flat:
        sizes = " and ".join(NAMES[key] for key in keys)
        return {}, f"The costs of the new model do not depend on {sizes}. {why}".strip()
    found, predicted = surface.nearest(targets)
    expected = _largest_difference(predicted, targets)
    if found == start:
        return {}, f"No multiple of {WIDTH_STEP} is nearer: {names} differ by up to {off:.1%}. {why}".strip()
    if len(targets) == 1 and expected > ENOUGH and surface.is_at_the_edge(found):
        [(key, target)] = targets.items()
        return {}, (
            f"Out of reach: even with {_listed(found)} the new model has {predicted[key] / target:.2f} times the "
            f"{names} of the baseline. {why}"
        ).strip()
    if expected >= off:
        return {}, f"No size is nearer: {names} differ by up to {off:.1%}. {why}".strip()
    changed = {key: size for key, size in found.items() if size != start[key]}
    was = " and ".join(f"{NAMES[key]} from {start[key]} to {size}" for key, size in changed.items())
    how = "as equal as can be" if expected > ENOUGH else "equal"
    return changed, f"Changes {was}, so that {names} are {how} ({_compared(now, targets)} before). {why}".strip()


def _largest_difference(values: dict[str, float], targets: dict[str, float]) -> float:
    return max(abs(values[key] / target - 1) for key, target in targets.items())


def _compared(values: dict[str, float], targets: dict[str, float]) -> str:
    return ", ".join(f"{values[key] / target:.2f} times the {QUANTITIES[key].name}" for key, target in targets.items())


def _listed(sizes: dict[str, int]) -> str:
    return " and ".join(f"{key}={size}" for key, size in sizes.items())


class _Surface:
    """FLOPs and parameters over width and number of experts: both grow linearly in each, so four points tell all.

    Args:
        new: the model.
        start: its sizes; those of one or two keys are free.
        before: its costs.

    Raises:
        InputError: a custom module refuses another number of experts.
    """

    def __init__(self, new: Candidate, start: dict[str, int], before: Costs) -> None:
        self.start = start
        self.widths: dict[str, torch.Tensor] = {}
        for key, size in start.items():
            if key == NUM_EXPERTS:
                assert new.model.moe is not None
                step = _experts_step(size)
                sizes = torch.arange(step, FAR // 8 * size + 1, step)
                sizes = torch.cat((sizes, torch.tensor([size]))).unique()
                self.widths[key] = sizes[sizes >= max(new.model.moe.top_k, 2)]
            else:
                sizes = torch.arange(WIDTH_STEP, FAR * max(size, WIDTH_STEP) + 1, WIDTH_STEP)
                self.widths[key] = torch.cat((sizes, torch.tensor([size]))).unique()
        at_start = {"forward_flops": before.forward_flops, "parameters": float(before.parameters)}
        self.measured: dict[tuple[int, ...], dict[str, float]] = {tuple(start.values()): at_start}
        corners: list[dict[str, int]] = [{}]
        for key, size in start.items():
            corners = [{**corner, key: each} for corner in corners for each in (size, _other(key, size))]
        for corner in corners[1:]:
            candidate = dataclasses.replace(new, model=with_sizes(new.model, corner))
            flops, parameters = forward_costs(candidate)
            self.measured[tuple(corner.values())] = {"forward_flops": flops, "parameters": float(parameters)}

    @property
    def is_flat(self) -> bool:
        """Whether no size changes anything, as where custom experts have a width of their own."""
        return all(each == self.measured[tuple(self.start.values())] for each in self.measured.values())

    def value(self, quantity: str) -> torch.Tensor:
        """The quantity over all sizes, one dimension per key, in fp64."""
        found = {corner: torch.tensor(value[quantity], dtype=torch.float64) for corner, value in self.measured.items()}
        for key, size in reversed(self.start.items()):  # the last size of every corner goes first
            other, axis = _other(key, size), self.widths[key].double()
            share = (axis - size) / (other - size)
            rest = {corner[:-1] for corner in found}
            found = {corner: _along(found[(*corner, size)], found[(*corner, other)], share) for corner in rest}
        return found[()]

    def nearest(self, targets: dict[str, float]) -> tuple[dict[str, int], dict[str, float]]:
        """The sizes at which the largest relative difference is smallest, and what they are expected to cost.

        Among those that are as good within 0.1%, the ones that change least.
        """
        values = {quantity: self.value(quantity) for quantity in targets}
        off = torch.stack([(values[q] / target - 1).abs() for q, target in targets.items()]).amax(dim=0)
        change = torch.zeros_like(off)
        for i, (key, size) in enumerate(self.start.items()):
            shape = [-1 if i == j else 1 for j in range(len(self.start))]
            change = change + (self.widths[key].double() / size).log().abs().view(shape)
        good = off <= off.min() + 1e-3
        place = torch.where(good, change, torch.inf).argmin()
        at = [int(index) for index in torch.unravel_index(place, off.shape)]
        sizes = {key: int(self.widths[key][index]) for key, index in zip(self.start, at, strict=True)}
        return sizes, {quantity: float(value[tuple(at)]) for quantity, value in values.items()}

    def is_at_the_edge(self, sizes: dict[str, int]) -> bool:
        return any(size in (int(self.widths[key][0]), int(self.widths[key][-1])) for key, size in sizes.items())


def _along(low: torch.Tensor, high: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Linear in `share` (n,), as a new first dimension."""
    share = share.view(-1, *[1] * low.dim())
    return low + share * (high - low)


def _other(key: str, size: int) -> int:
    """A second size to measure at."""
    return size + (_experts_step(size) if key == NUM_EXPERTS else WIDTH_STEP * max(1, size // WIDTH_STEP))


def _experts_step(num_experts: int) -> int:
    """Numbers of experts are multiples of it: a power of two, 2 to 8, an eighth of them."""
    return max(2, min(8, 1 << (max(1, num_experts // 8).bit_length() - 1)))


# ---- seconds


def _solve_seconds(
    baseline: Candidate, new: Candidate, given: Collection[str], rounds: int, device: str
) -> tuple[dict[str, int], str]:
    """A width for equal seconds per step, and the reason."""
    keys, why = _free_sizes(new.model, "seconds", given)
    if not keys:
        return {}, why
    [key] = keys
    start = _size(new.model, key)

    @functools.cache
    def over_baseline(width: int) -> float:
        """Both are timed at once, because machines are not equally fast at all times."""
        changed = dataclasses.replace(new, model=with_sizes(new.model, {key: width}))
        ours, theirs = reversed(time_steps([baseline, changed], rounds=rounds, device=device))
        return ours / theirs

    ratio = over_baseline(start)
    if abs(ratio - 1) <= EQUAL_SECONDS:
        return {}, f"Equal already: a step takes {ratio:.2f} times the seconds of the baseline."
    try:
        width, found = solve_width(over_baseline, 1.0, start=start, most=16 * start, tolerance=0.02)
    except InputError as error:
        return {}, f"Seconds per step cannot be made equal: {error}."
    if width == start:
        return {}, f"No other width is nearer: a step takes {ratio:.2f} times the seconds of the baseline."
    return {key: width}, (
        f"Changes {NAMES[key]} from {start} to {width}, so that a step takes {found:.2f} times the seconds "
        f"of the baseline ({ratio:.2f} before)."
    )


def solve_width(
    measure: Callable[[int], float], target: float, *, start: int, most: int, tolerance: float = 0.0
) -> tuple[int, float]:
    """The multiple of `WIDTH_STEP` for which `measure`, which grows with the width, is nearest to `target`.

    Doubles or halves from `start` until the target is between two widths, then halves the gap between them.

    Args:
        most: the largest width to try.
        tolerance: stop at a measure this near, relative to the target; for what is measured with noise.

    Returns:
        The width, and its measure.

    Raises:
        InputError: the target is out of reach.
    """
    found: dict[int, float] = {}

    def is_enough(steps: int) -> bool:
        """Whether this width reaches the target."""
        found[steps] = measure(steps * WIDTH_STEP)
        return found[steps] >= target

    def is_near() -> bool:
        return any(abs(value - target) <= tolerance * target for value in found.values())

    low = high = max(1, round(start / WIDTH_STEP))
    last = max(low, most // WIDTH_STEP)
    if is_enough(high):
        while not is_near() and low > 1:
            high, low = low, low // 2
            if not is_enough(low):
                break
    else:
        while not is_near() and high < last:
            low, high = high, min(2 * high, last)
            if is_enough(high):
                break
    if not is_near() and not found[low] <= target <= found[high]:
        widest = found[high] < target
        raise InputError(
            f"{found[high if widest else low]:.6g} even at width {(high if widest else low) * WIDTH_STEP}, the "
            f"{'largest' if widest else 'smallest'} that is tried, against {target:.6g}"
        )
    while not is_near() and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    best = min(found, key=lambda steps: (abs(found[steps] - target), steps))
    return best * WIDTH_STEP, found[best]
