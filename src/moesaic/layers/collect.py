"""Routings of MoE layers inside a model that does not hand them out."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from moesaic.layers.routing import Routing

__all__ = ["collect_routings"]

METHOD = "forward_with_routing"
OUTSIDE_OF_GRAPHS = (
    "collect_routings takes a Routing out of the model, which breaks a graph; leave fullgraph=True away, "
    "or return the routing from the model"
)


@contextmanager
def collect_routings(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Collect what the MoE layers inside `model` decide while the context is open.

        with collect_routings(model) as routings:
            loss = model(x).square().mean()
        for name, (routing,) in routings.items():
            loss = loss + 0.01 * load_balance_loss(routing.logits, routing.expert_ids)

    A MoE layer is any module whose class has `forward_with_routing`; it must run through that method, as `MoE` does.
    Contexts may be nested and may end in any order. A recomputation in the backward pass is not collected again.
    A compiled model runs with a graph break at each layer; `fullgraph=True` gets torch's error, which says so.

    Yields:
        For each layer that ran, by its name in `model.named_modules()`, one `Routing` per call, in the order of calls.
        A layer that did not run has no entry. The dictionary stays yours after the context; the model keeps nothing.

    Raises:
        RuntimeError: a layer trains under reentrant checkpointing, which gives a routing without gradient.
    """
    routings: dict[str, list[Routing]] = {}
    collector = _Collector(routings, torch.is_grad_enabled())
    with ExitStack() as taps:
        for name, layer in model.named_modules():
            if hasattr(type(layer), METHOD):
                taps.enter_context(_tapped(layer, name, collector))
        yield routings


class _Collector:
    """One context: its dictionary, and all it took in order, to know a routing that a layer passes on."""

    def __init__(self, routings: dict[str, list[Routing]], trains: bool) -> None:
        self.routings = routings
        self.trains = trains
        self.taken: list[Tensor] = []

    def take(self, name: str, routing: Routing, before: int) -> None:
        """`before` is how many there were when the call began; what an inner layer gave already is not taken twice."""
        if any(routing.logits is logits for logits in self.taken[before:]):
            return
        self.taken.append(routing.logits)
        self.routings.setdefault(name, []).append(routing)


class _Tap:
    """Stands in the place of a layer's method as long as somebody collects."""

    def __init__(self, layer: nn.Module) -> None:
        self.run = getattr(layer, METHOD)
        self.collectors: list[tuple[str, _Collector]] = []
        # here and not as a decorator, which would load the compiler with every import
        self.collect = torch.compiler.disable(_collect, recursive=False, reason=OUTSIDE_OF_GRAPHS)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Routing]:
        y, routing = self.collect(self, *args, **kwargs)
        return y, routing


def _collect(tap: _Tap, *args: Any, **kwargs: Any) -> tuple[Tensor, Routing]:
    if torch._C._current_graph_task_id() != -1:  # autograd runs: activation checkpointing recomputes
        return tap.run(*args, **kwargs)
    began = [(name, collector, len(collector.taken)) for name, collector in tap.collectors]
    y, routing = tap.run(*args, **kwargs)
    for name, collector, before in began:
        if collector.trains and not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise RuntimeError(
                f"collect_routings: {name} runs under checkpoint(..., use_reentrant=True), whose routing has no "
                "gradient; it must be use_reentrant=False"
            )
        collector.take(name, routing, before)
    return y, routing


@contextmanager
def _tapped(layer: nn.Module, name: str, collector: _Collector) -> Iterator[None]:
    # in __dict__ itself: an nn.Module's own __setattr__ may hand on what it is given
    tap = layer.__dict__.get(METHOD)
    if not isinstance(tap, _Tap):
        tap = layer.__dict__[METHOD] = _Tap(layer)
    entry = (name, collector)
    tap.collectors.append(entry)
    try:
        yield
    finally:
        tap.collectors.remove(entry)
        if not tap.collectors:
            del layer.__dict__[METHOD]


def _in_reentrant_checkpoint() -> bool:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
    return False
