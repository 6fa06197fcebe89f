"""What accelerators can do, by the numbers that their makers publish."""

import dataclasses
from collections.abc import Mapping

__all__ = ["HARDWARE", "Hardware"]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One accelerator. Rates are per second."""

    memory: float
    """Bytes."""
    peaks: Mapping[str, float]
    """FLOPs of dense matmuls, without sparsity, by format: "fp64", "fp32", "bf16", "fp8"."""
    nvlink: float
    """Bytes that it can receive from the others of its node. It can send as many at the same time."""
    network: float
    """Bytes that it can receive from other nodes, by the network card that is its own."""
    source: str


_HOPPER = {"fp64": 67e12, "fp32": 67e12, "bf16": 989e12, "fp8": 1979e12}

HARDWARE = {
    "a100": Hardware(
        memory=80e9,
        peaks={"fp64": 19.5e12, "fp32": 19.5e12, "bf16": 312e12},
        nvlink=300e9,
        network=25e9,
        source="data sheets of A100 80GB SXM and DGX A100 (InfiniBand HDR, 200 Gb/s per GPU)",
    ),
    "h100": Hardware(
        memory=80e9,
        peaks=_HOPPER,
        nvlink=450e9,
        network=50e9,
        source="data sheets of H100 SXM and DGX H100 (InfiniBand NDR, 400 Gb/s per GPU)",
    ),
    "h200": Hardware(
        memory=141e9,
        peaks=_HOPPER,
        nvlink=450e9,
        network=50e9,
        source="data sheets of H200 SXM and DGX H200 (InfiniBand NDR, 400 Gb/s per GPU)",
    ),
    "b200": Hardware(
        memory=180e9,
        peaks={"bf16": 2250e12, "fp8": 4500e12},
        nvlink=900e9,
        network=50e9,
        source="data sheet of DGX B200 (InfiniBand NDR, 400 Gb/s per GPU)",
    ),
}
"""From NVIDIA's data sheets. They say NVLink's bandwidth for both directions together; here is half of it. fp32 is
without TF32."""
