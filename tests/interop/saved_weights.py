"""Tensors of safetensors files, and whether they have the same bits."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["assert_same_weights", "weights"]


def weights(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
