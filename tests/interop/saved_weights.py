"""Directories of transformers: written, edited, and whether their tensors have the same bits."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["assert_same_weights", "edit_config", "save", "weights"]


def save(model: Any, directory: Path, shard: str = "20KB", **options: Any) -> Path:
    """Write a model in shards of that size; returns the directory."""
    model.save_pretrained(directory, max_shard_size=shard, **options)
    return directory


def edit_config(directory: Path, part: str | None = None, /, **changes: Any) -> None:
    """Change keys of its config.json, or of a section there; `...` takes one out."""
    path = directory / "config.json"
    whole = json.loads(path.read_text())
    config = whole if part is None else whole[part]
    for key, value in changes.items():
        config.pop(key, None) if value is ... else config.update({key: value})
    path.write_text(json.dumps(whole))


def weights(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
