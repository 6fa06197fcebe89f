"""Backend that runs the experts here, and why: by device, dtype, sizes, compiler and vmap."""

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from moesaic.layers.checks import differentiates_forward
from moesaic.layers.fp8_kernels import cannot_run_fp8
from moesaic.layers.sliced import Activation, cannot_repeat

__all__ = ["CASTING_BACKENDS", "ROUNDING_BACKENDS", "BackendName", "backend_for", "choose_backend"]

BackendName = Literal["auto", "loop", "padded", "grouped", "sliced", "sliced_recompute", "fp8_emulated", "fp8"]
"""What may be asked for: "auto", or a key of `moesaic.layers.BACKENDS`."""

warn_once = functools.cache(logging.getLogger("moesaic.layers").warning)

CASTING_BACKENDS = {"sliced", "sliced_recompute"}
"""Backends that cast weights themselves, one expert at a time."""

ROUNDING_BACKENDS = {"fp8_emulated", "fp8"}
"""Backends that round operands to 8 bits. They do not agree with `loop`, and nobody gets one without asking for it."""

STRENGTHS = {
    "grouped": "no padding and no host synchronization",
    "sliced": "on a CPU as fast as any, with the least memory",
}


def backend_for(rows: Tensor, hidden_dim: int, backend: BackendName, activation: Activation) -> BackendName:
    """What runs for rows (R, D), also under vmap. A backend asked for by name that gives way is logged once.

    Raises:
        ValueError: under vmap, which can map one backend only, another is asked for, or that one cannot run here; or
            "fp8" is asked for where it cannot run.
    """
    sizes = (rows.device, rows.dtype, rows.size(1), hidden_dim)
    if not torch.compiler.is_compiling() and is_batched(rows):
        obstacle = find_obstacle("grouped", *sizes)
        if backend not in ("auto", "grouped") or obstacle is not None:
            raise ValueError(
                f"backend={backend!r}: under vmap it must be auto or grouped, as the others ask for numbers of rows"
                + (f"; and {obstacle}" if obstacle else "")
            )
        return "grouped"
    if backend == "fp8" and (obstacle := find_obstacle(backend, *sizes)):
        raise ValueError(f"backend='fp8': {obstacle}; it must be fp8_emulated, which rounds alike on any device")
    name, reason = choose_backend(*sizes, backend, activation if torch.is_grad_enabled() else None)
    if backend not in ("auto", name) and not torch.compiler.is_compiling():
        warn_once(f"backend={backend!r} gives way to {name!r}: {reason}")
    return name


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    hidden_dim: int,
    backend: BackendName = "auto",
    activation: Activation | None = None,
) -> tuple[BackendName, str]:
    """What really runs for rows of this dtype when `backend` is asked for, and why: (name, reason).

    A backend that cannot do it gives way to the next one, and the reason says what was in the way. Instead of "fp8"
    nothing else runs, as all others compute something else.

    Args:
        activation: with gradients, some backends cannot run one that has parameters or draws random numbers.
    """
    if torch.compiler.is_compiling() or device.type != "cpu":
        candidates: list[BackendName] = ["grouped", "loop" if torch.compiler.is_exporting() else "padded"]
    else:
        candidates = ["sliced", "grouped", "loop"]
    if backend != "auto":
        candidates = ["fp8"] if backend == "fp8" else [backend, *candidates]
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
    activation: Activation | None = None,
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
    if backend == "fp8" and (obstacle := cannot_run_fp8(device, dtype, dim, hidden_dim)):
        return obstacle
    if backend != "loop" and differentiates_forward():
        return f"{backend} has no forward-mode derivatives"
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
