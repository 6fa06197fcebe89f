"""What a part alone must hold, in the order in which it is asked: a leak spoils every number that follows."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.layers import MovingRouter
from moesaic.layers.routers.moving import observed_by
from moesaic.testing.harness import Failed, NotApplicable, outcome, relative_error
from moesaic.testing.placing import LENGTH, Place, Placed
from moesaic.testing.report import CheckResult

__all__ = ["PART_CHECKS", "PartCheck"]

TOLERANCE = 2e-5
"""Allowed relative difference. Parts run in float64 where they can, but may compute in float32 within."""

DEAD = 1e-10
"""Largest gradient of a matrix, relative to the largest of all, that is rounding alone."""

BATCHES = 4
SCALES = (1e-3, 1.0, 1e3)


@dataclass(frozen=True)
class PartCheck:
    """One property of a part, by name, and the public bug that it guards against."""

    name: str
    statement: str
    bug: str
    function: Callable[[Place], str | None]

    def run(self, place: Place) -> CheckResult:
        """The outcome as a row; an exception in the part is a failure, not a crash."""
        row = CheckResult(self.name, "pass", "", self.statement, self.bug)
        return outcome(row, lambda: self.function(place))


PART_CHECKS: list[PartCheck] = []
"""In the order in which they are run and shown."""


def part_check(name: str, statement: str, bug: str) -> Callable[[Callable[[Place], str | None]], PartCheck]:
    def register(function: Callable[[Place], str | None]) -> PartCheck:
        PART_CHECKS.append(PartCheck(name, statement, bug, function))
        return PART_CHECKS[-1]

    return register


@part_check(
    "repeatability",
    "the same input and seeds of torch, numpy and random give the same output: else no outputs can be compared",
    "Novartis/scar#97: results that the seed of torch alone did not repeat",
)
def repeatability(place: Place) -> str:
    for training in (False, True):
        if not place.is_repeatable(training):
            when = "training" if training else "evaluation"
            raise Failed(f"in {when} two calls with one input and one seed differ: it is random beyond all seeds")
    modes = {"evaluation": False, "training": True}
    draws = [when for when, training in modes.items() if not place.is_deterministic(training)]
    return f"random in {' and in '.join(draws)}, by its seed" if draws else "it draws no random numbers"


@part_check(
    "causality",
    "an output does not depend on what later tokens are, by its gradient and when they are replaced",
    "piotrpiekos/MoSA#3 and allenai/OLMoE#46: experts that choose tokens let later ones decide about earlier ones",
)
def causality(place: Place) -> str:
    return _measured(_alone_and_in_model(place, _causality))


def _causality(place: Place) -> float:
    _require_repeatable(place)
    placed = place.fresh()
    worst = 0.0
    for training in (False, True):
        length = place.length
        x = placed.random(1, length)  # one sequence: what others of a batch do is for the next check to say
        ends = range(0, length, length // LENGTH)
        for t, reach in zip(ends, _reach(placed, x, training, [(slice(None), t) for t in ends]), strict=False):
            worst = max(worst, _refuse(reach[:, t + 1 :], reach, f"the output of token {t} depends on later tokens"))
        y = placed.run(x, training=training)
        for t in (1, 4, 8, 9, 16, length // 2, length - 1):
            for what, later in _replacements(placed, x[:, t:], x[:, :1]):
                found = placed.run(torch.cat([x[:, :t], later], dim=1), training=training)
                worst = max(
                    worst,
                    _same(found[:, :t], y[:, :t], f"outputs before token {t} when the tokens from there on are {what}"),
                )
        if place.longest > length:  # what spans chunks or windows shows in sequences as long as those of training
            x, other = (placed.random(1, place.longest, seed=seed) for seed in (0, 7))
            y = placed.run(x, training=training)
            for t in (place.longest // 3, place.longest // 2, place.longest - 1):
                found = placed.run(torch.cat([x[:, :t], other[:, t:]], dim=1), training=training)
                what = f"outputs before token {t} of {place.longest} when the tokens from there on are others"
                worst = max(worst, _same(found[:, :t], y[:, :t], what))
    return worst


@part_check(
    "batch independence",
    "a sequence's output does not depend on the others of its batch, nor on how many there are",
    "vllm-project/vllm#16744 and marin-community/marin#8134: results that changed with the prompts beside them",
)
def batch_independence(place: Place) -> str:
    return _measured(_alone_and_in_model(place, _batch_independence))


def _batch_independence(place: Place) -> float:
    _require_repeatable(place)
    placed = place.fresh()
    worst = 0.0
    for training in (False, True):
        x = placed.random(3, place.length)
        y = placed.run(x, training=training)
        for b, reach in enumerate(_reach(placed, x, training, [(b, slice(None)) for b in range(3)])):
            others = torch.cat([reach[:b], reach[b + 1 :]])
            worst = max(worst, _refuse(others, reach, "an output depends on other sequences of its batch"))
            own = (torch.arange(3) == b)[:, None, None]
            for what, mates in _replacements(placed, x, x[b : b + 1, :1]):
                found = placed.run(torch.where(own, x, mates), training=training)[b]
                worst = max(worst, _same(found, y[b], f"a sequence when the others of its batch are {what}"))
        if place.is_deterministic(training):
            more = torch.cat([placed.random(4, place.length, seed=5), x])
            for size, found in (
                (1, torch.cat([placed.run(x[b : b + 1], training=training) for b in range(3)])),
                (2, torch.cat([placed.run(x[:2], training=training), placed.run(x[1:], training=training)[1:]])),
                (7, placed.run(more, training=training)[4:]),
            ):
                worst = max(worst, _same(found, y, f"a sequence in a batch of {size} and in one of 3"))
    if place.is_deterministic(training=False):
        placed.whole.eval()
        with torch.no_grad():
            y = placed.run(x)
            placed.call(placed.random(3, place.length, seed=5))
            worst = max(worst, _same(placed.call(x), y, "a batch in evaluation when another one came before it"))
    return worst


@part_check(
    "length independence",
    "an output does not depend on how many tokens follow: it is no leak, but decoding gives other outputs",
    "huggingface/transformers#25104: RoPE scaled by the length of the whole sequence",
)
def length_independence(place: Place) -> str:
    _require_repeatable(place)
    placed = place.fresh()
    worst = 0.0
    modes = [training for training in (False, True) if place.is_deterministic(training)]
    if not modes:
        raise NotApplicable("it is random in training and in evaluation")
    for training in modes:
        x = placed.random(1, LENGTH)
        y = placed.run(x, training=training)
        for t in (1, 4, 8, 9, 16, LENGTH - 1):
            found = placed.run(x[:, :t], training=training)
            worst = max(worst, _same(found, y[:, :t], f"the first {t} outputs when no token follows"))
    return _measured(worst)


@part_check(
    "gradients",
    "every parameter gets a gradient from the output, which is finite and not always zero",
    "INK-USC/RE-Net#6 and jingyaogong/minimind#858: an attention layer and a router that never learned",
)
def gradients(place: Place) -> str:
    placed = place.fresh()
    names = {name: p for name, p in placed.part.named_parameters() if p.requires_grad}
    if not names:
        return "it has no parameters"
    largest, top = dict.fromkeys(names, 0.0), 0.0
    missing = dict.fromkeys(names, 0)
    for seed in range(BATCHES):
        placed.whole.zero_grad()
        _backward(placed, placed.random(4, LENGTH, seed=seed), seed)
        top = max(top, *(p.grad.abs().max().item() for p in placed.whole.parameters() if p.grad is not None), 0.0)
        for name, p in names.items():
            missing[name] += p.grad is None
            if p.grad is not None:
                if not bool(p.grad.isfinite().all()):
                    raise Failed(f"the gradient of {name} is not finite")
                largest[name] = max(largest[name], p.grad.abs().max().item())
    never = [name for name, count in missing.items() if count == BATCHES]
    rounding = DEAD if placed.dtype == torch.float64 else 1e-6
    zero = [
        name
        for name, p in names.items()
        if name not in never and (largest[name] == 0 or (p.dim() > 1 and largest[name] <= rounding * top))
    ]
    if never or zero:
        said = [f"{', '.join(found)} {what}" for found, what in ((never, "get none"), (zero, "only zeros")) if found]
        raise Failed(f"of {len(names)} parameters, in {BATCHES} batches: {'; '.join(said)}")
    at_times = [name for name, count in missing.items() if count]
    return f"{len(names)} parameters" + (f"; without one in some batches: {', '.join(at_times)}" if at_times else "")


@part_check(
    "finite numbers",
    "outputs and gradients stay finite in float32 for inputs from 0.001 to 1,000 times the usual, and constant ones",
    "google-research/vmoe#218: NaN gradients from a division by a deviation of zero",
)
def finite_numbers(place: Place) -> str:
    usual = place.fresh(torch.float32).random(2, LENGTH)
    inputs = {f"inputs of scale {scale:g}": scale * usual for scale in SCALES}
    inputs |= {f"inputs that are all {value:g}": torch.full_like(usual, value) for value in (0.0, 1.0)}
    inputs["the same token everywhere"] = usual[:, :1].expand_as(usual).contiguous()
    for what, x in inputs.items():
        placed = place.fresh(torch.float32)
        leaf = x.clone().requires_grad_()
        y = _backward(placed, leaf, 0)
        found = {"output": y, "gradient of the input": leaf.grad}
        found |= {f"gradient of {name}": p.grad for name, p in placed.part.named_parameters()}
        bad = [name for name, tensor in found.items() if tensor is not None and not bool(tensor.isfinite().all())]
        if bad:
            raise Failed(f"{what}: not finite: {', '.join(bad)}")
    return f"{len(inputs)} kinds of input"


@part_check(
    "state in the checkpoint",
    "what training changes is in the state dict: a part that was saved and loaded goes on in the same way",
    "bayesiains/nflows#4: a flag outside the state dict, so that a loaded layer began anew",
)
def state(place: Place) -> str:
    trained = place.fresh()
    for step in range(3):
        _train(trained, step)
    # `_train` seeds it with the step
    if repr(np.random.get_state()) != repr(np.random.RandomState(2).get_state()):  # noqa: NPY002
        raise Failed("it draws from numpy's generator, which no checkpoint keeps; torch's and random's are kept")
    file = io.BytesIO()
    torch.save(trained.whole.state_dict(), file)
    file.seek(0)
    loaded = place.fresh(trained.dtype, seed=1)
    try:
        loaded.whole.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        raise Failed(f"a fresh one cannot load the state dict: {' '.join(str(error).split())}") from error
    x = trained.random(2, LENGTH, seed=9)
    worst = 0.0
    told = ""
    try:
        worst = _same(_evaluate(loaded, x), _evaluate(trained, x), "the output before saving and after loading")
        for step in range(3, 5):
            _train(trained, step)
            _train(loaded, step)
        worst = max(worst, _same(_evaluate(loaded, x), _evaluate(trained, x), "the output two steps after loading"))
    except Failed as failure:
        told = str(failure)
    kept = trained.whole.state_dict().keys()
    mine, other = dict(_attributes(trained.whole)), dict(_attributes(loaded.whole))
    lost = sorted(name for name in mine if name not in kept and _differ(mine[name], other.get(name)))
    if lost:
        told = "; ".join(filter(None, [told, f"not in the state dict: {', '.join(lost)}"]))
    if told:
        raise Failed(told)
    return f"{len(kept)} tensors; {_measured(worst)}"


@part_check(
    "padding",
    "masked positions change nothing: real tokens come out as alone, whatever stands beside them",
    "huggingface/transformers#32677 and #41790: Mamba layers that took a mask and did not apply it",
)
def padding(place: Place) -> str:
    placed = place.fresh()
    if not placed.takes_mask:
        raise NotApplicable("it takes no attention mask")
    _require_deterministic(place)
    x, other = placed.random(3, LENGTH), placed.random(3, LENGTH, seed=3)
    worst = 0.0
    for what, (left, right) in {"left": (5, 0), "right": (0, 7), "left and right": (3, 4)}.items():
        real = slice(left, LENGTH - right)
        mask = torch.zeros(3, LENGTH, dtype=torch.bool)
        mask[:, real] = True
        alone = placed.run(x[:, real])
        for content in (x, other, 100 * other):
            filled = torch.where(mask[:, :, None], x, content)
            found = placed.run(filled, mask=mask)[:, real]
            worst = max(worst, _same(found, alone, f"real tokens with padding on the {what} and alone"))
    return _measured(worst)


@part_check(
    "cached decoding",
    "tokens that come one by one, or in pieces, have the outputs of the whole sequence",
    "fla-org/flash-linear-attention#285: a layer that continued from its state gave other outputs than at once",
)
def cached_decoding(place: Place) -> str:
    placed = place.fresh()
    if not hasattr(placed.whole, "make_cache"):
        raise NotApplicable("it has no make_cache")
    _require_deterministic(place)
    x = placed.random(2, LENGTH)
    layouts: list[tuple[Tensor | None, str]] = [(None, "")]
    if placed.takes_mask:
        layouts.append((torch.arange(LENGTH).expand(2, -1) >= torch.tensor([[0], [5]]), ", with padding on the left"))
    worst = 0.0
    for mask, where in layouts:
        whole = placed.run(x, mask=mask)
        real = slice(None) if mask is None else mask
        for what, pieces in {
            "one by one": [1] * LENGTH,
            "in two pieces": [9, LENGTH - 9],
            "after a prompt": [LENGTH - 4, 1, 1, 1, 1],
        }.items():
            found = placed.in_pieces(x, pieces, mask)
            worst = max(worst, _same(found[real], whole[real], f"tokens {what} and at once{where}"))
    return _measured(worst)


def _alone_and_in_model(place: Place, check: Callable[[Place], float]) -> float:
    """The largest difference that a check allows of a part, and of the model whose layers hand on what it leaves.

    In float32 the part alone is asked: rounding in one layer may change a choice in the next.
    """
    worst = check(place)
    if place.model is None or place.fresh().dtype != torch.float64:
        return worst
    try:
        return max(worst, check(place.model))
    except Failed as failure:
        raise Failed(f"in a model with all its layers {failure}") from failure


def _replacements(placed: Placed, x: Tensor, first: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other tokens of the same shape: drawn anew, all wanting what one token wants, and larger."""
    yield "others", placed.random(x.size(0), x.size(1), seed=7)
    yield "copies of one token", first.expand_as(x)
    yield "10 times as large", 10 * x


