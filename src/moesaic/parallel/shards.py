"""Tensors of which each rank holds a part (torch's DTensor): what is held here, and the whole of it.

Of a plain tensor the part is all of it, so that callers need not ask.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.layers.local import held

__all__ = [
    "differing_buffers",
    "gather_matrices",
    "held",
    "held_slices",
    "is_sharded",
    "layout",
    "load_shards",
    "require_parts",
    "shard_like",
    "whole",
]


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "device_mesh")


def layout(tensor: Any) -> Any:
    """What two tensors must share to be worked on together: mesh and placements; None of a plain tensor."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def whole(tensor: Any) -> Any:
    """The whole tensor; every rank of its mesh must ask for it. What is no DTensor comes back as it is."""
    if not is_sharded(tensor):
        return tensor
    return _gathered(tensor, range(tensor.ndim)).full_tensor()


def _gathered(tensor: Any, dims: Sequence[int]) -> Any:
    """A DTensor that is whole along some of its dimensions.

    What FSDP2 sharded last, along the first dimension of the mesh, is gathered first, and then the rest.
    """
    from torch.distributed.tensor import Replicate

    for i, placement in enumerate(tensor.placements):
        if getattr(placement, "dim", None) in dims:
            placements = [Replicate() if i == j else each for j, each in enumerate(tensor.placements)]
            tensor = tensor.redistribute(placements=placements)
    return tensor


def differing_buffers(module: nn.Module) -> list[str]:
    """Names of stored buffers that are not the same on all ranks. Every rank must ask."""
    stored = module.state_dict().keys()
    here = {
        name: hashlib.sha256(buffer.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).digest()
        for name, buffer in module.named_buffers()
        if name in stored
    }
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, here)
    return sorted({name for each in everywhere for name in each if each[name] != everywhere[0].get(name)})


def require_parts(module: nn.Module) -> None:
    """Refuse a weight that has no dimension along which ranks could keep parts of it, which FSDP2 cannot have.

    Raises:
        InputError: it names the weight.
    """
    for name, weight in module.named_parameters():
        if weight.dim() == 0:
            place, _, own = name.rpartition(".")
            raise InputError(
                f"{type(module.get_submodule(place)).__name__}: its weight {name} has no dimension; {own} must have "
                "one, such as torch.ones(1), or parallel.shard must be false"
            )


def held_slices(tensor: Any) -> tuple[slice, ...]:
    """Part of the whole tensor that this rank holds, a slice for each dimension."""
    bounds = [(0, size) for size in tensor.shape]
    if is_sharded(tensor):
        coordinates, mesh = tensor.device_mesh.get_coordinate(), tensor.device_mesh
        for i in _in_order_of_sharding(tensor.placements):
            dim = tensor.placements[i].dim
            first, last = bounds[dim]
            size = math.ceil((last - first) / mesh.size(i))
            begin = min(first + coordinates[i] * size, last)
            bounds[dim] = (begin, min(begin + size, last))
    return tuple(slice(*each) for each in bounds)


def _in_order_of_sharding(placements: Any) -> list[int]:
    """Dimensions of a mesh that shard, in the order in which they did.

    FSDP2 comes last though its dimension of the mesh is the first: its placement is then a strided one.
    """
    sharding = [i for i, placement in enumerate(placements) if hasattr(placement, "dim")]
    return sorted(sharding, key=lambda i: hasattr(placements[i], "split_factor"))


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, laid out as `like` is: each rank takes its part of what it has."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    part = tensor[held_slices(like)].to(like.device, copy=True).contiguous()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def load_shards(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill the parameters and buffers of a module from whole tensors by name; those on the meta device fill nothing.

    Raises:
        KeyError: one is missing.
    """
    for name, tensor in module.state_dict().items():
        if not weights[name].is_meta:
            held(tensor).copy_(weights[name][held_slices(tensor)])


def gather_matrices(part: Tensor, like: Any) -> Tensor:
    """The whole matrices of a stack, of which ranks hold parts: those that this rank has a part of.

    Args:
        part: what this rank holds, laid out as `like` (..., m, n).

    Returns:
        (..., m, n), with the first dimensions as far as `held_slices` of `like` go.
    """
    from torch.distributed.tensor import DTensor

    stacked = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    gathered: Tensor = _gathered(stacked, (like.ndim - 2, like.ndim - 1)).to_local()
    return gathered
