"""Which backend runs the experts here, and why: by device, dtype, sizes, compiler and vmap."""

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.layers.sliced import cannot_repeat

__all__ = ["CASTING_BACKENDS", "backend_under_vmap", "choose_backend", "find_obstacle", "is_batched"]

CASTING_BACKENDS = {"sliced", "sliced_recompute"}
"""Backends that cast weights themselves, one expert at a time."""
STRENGTHS = {
    "grouped": "no padding and no host synchronisation",
    "sliced": "on a CPU as fast as any, with the least memory",
}


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    hidden_dim: int,
    backend: str = "auto",
    activation: Callable[[Tensor], Tensor] | None = None,
) -> tuple[str, str]:
    """What really runs for rows of this dtype when `backend` is asked for, and why: (name, reason).

    A backend that cannot do it gives way to the next one, and the reason says what was in the way.

    Args:
        activation: with gradients, some backends cannot run one that has parameters or draws random numbers.
    """
    if torch.compiler.is_compiling() or device.type != "cpu":
        candidates = ["grouped", "loop" if torch.compiler.is_exporting() else "padded"]
    else:
        candidates = ["sliced", "grouped", "loop"]
    if backend != "auto":
        candidates.insert(0, backend)
    reasons = []
    for name in candidates:
        obstacle = find_obstacle(name, device, dtype, dim, hidden_dim, activation)
        if obstacle is None:
            break
        reasons.append(obstacle)
    return name, "; ".join(reasons) or (STRENGTHS[name] if backend == "auto" else "as asked for")


def find_obstacle(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    hidden_dim: int,
    activation: Callable[[Tensor], Tensor] | None,
) -> str | None:
    """Why a backend cannot do it, None if it can."""
    if backend == "grouped":
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"grouped_mm has no {dtype} kernel"
        if device.type not in ("cpu", "cuda"):
            return f"grouped_mm is not known to work on {device.type}"
        if device.type == "cuda" and dtype != torch.bfloat16:
            return f"grouped_mm on CUDA wants bfloat16, not {dtype}"
        if torch.compiler.is_compiling() and dtype != torch.bfloat16:
            return f"torch.compile traces grouped_mm in bfloat16 only, not {dtype}"
        if dim * dtype.itemsize % 16 or hidden_dim * dtype.itemsize % 16:
            return f"grouped_mm needs rows of a multiple of 16 bytes, not dim={dim}, hidden_dim={hidden_dim}"
    if backend == "padded" and torch.compiler.is_exporting():
        return "torch.export cannot trace the number of rows of the fullest expert"
    if backend in CASTING_BACKENDS:
        if torch.compiler.is_compiling():
            return f"{backend} depends on the numbers of rows, for which torch.compile would compile anew every time"
        if activation is not None:
            return cannot_repeat(activation, torch.zeros(1, hidden_dim, device=device, dtype=dtype))
    return None


def is_batched(x: Tensor) -> bool:
    """Whether vmap is at work on x, at whatever level."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def backend_under_vmap(backend: str, device: torch.device, dtype: torch.dtype, dim: int, hidden_dim: int) -> str:
    """The one backend that vmap can map.

    Raises:
        ValueError: another one is asked for, or it cannot run here.
    """
    obstacle = find_obstacle("grouped", device, dtype, dim, hidden_dim, None)
    if backend not in ("auto", "grouped") or obstacle is not None:
        raise ValueError(
            f"backend={backend!r}: under vmap it must be auto or grouped, as the others ask for numbers of rows"
            + (f"; and {obstacle}" if obstacle else "")
        )
    return "grouped"
