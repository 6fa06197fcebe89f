"""Where experts are spread over processes: two of them are as one."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed

from moesaic.layers.local import held
from moesaic.testing.harness import (
    Failed,
    Layer,
    NotApplicable,
    Subject,
    check,
    compare,
    compare_gradients,
    deterministic_layer,
)
from moesaic.testing.ranks import on_ranks

__all__ = ["expert_parallel"]

RANKS = 2


class Learned(NamedTuple):
    y: Tensor
    x_gradient: Tensor
    gradients: dict[str, Tensor]
    """Gradients of the parameters that this process has, each as large as what it has; zeros where there is none."""


@check(
    "expert-parallel",
    "experts spread over two processes give the outputs and gradients of one process",
    "pytorch/pytorch#160285 and databricks/megablocks#20: gradients of experts too large by the number of processes; "
    "huggingface/transformers#48205: NaN, and parts of gradients that were never added up",
)
def expert_parallel(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    spread = layer.need("expert_parallel")
    if layer.device.type != "cpu":
        raise NotApplicable(f"the layer is on {layer.device}, and the processes are on the CPU")
    tokens = layer.tokens(2 * RANKS, 6)
    # of one token alone, whose experts may all be on one rank: the other has nothing to do
    copies = tokens[:1, :1].expand_as(tokens).contiguous()
    batches = {"tokens": tokens, "copies of a token": copies}

    def share(rank: int) -> list[Learned]:
        spread(layer.module, distributed.group.WORLD)
        return [_learn(layer, x, rank, RANKS) for x in batches.values()]

    alone = [_learn(layer, x) for x in batches.values()]
    try:
        shares = on_ranks(share, RANKS)
    except RuntimeError as error:
        raise Failed(str(error)) from None
    worst = 0.0
    for i, (what, wanted) in enumerate(zip(batches, alone, strict=True)):
        parts = [each[i] for each in shares]
        compare(torch.cat([part.y for part in parts]), wanted.y, layer.tolerance, f"y, {what}")
        found = {name: _together(name, of_one, parts) for name, of_one in wanted.gradients.items()}
        found["x"] = torch.cat([part.x_gradient for part in parts])
        oracle = {**wanted.gradients, "x": wanted.x_gradient}
        worst = max(worst, compare_gradients(found, oracle, 4 * layer.tolerance, f"{what}: "))
    return f"largest relative error of a gradient {worst:.1e}"


def _learn(layer: Layer, x: Tensor, rank: int = 0, ranks: int = 1) -> Learned:
    """A forward and a backward with this rank's share of the sequences and of the gradient of the output."""
    upstream = layer.random(*x.shape, seed=7)
    x, upstream = (each.chunk(ranks)[rank].clone() for each in (x, upstream))
    layer.module.zero_grad()
    torch.manual_seed(0)
    y = layer(x.requires_grad_())
    y.backward(upstream.to(y.dtype))
    assert x.grad is not None
    gradients = {
        name: torch.zeros_like(held(each)) if each.grad is None else held(each.grad).clone()
        for name, each in layer.module.named_parameters()
        if each.requires_grad
    }
    return Learned(y.detach().clone(), x.grad.clone(), gradients)  # clones wait for what is still on its way


def _together(name: str, whole: Tensor, parts: list[Learned]) -> Tensor:
    """A gradient from those of all ranks: copies are added up, and pieces laid side by side.

    Raises:
        Failed: no rank has it, or the pieces do not make the whole.
    """
    pieces = [part.gradients[name] for part in parts if name in part.gradients]
    if pieces and all(piece.shape == whole.shape for piece in pieces):
        return torch.stack(pieces).sum(0)
    for cut in range(whole.dim()):
        others = {piece.shape[:cut] + piece.shape[cut + 1 :] for piece in pieces}
        is_cut_here = others == {whole.shape[:cut] + whole.shape[cut + 1 :]}
        if is_cut_here and sum(piece.size(cut) for piece in pieces) == whole.size(cut):
            return torch.cat(pieces, dim=cut)
    found = ", ".join(str(tuple(piece.shape)) for piece in pieces) or "none"
    raise Failed(f"{name} of shape {tuple(whole.shape)}: the ranks have {found}, which do not make it up")