def _reach(placed: Placed, x: Tensor, training: bool, places: Sequence[Any]) -> Iterator[Tensor]:
    """For each place in the output, the gradient for x of what stands there, weighted at random."""
    leaf = x.clone().requires_grad_()
    y = placed.run(leaf, training=training, with_graph=True)
    if not bool(y.isfinite().all()):
        raise ValueError("outputs are not finite, so nothing can be told of them")
    weighted = y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    for place in places if y.requires_grad else ():
        yield torch.autograd.grad(weighted[place].sum(), leaf, retain_graph=True, materialize_grads=True)[0]


def _refuse(unwanted: Tensor, all_of_it: Tensor, what: str) -> float:
    """Raises Failed where `unwanted` gradients are more than rounding."""
    largest = all_of_it.abs().max().item()
    share = unwanted.abs().max().item() / largest if largest and unwanted.numel() else 0.0
    if not share <= TOLERANCE:
        raise Failed(f"{what}: their gradient is {share:.1e} of the largest, allowed {TOLERANCE:.0e}")
    return share


def _same(found: Tensor, expected: Tensor, what: str) -> float:
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        raise Failed(f"{what}: relative difference {error:.1e}, allowed {TOLERANCE:.0e}")
    return error


def _measured(worst: float) -> str:
    return f"largest relative difference {worst:.1e}" if worst else "bit-equal"


