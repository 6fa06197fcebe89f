"""Tensors of which each rank holds a part, to and from the files of a directory, by torch.distributed.checkpoint."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from moesaic.config import to_mapping
from moesaic.errors import InputError
from moesaic.files import LOCK, partial_of, staging_folder, sync, take_place, write_json, writing
from moesaic.parallel.manifest import CONTENT, MANIFEST, File, Manifest, Part, Stored, dtype_name, map_tensors
from moesaic.parallel.shards import is_sharded
from moesaic.reading import reading

__all__ = ["read_parts", "write_directory"]


def write_directory(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint of plain containers, DTensors among them. Every rank must call it, with the same keys.

    Each rank writes what it holds, into a folder that all of them see. The directory appears whole or not at all.

    Raises:
        CannotWrite: on every rank, if the disk of one is full or read-only.
    """
    shards: dict[str, Tensor] = {}

    def without_numbers(key: str, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor.detach().cpu()
        shards[key] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    rest = map_tensors(content, without_numbers)
    with contextlib.ExitStack() as opened, _first_failure():
        save(shards, storage_writer=_Writer(path, rest, opened))


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raise what went wrong on a rank, rather than torch's collection, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


class _Writer(FileSystemWriter):
    """Torch's files in a folder beside `target`; in the end the first rank adds ours and gives it that name.

    Args:
        rest: what stands beside the tensors.
        opened: holds the folder, and its lock, until the end.
    """

    def __init__(self, target: Path, rest: Mapping[str, Any], opened: contextlib.ExitStack) -> None:
        super().__init__(partial_of(target))
        self.target, self.rest, self.opened = target, rest, opened

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # without the folder, which the first rank is about to make

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """What the first rank does before any of them writes."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.opened.enter_context(staging_folder(self.target))
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """Write the parts of this rank, and hash its files."""
        with writing(self.target):
            results = super().write_data(plan, planner).value()
            names = {result.storage_data.relative_path for result in results}
            written: Future[Any] = Future()
            written.set_result((results, {name: File.of(self._folder / name) for name in names}))
        return written

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """What the first rank does once all have written."""
        with writing(self.target):
            super().finish(metadata, [each for each, _ in results])
            with (self._folder / CONTENT).open("wb") as file:  # a file of ours, whose errors have a reason
                torch.save(self.rest, file)
            sync(self._folder / CONTENT)
            files = {name: File.of(self._folder / name) for name in (CONTENT, ".metadata")}
            for _, hashed in results:
                files |= hashed
            write_json(self._folder / MANIFEST, to_mapping(Manifest(files, _stored(metadata)).signed()))
            (self._folder / LOCK).unlink()
            take_place(self._folder, self.target)

    @property
    def _folder(self) -> Path:
        return partial_of(self.target)


def _stored(metadata: Metadata) -> dict[str, Stored]:
    tensors = {
        key: each for key, each in metadata.state_dict_metadata.items() if isinstance(each, TensorStorageMetadata)
    }
    parts: dict[str, list[Part]] = {key: [] for key in tensors}
    for index, place in metadata.storage_data.items():
        [chunk] = [each for each in tensors[index.fqn].chunks if each.offsets == index.offset]
        if 0 not in chunk.sizes:  # of a rank that holds nothing
            where = place.relative_path, place.offset, place.length
            parts[index.fqn].append(Part(tuple(chunk.offsets), tuple(chunk.sizes), *where))
    return {
        key: Stored(dtype_name(whole.properties.dtype), tuple(whole.size), tuple(parts[key]))
        for key, whole in tensors.items()
    }


def read_parts(directory: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place from a checkpoint. Of a DTensor a rank reads the parts that overlap with what it holds.

    Raises:
        InputError: the checkpoint has none of that name and shape, or a file cannot be read.
    """
    with reading(directory), warnings.catch_warnings(), _first_failure():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # each rank reads for itself
        load(tensors, storage_reader=_Reader(directory, manifest), no_dist=True)


class _Reader(StorageReader):
    """Reads tensors, and nothing else, from where the manifest says: torch's own reader unpickles its .metadata."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.parts = {(key, part.offset): part for key, each in manifest.tensors.items() for part in each.parts}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, each.dtype)),
                    torch.Size(each.shape),
                    [ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape)) for part in each.parts],
                )
                for key, each in self.manifest.tensors.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index = item.storage_index
            part = self.parts[index.fqn, tuple(index.offset or ())]
            with (self.directory / part.file).open("rb") as file:
                file.seek(part.at)
                content = io.BytesIO(file.read(part.bytes))
            tensor = torch.load(content, map_location="cpu", weights_only=True)
            if tuple(tensor.shape) != part.shape:
                raise InputError(f"{part.file}: found {index.fqn} of {list(tensor.shape)}; must be {list(part.shape)}")
            for dim, (first, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                tensor = tensor.narrow(dim, first, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(tensor)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # the rest of torch's protocol has nothing to do

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
