"""Model FLOPs utilization (MFU): the share of a GPU's peak that a run's active FLOPs are."""

import torch

from moesaic.parallel.hardware import HARDWARE
from moesaic.training.config import Precision

__all__ = ["dense_peak", "peak_of_device"]

NUMBERS = {"bf16-mixed": "bf16", "bf16-true": "bf16", "fp8": "fp8"}
"""What matmuls multiply, by precision."""

NAMES = ("A100", "H100", "H200")
"""As CUDA calls those of `HARDWARE`. H100 and H200 are the SXM ones."""

OTHERS = ("PCIe", "NVL", "MIG")
"""Words in the names of H100 and H200 that have another peak: slower clocks, or a part of a GPU."""


def dense_peak(device_name: str, precision: Precision) -> float | None:
    """The peak in FLOPs per second of a GPU, by the name that CUDA gives it, None if this table does not know it."""
    words = device_name.replace("-", " ").split()
    for name in NAMES:
        if name in words and not ("MIG" in words or (name != "A100" and any(other in words for other in OTHERS))):
            return HARDWARE[name.lower()].peaks.get(NUMBERS.get(precision, ""))
    return None


def peak_of_device(device: torch.device, precision: Precision) -> float | None:
    """`dense_peak` of a device; None on everything but a GPU of CUDA."""
    return dense_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
