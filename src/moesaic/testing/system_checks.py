"""Where training systems meet the layer: DistributedDataParallel and torch.compile."""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from moesaic.testing.harness import Failed, Layer, NotApplicable, Subject, check, compare, compare_gradients
from moesaic.testing.ranks import require_gloo

__all__ = ["compiles", "ddp"]


class Wrapped(nn.Module):
    """The layer as a module whose forward is the adapter's."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.module = layer.module
        self.layer_forward = layer.under_test.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_forward(self.module, x)


@check(
    "ddp",
    "every parameter has a gradient also where experts idle, and DistributedDataParallel trains two such steps",
    "deepspeedai/DeepSpeed#5066: an expert without tokens had no gradient, and the other ranks waited for it",
)
def ddp(subject: Subject) -> str:
    layer = subject.fresh()
    layer.module.train()
    copies = layer.tokens(1, 1).expand(2, 8, -1).contiguous()  # of one token: all but its own experts idle
    layer(copies).float().square().mean().backward()
    trained = {name for name, p in layer.module.named_parameters() if p.requires_grad}
    without = sorted(name for name, g in layer.named_gradients().items() if g is None and name in trained)
    if without:
        shown = ", ".join(without[:4]) + (", ..." if len(without) > 4 else "")
        raise Failed(f"{len(without)} of {len(trained)} parameters have no gradient: {shown}")
    layer.module.zero_grad()
    with _process_group():
        model = nn.parallel.DistributedDataParallel(Wrapped(layer))
        for _ in range(2):
            model(copies).float().square().mean().backward()
        # before the group goes: freed after it, the model waits for the group's threads while they wait for the GIL
        del model
    return "two steps, every parameter has a gradient"


@check(
    "compile",
    "torch.compile(fullgraph=True) traces forward and backward, with the same outputs and gradients",
    "PrimeIntellect-ai/prime-rl#996: num_tokens_per_expert.tolist() broke the graph",
)
def compiles(subject: Subject) -> str:
    layer = subject.fresh()
    layer.module.eval()  # so that the results can be compared; gradients are recorded all the same
    x = layer.tokens(2, 12)
    y, gradients = _run(layer, Wrapped(layer), x)
    with _quiet_tracer():
        breaks = _graph_breaks(layer, x)
        torch._dynamo.reset()
        try:
            # the backend traces the backward as well, and runs both graphs as they are: no C++ compiler is needed
            found = _run(layer, torch.compile(Wrapped(layer), backend="aot_eager", fullgraph=True), x)
        except Exception as error:
            raise Failed(f"{type(error).__name__}: {_innermost(error)}; {breaks}") from None
    compare(found[0], y, layer.tolerance, "compiled and plain")
    compare_gradients(found[1], gradients, 4 * layer.tolerance, "compiled and plain: ")
    return f"no graph break with fullgraph=True; {breaks}"


def _run(layer: Layer, model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    layer.module.zero_grad()
    torch.manual_seed(0)
    y = model(x)
    y.backward(layer.random(*x.shape, seed=7).to(y.dtype))
    return y.detach(), {name: g for name, g in layer.named_gradients().items() if g is not None}


def _graph_breaks(layer: Layer, x: Tensor) -> str:
    """How many there are without fullgraph, where and why."""
    torch._dynamo.reset()
    try:
        found: Any = torch._dynamo.explain(Wrapped(layer))(x)
    except Exception as error:
        return f"without it, the tracer gives up: {type(error).__name__}"
    places: dict[str, str] = {}
    for reason in found.break_reasons:
        frame = reason.user_stack[-1] if reason.user_stack else None
        place = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" if frame else "somewhere"
        places.setdefault(place, reason.reason.splitlines()[0])
    where = "; ".join(f"{place} ({reason})" for place, reason in places.items())
    return f"without it, breaks at {where}" if places else "none without it either"


def _innermost(error: Exception) -> str:
    """The sentence of a tracer's message that says what went wrong, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


@contextmanager
def _quiet_tracer() -> Iterator[None]:
    """The tracer logs every break at length; it also must not meet, or leave, traces of others."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        torch._dynamo.reset()
        logging.disable(disabled)


@contextmanager
def _process_group() -> Iterator[None]:
    """A gloo group of this process alone.

    Raises:
        NotApplicable: if there cannot be one here.
    """
    require_gloo()
    hook = sys.excepthook  # which the group replaces by one that names the rank, for good
    with tempfile.TemporaryDirectory() as directory:
        address = (Path(directory) / "rendezvous").as_uri()
        try:
            distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
        except RuntimeError as error:
            raise NotApplicable(f"no gloo process group here: {error}") from error
        try:
            yield
        finally:
            distributed.destroy_process_group()
            sys.excepthook = hook
