"""Decoders side by side: what each costs, and the FFN width at which one costs as much as another."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from moesaic.devices import require_memory
from moesaic.errors import InputError
from moesaic.losses.cross_entropy import linear_cross_entropy
from moesaic.models.accounting import account
from moesaic.models.config import DecoderConfig
from moesaic.models.custom import custom_modules
from moesaic.models.decoder import Decoder, build_decoder
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory

__all__ = [
    "WIDTH_STEP",
    "Candidate",
    "Costs",
    "count_costs",
    "default_width",
    "solve_width",
    "time_steps",
    "with_width",
]

WIDTH_STEP = 8
"""Widths are multiples of it: kernels that group experts want rows of 16 bytes in bf16."""

WIDTHS = ("model.hidden_dim", "model.moe.hidden_dim")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A decoder and how it is trained."""

    model: DecoderConfig
    batch_size: int
    seq_len: int
    optimizer: str
    """adamw or muon, for `estimate_memory`."""
    make_optimizer: Callable[[Decoder], torch.optim.Optimizer]
    checkpoint_activations: bool = False


@dataclasses.dataclass(frozen=True)
class Costs:
    """What can be known without running. FLOPs are per token, bytes those of fp32 training."""

    parameters: int
    active_parameters: int
    forward_flops: float
    training_flops: float
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int


def count_costs(arm: Candidate) -> Costs:
    """By formula; the memory of custom modules is counted on tensors without memory (seconds)."""
    accounted = account(arm.model, arm.seq_len)
    if custom_modules(arm.model):
        memory = trace_memory(
            arm.model,
            batch_size=arm.batch_size,
            seq_len=arm.seq_len,
            make_optimizer=arm.make_optimizer,
            checkpoint_activations=arm.checkpoint_activations,
        )
    else:
        memory = _memory_of(arm)
    return Costs(
        parameters=accounted.parameters,
        active_parameters=accounted.active_parameters,
        forward_flops=accounted.forward_flops,
        training_flops=accounted.training_flops,
        weight_bytes=memory.weights,
        optimizer_bytes=memory.optimizer,
        activation_bytes=memory.activations,
    )


def _memory_of(arm: Candidate) -> MemoryEstimate:
    """By formula, without custom modules."""
    return estimate_memory(
        arm.model,
        batch_size=arm.batch_size,
        seq_len=arm.seq_len,
        optimizer=arm.optimizer,
        checkpoint_activations=arm.checkpoint_activations,
    )


def time_steps(arms: Sequence[Candidate], *, rounds: int = 7, device: str = "cpu") -> list[float]:
    """Median seconds of a whole step in fp32: forward, cross-entropy, backward, optimizer. Balance losses are left out.

    One step of each arm in turn per round, beginning with another arm each time, after two rounds to warm up. All arms
    are in memory together. Every step sees other random tokens, so experts get other numbers of rows.
    """
    require_memory(
        f"a and b: timing {len(arms)} models side by side",
        sum(_memory_of(arm).total for arm in arms),
        "gpu" if device == "cuda" else "cpu",
        "must be smaller models, batch_size or seq_len, or rounds=0",
    )
    steps = [_step_of(arm, device) for arm in arms]
    samples: list[list[float]] = [[] for _ in arms]
    for i in range(-2, rounds):
        for j in range(len(arms)):
            which = (i + j) % len(arms)
            began = time.perf_counter()
            steps[which]()
            if i >= 0:
                samples[which].append(time.perf_counter() - began)
    return [statistics.median(found) for found in samples]


def _step_of(arm: Candidate, device: str) -> Callable[[], None]:
    decoder = build_decoder(arm.model, checkpoint_activations=arm.checkpoint_activations, device=device)
    optimizer = arm.make_optimizer(decoder)
    shape = (arm.batch_size, arm.seq_len + 1)

    def step() -> None:
        tokens = torch.randint(arm.model.vocab_size, shape, device=device)
        hidden, _ = decoder.hidden_states(tokens[:, :-1])
        loss = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def default_width(model: DecoderConfig) -> str:
    """The key of the width to solve for: of the experts where the depth pattern has MoE layers or dense twins."""
    return WIDTHS[any(layer.ffn in ("moe", "dense_twin") for layer in model.layers)]


def with_width(model: DecoderConfig, key: str, width: int) -> DecoderConfig:
    """`model` with another `model.hidden_dim` (dense FFNs) or `model.moe.hidden_dim`.

    Each routed expert is as wide as the latter says, a shared one too if its own width is null; a dense twin follows.

    Raises:
        InputError: another key, or no layer that it is the width of.
    """
    if key not in WIDTHS:
        raise InputError(f"width={key}: must be one of {', '.join(WIDTHS)}")
    kinds = ("dense",) if key == "model.hidden_dim" else ("moe", "dense_twin")
    if not any(layer.ffn in kinds for layer in model.layers):
        raise InputError(f"width={key}: nothing to solve, no layer of b has this width ({' or '.join(kinds)})")
    if key == "model.hidden_dim":
        return dataclasses.replace(model, hidden_dim=width)
    assert model.moe is not None  # checked by the config
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, hidden_dim=width))


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
            f"out of range: b has {found[high if widest else low]:.6g} even at width "
            f"{(high if widest else low) * WIDTH_STEP}, the {'largest' if widest else 'smallest'} that is tried; "
            f"a has {target:.6g}"
        )
    while not is_near() and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    best = min(found, key=lambda steps: (abs(found[steps] - target), steps))
    return best * WIDTH_STEP, found[best]