def _backward(placed: Placed, x: Tensor, seed: int) -> Tensor:
    """The output in training mode; its gradients, weighted at random, are added to those of the parameters."""
    placed.whole.train()
    y = placed.call(x, seed=seed)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 50)).to(y)
    if y.requires_grad:
        (y * weights).sum().backward()
    return y


def _train(placed: Placed, step: int) -> None:
    """One step of gradient descent on noise of its own, and what a router of its own kind moves beside it."""
    placed.whole.zero_grad()
    x = placed.random(2, LENGTH, seed=step)
    _backward(placed, x, step)
    if isinstance(placed.part, MovingRouter):
        with torch.no_grad():
            placed.part.end_step(observed_by(placed.part, placed.routing(x), None))
    with torch.no_grad():
        for p in placed.whole.parameters():
            if p.grad is not None:
                p.sub_(0.01 * p.grad / p.grad.norm().clamp(min=1e-6))


@torch.no_grad()
def _evaluate(placed: Placed, x: Tensor) -> Tensor:
    placed.whole.eval()
    return placed.call(x)


def _require_repeatable(place: Place) -> None:
    if not (place.is_repeatable(training=False) and place.is_repeatable(training=True)):
        raise NotApplicable("it is random beyond all seeds, so no outputs can be compared")


