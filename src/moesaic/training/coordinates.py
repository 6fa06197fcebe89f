"""The coordinate check: whether what a model computes keeps its size as the model grows, after a few steps.

Under a parametrization that transfers, one learning rate moves activations as far in a wide or deep model as in a small
one. If activations grow with the size instead, the best rate shrinks with it (Yang et al. 2021, arXiv 2203.03466).
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.losses import linear_cross_entropy
from moesaic.models import Block, Decoder, DecoderConfig, build_decoder
from moesaic.models.config import BaseShape
from moesaic.models.resizing import resized
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizers import build_optimizer

__all__ = ["QUANTITIES", "Check", "Curve", "check", "measure", "source_batches"]

QUANTITIES = ("residual stream", "mixer", "feed-forward", "router logits", "output logits")
"""What is measured, by mean absolute value: the stream after the last block, of parts the mean over layers."""

MOST_SLOPE = 0.35
"""Largest slope of log2 of a quantity over log2 of the size; 1 means that it doubles with it."""

MOST_FALL_OF_LOGITS = MOST_SLOPE + 0.5
"""The same for logits that fall with the width: new ones do, as width^-0.5, and a few steps may not change that."""

Axis = Literal["width", "depth"]

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Check:
    """What is trained, and how far.

    Args:
        parametrization: under which.
        optimizer: by which.
        kind: dense: every MoE layer is replaced by its dense twin.
        widths: at the smallest depth.
        depths: at the smallest width.
        steps: of training on one batch after another, at a constant rate.
    """

    parametrization: Literal["standard", "scaled_logits", "transfer"]
    optimizer: Literal["muon", "adamw"]
    kind: Literal["moe", "dense"]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    steps: int = 8

    @property
    def name(self) -> str:
        return f"{self.parametrization}, {self.optimizer}, {self.kind}"


@dataclasses.dataclass(frozen=True)
class Curve:
    """How one quantity grows along one axis."""

    quantity: str
    axis: Axis
    sizes: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def slope(self) -> float:
        """d log2(value) / d log2(size), by least squares; inf if a value is not finite."""
        if not np.isfinite(self.values).all() or min(self.values) <= 0:
            return float("inf")
        return float(np.polyfit(np.log2(self.sizes), np.log2(self.values), 1)[0])

    @property
    def holds(self) -> bool:
        falls = self.axis == "width" and self.quantity in ("router logits", "output logits")
        return -(MOST_FALL_OF_LOGITS if falls else MOST_SLOPE) <= self.slope <= MOST_SLOPE


def check(model: DecoderConfig, optimizer: OptimizerConfig, of: Check) -> list[Curve]:
    """Train a model at several widths and depths for a few steps, and measure what it computes then.

    Args:
        model: at any size; see `moesaic.models.resizing.resized`.
        optimizer: its learning rates hold at the smallest size.

    Raises:
        InputError: a width that the model cannot have, or a parameter without a rule.
    """
    base = BaseShape(dim=min(of.widths), num_layers=min(of.depths))
    model = dataclasses.replace(model, vocab_size=VOCABULARY, tie_embeddings=False, dense_twin=of.kind == "dense")
    is_transfer = of.parametrization == "transfer"
    model = dataclasses.replace(model, parametrization=of.parametrization, base=base if is_transfer else None)
    optimizer = dataclasses.replace(optimizer, name=of.optimizer)
    known: dict[tuple[int, int], dict[str, float]] = {}

    def measured(width: int, depth: int) -> dict[str, float]:
        if (width, depth) not in known:
            known[width, depth] = measure(resized(model, dim=width, num_layers=depth), optimizer, of.steps)
        return known[width, depth]

    curves: list[Curve] = []
    axes: tuple[tuple[Axis, tuple[int, ...]], ...] = (("width", of.widths), ("depth", of.depths))
    for axis, sizes in axes:
        if len(sizes) < 2:
            continue
        found = [measured(size, base.num_layers) if axis == "width" else measured(base.dim, size) for size in sizes]
        curves += [Curve(name, axis, sizes, tuple(each[name] for each in found)) for name in found[0]]
    return curves


def measure(model: DecoderConfig, optimizer: OptimizerConfig, steps: int, seeds: int = 2) -> dict[str, float]:
    """Mean absolute value of each of `QUANTITIES` after so many steps on Python's own source, in bytes.

    It is a geometric mean over seeds: those of single ones differ by a factor of 1.5 where routers choose.

    Raises:
        InputError: a parameter without a rule.
    """
    found = [_measure(model, optimizer, steps, seed) for seed in range(seeds)]
    return {name: math.exp(sum(_log(each[name]) for each in found) / seeds) for name in found[0]}


def _log(value: float) -> float:
    return math.log(value) if math.isfinite(value) and value > 0 else math.inf


def _measure(model: DecoderConfig, optimizer: OptimizerConfig, steps: int, seed: int) -> dict[str, float]:
    batches = list(source_batches(steps + 1, seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = build_decoder(model)
        stepper = build_optimizer(decoder, optimizer)
        for batch in batches[:-1]:
            hidden, _ = decoder.hidden_states(batch[:, :-1])
            labels = batch[:, 1:].flatten()
            linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, labels).backward()
            stepper.step()
            stepper.zero_grad()
        with torch.no_grad(), _watching(decoder) as seen:
            output = decoder(batches[-1][:, :-1])
    seen["output logits"] = [_size(output.logits)]
    seen["router logits"] = [_size(routing.logits) for routing in output.routing.values()]
    return {name: sum(seen[name]) / len(seen[name]) for name in QUANTITIES if seen[name]}


def source_batches(count: int, seed: int, sequences: int = 8, length: int = 64) -> Iterator[Tensor]:
    """Batches (sequences, length + 1) int64 of bytes of Python's own source, the same for every model."""
    folder = Path(os.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(tokens) - length, (sequences,), generator=draw)
        yield torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])


@contextlib.contextmanager
def _watching(decoder: Decoder) -> Iterator[dict[str, list[float]]]:
    """Sizes of what blocks and their parts give, filled while the decoder runs."""
    seen: dict[str, list[float]] = {name: [] for name in QUANTITIES}
    added: list[Tensor] = []

    def note_mixer(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen["mixer"].append(_size(output))
        added.append(output)

    def note_block(block: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> None:
        assert isinstance(block, Block)
        seen["residual stream"] = [_size(output[0])]  # of the last block
        # a layer with routing is not called as a module, so its output is what is left
        both = (output[0] - inputs[0]) / block.residual_scale
        seen["feed-forward"].append(_size(both - added.pop()))

    hooks = [block.mixer.register_forward_hook(note_mixer) for block in decoder.layers if isinstance(block, Block)]
    hooks += [block.register_forward_hook(note_block) for block in decoder.layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().float().abs().mean())
