"""Which devices there are."""

import torch

from moesaic.errors import InputError

__all__ = ["require_accelerator"]


def require_accelerator(key: str, accelerator: str) -> None:
    """Raise InputError that names `key` if this machine does not have the accelerator that was asked for."""
    if accelerator not in ("auto", "cpu", "gpu", "mps"):
        raise InputError(f"{key}={accelerator!r}: must be one of auto, cpu, gpu, mps")
    found = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(accelerator, True):
        raise InputError(
            f"{key}={accelerator!r}: torch {torch.__version__} finds none on this machine; must be auto or cpu"
        )
