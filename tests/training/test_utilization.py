"""Peaks of GPUs by name and precision."""

import pytest
import torch

from moesaic.training.config import Precision
from moesaic.training.utilization import dense_peak, peak_of_device


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979e12),
        ("NVIDIA H200", "bf16-true", 989e12),
        ("NVIDIA H200", "fp8", 1979e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-PCIE-40GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),  # it has no FP8
        ("NVIDIA H200", "32-true", None),  # TF32 or not, nobody knows
        ("NVIDIA H100 PCIe", "bf16-mixed", None),  # slower than SXM
        ("NVIDIA H200 NVL", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16-mixed", None),
        ("NVIDIA GH200 480GB", "bf16-mixed", None),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", None),
    ],
)
def test_dense_peak(name: str, precision: Precision, peak: float | None) -> None:
    assert dense_peak(name, precision) == peak


def test_a_cpu_has_none() -> None:
    assert peak_of_device(torch.device("cpu"), "fp8") is None