def _require_deterministic(place: Place) -> None:
    _require_repeatable(place)
    if not place.is_deterministic(training=False):
        raise NotApplicable("evaluation is random")


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers that a module and those below it hold, by name, also within containers."""
    internal = vars(nn.Module()).keys()
    for prefix, each in module.named_modules():
        held = {**each._buffers, **{name: x for name, x in vars(each).items() if name not in internal}}
        for name, value in held.items():
            yield from _leaves(f"{prefix}.{name}" if prefix else name, value, 4)


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Tensor, int, float)):
        yield name, value
    elif isinstance(value, torch.Generator):
        yield name, value.get_state()
    elif depth and not isinstance(value, (nn.Module, type)):
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        elif hasattr(value, "__dict__") and not callable(value):
            value = vars(value)
        for key, each in value.items() if isinstance(value, dict) else ():
            yield from _leaves(f"{name}.{key}", each, depth - 1)


def _differ(mine: Any, other: Any) -> bool:
    if not isinstance(mine, Tensor):
        return bool(mine != other) and not (mine != mine and other != other)
    if not isinstance(other, Tensor) or mine.shape != other.shape:
        return True
    if not mine.is_floating_point():
        return not torch.equal(mine, other)
    scale = mine.detach().double().nan_to_num().abs().max().item() if mine.numel() else 0.0
    return not torch.allclose(mine.double(), other.double(), rtol=0, atol=TOLERANCE * scale, equal_nan=True)
