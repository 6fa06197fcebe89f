"""What is in a checkpoint of several processes, a directory, and whether all of it is there.

manifest.json   each file with its size and hash, and where each part of each tensor is
content.ckpt    everything else of the checkpoint; what is sharded stands there as a tensor without numbers
__R_0.distcp    the parts that rank R held, as torch.distributed.checkpoint writes them
.metadata       torch's own list of them, for tools of others: a pickle, which nothing here opens
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.config import from_mapping, require, to_mapping
from moesaic.errors import InputError
from moesaic.reading import read_json, reading, require_file

__all__ = [
    "CONTENT",
    "MANIFEST",
    "File",
    "Manifest",
    "Part",
    "Stored",
    "dtype_name",
    "is_sharded_checkpoint",
    "map_tensors",
    "read_manifest",
    "require_listed",
]

CONTENT = "content.ckpt"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class File:
    """A file beside the manifest."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        """The file that is there."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of a tensor, and its place in a file, in bytes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    at: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in parts."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        volume = 0
        for part in self.parts:
            corners = zip(part.offset, part.shape, self.shape, strict=True)
            if not all(first >= 0 < size and first + size <= whole for first, size, whole in corners):
                raise ValueError(f"parts: {list(part.shape)} at {list(part.offset)} is not within {list(self.shape)}")
            volume += math.prod(part.shape)
        if volume != math.prod(self.shape) or len({part.offset for part in self.parts}) < len(self.parts):
            raise ValueError(f"parts: they must be all of {list(self.shape)}, once")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in which file."""

    files: dict[str, File]
    tensors: dict[str, Stored]
    """By dotted key, such as state_dict.decoder.head.weight."""
    digest: str = ""
    """sha256 of everything else in it."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        require(self, "format", self.format == FORMAT, f"{FORMAT}; a newer version of moesaic may have written it")
        for name in self.files:
            if name in ("", ".", "..") or not set(name).isdisjoint("/\\\0"):
                raise ValueError(f"files: {name!r} must be a name in the same folder")
        for key, tensor in self.tensors.items():
            for part in tensor.parts:
                file = self.files.get(part.file)
                if file is None or part.at < 0 or part.bytes < 0 or part.at + part.bytes > file.bytes:
                    raise ValueError(f"tensors.{key}: a part is not within a file that is listed")

    def signed(self) -> "Manifest":
        """The same with its digest."""
        plain = to_mapping(dataclasses.replace(self, digest=""))
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        return dataclasses.replace(self, digest=digest)


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether this is a directory of the kind that is described here, be it whole or not."""
    path = Path(path)
    return path.is_dir() and ((path / CONTENT).exists() or any(path.glob("*.distcp")))


def read_manifest(directory: Path, checked: bool = True) -> Manifest:
    """The manifest of a checkpoint, whose files are all there and have their sizes.

    Args:
        checked: whether they are read, to compare their hashes too.

    Raises:
        InputError: it names the file that is missing, cut short or damaged.
    """
    path = directory / MANIFEST
    values = read_json(path)
    with reading(path):
        manifest = from_mapping(Manifest, values)
        if manifest != manifest.signed():
            raise InputError("damaged, its digest is that of another content; take a copy of it")
    for name, file in manifest.files.items():
        with reading(directory / name):
            require_file(directory / name)
            if (found := (directory / name).stat().st_size) != file.bytes:
                raise InputError(f"damaged, found {found} bytes; must be {file.bytes}; take a copy of it")
    if checked:
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            list(pool.map(_require_hash, (directory / name for name in manifest.files), manifest.files.values()))
    return manifest


def _require_hash(path: Path, wanted: File) -> None:
    with reading(path):
        found = File.of(path).sha256
        if found != wanted.sha256:
            raise InputError(
                f"damaged, its sha256 is {found[:12]} and the manifest says {wanted.sha256[:12]}; take a copy of it"
            )


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], key: str = "") -> Any:
    """Mappings and lists with `change(dotted key, tensor)` in place of each tensor."""
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change, f"{key}.{name}" if key else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, change, f"{key}.{i}") for i, item in enumerate(value)]
    return change(key, value) if isinstance(value, Tensor) else value


def require_listed(content: Mapping[str, Any], manifest: Manifest) -> dict[str, Tensor]:
    """The tensors without numbers in a content, by dotted key: those whose parts the manifest lists, and no others.

    Raises:
        InputError: it names one that only one side has, or that is of another shape or type there.
    """
    found: dict[str, Tensor] = {}
    map_tensors(content, lambda key, tensor: found.update({key: tensor}) if tensor.is_meta else None)
    for key in sorted(found.keys() | manifest.tensors.keys()):
        tensor, stored = found.get(key), manifest.tensors.get(key)
        here = None if tensor is None else (dtype_name(tensor.dtype), tuple(tensor.shape))
        there = None if stored is None else (stored.dtype, stored.shape)
        if here != there:
            told = [f"{each or 'absent'} in {name}" for each, name in ((here, CONTENT), (there, MANIFEST))]
            raise InputError(f"{key}: {', '.join(told)}; must be equal")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The attribute of torch that a dtype is."""
    return str(dtype).removeprefix("torch.")
