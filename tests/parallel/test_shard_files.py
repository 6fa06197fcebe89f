"""Checkpoints that several ranks write: what is in them, on any layout; damage; and a rank that dies while writing."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from moesaic.checkpoints import load_checkpoint, load_model, save_model
from moesaic.cli.convert import convert
from moesaic.config import to_mapping
from moesaic.errors import CannotWrite, InputError
from moesaic.evaluation.checkpoint_evaluations import checkpoint_digest
from moesaic.files import old_of, partial_of, remove_partials, standing, take_place
from moesaic.models import Decoder, build_decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.manifest import read_manifest
from moesaic.parallel.workers import Workers
from moesaic.training.parallel_check import MODELS

MODEL = MODELS["few experts, odd width, convolutions"]


def spread(expert: int, seed: int = 0) -> tuple[Decoder, dict[str, Tensor]]:
    """A decoder that is laid out over the ranks, and the weights that it has."""
    from moesaic.parallel.apply import parallelize

    torch.manual_seed(seed)
    decoder = build_decoder(MODEL, dtype=torch.float64)
    weights = {name: value.clone() for name, value in decoder.state_dict().items()}
    parallelize(decoder, ParallelConfig(expert=expert), torch.device("cpu"))
    return decoder, weights


def write(path: Path, expert: int, seed: int = 0) -> dict[str, Tensor]:
    """Write a checkpoint from all ranks; returns its weights."""
    from moesaic.parallel.shard_files import write_directory

    decoder, weights = spread(expert, seed)
    content = {
        "state_dict": {f"decoder.{name}": value for name, value in decoder.state_dict().items()},
        "hyper_parameters": {
            "config": {"name": "it", "data": {}, "training": {"seq_len": 8}},
            "model": to_mapping(MODEL),
            "tokenizer": None,
            "token_bytes": None,
        },
        "moesaic": {"foreign_files": {}, "sources": {}, "seed": seed},
    }
    write_directory(path, content)
    return weights


def read(path: Path, expert: int) -> int:
    """Read the parts of this rank; returns how many numbers they have."""
    from moesaic.parallel.shard_files import read_parts
    from moesaic.parallel.shards import held, is_sharded, shard_like

    decoder, _ = spread(expert, seed=1)
    sharded = {f"state_dict.decoder.{name}": each for name, each in decoder.state_dict().items() if is_sharded(each)}
    for tensor in sharded.values():
        held(tensor).zero_()
    read_parts(path, read_manifest(path, checked=False), sharded)
    stored = load_checkpoint(path)["state_dict"]
    for key, tensor in sharded.items():
        whole = stored[key.removeprefix("state_dict.")]
        assert torch.equal(held(tensor), held(shard_like(whole, tensor))), key
    return sum(held(each).numel() for each in sharded.values())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def good(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "it.ckpt"
    workers.run(write, 4, path, 2)
    return path


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "it.ckpt"))


@pytest.mark.parametrize(
    ("ranks", "expert"),
    [(4, 2), pytest.param(4, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_what_ranks_wrote_is_read_whole_and_in_parts(workers: Workers, tmp_path: Path, ranks: int, expert: int) -> None:
    weights, *_ = workers.run(write, ranks, tmp_path / "it.ckpt", expert)
    found = load_model(tmp_path / "it.ckpt")
    assert found.config == MODEL
    assert found.decoder.state_dict().keys() == weights.keys()
    for name, value in found.decoder.state_dict().items():
        assert torch.equal(value, weights[name]), name
    numbers = sum(value.numel() for name, value in weights.items() if not name.endswith("expert_bias"))
    for others, spread_over in ((4, 1), (2, 2), (2, 1)):
        assert sum(workers.run(read, others, tmp_path / "it.ckpt", spread_over)) == numbers
    assert names(tmp_path) == ["it.ckpt"]


def test_other_commands_read_a_directory_as_a_file(good: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "plain.ckpt", load_model(good).decoder)
    convert(good, tmp_path / "whole.ckpt")
    plain, whole = load_checkpoint(tmp_path / "plain.ckpt"), load_checkpoint(tmp_path / "whole.ckpt")
    for name, weight in plain["state_dict"].items():
        assert torch.equal(whole["state_dict"][name], weight), name
    assert whole["moesaic"]["seed"] == 0, "all that was in the directory is in the file"
    assert checkpoint_digest(good) != checkpoint_digest(tmp_path / "plain.ckpt")
    with pytest.raises(InputError, match=r"^dtype=torch\.float32: must be null where"):
        convert(good, tmp_path / "other.ckpt", torch.float32)


def test_tools_of_torch_read_it_too(good: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(good, tmp_path / "x.pt")
    content, weights = torch.load(tmp_path / "x.pt", weights_only=True), load_checkpoint(good)["state_dict"]
    flat = {".".join(map(str, key)): value for key, value in _flat(content)}
    assert torch.equal(flat["state_dict.decoder.embedding.weight"], weights["decoder.embedding.weight"])


def _flat(value: Any, key: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        return [each for name, item in value.items() for each in _flat(item, (*key, name))]
    return [(key, value)]


# ---- damage


FILES = ("manifest.json", "content.ckpt", ".metadata", *(f"__{rank}_0.distcp" for rank in range(4)))


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [missing, truncated, flipped, a_folder])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(copied: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(copied / name)
    with pytest.raises(InputError) as caught:
        load_model(copied)
    assert str(copied / name) in str(caught.value) and "\n" not in str(caught.value)
    if damage is not flipped or name == "manifest.json":
        with pytest.raises(InputError, match=name):
            load_checkpoint(copied, whole=False, checked=False)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Forge a manifest whose digest is right."""
    from moesaic.config import from_mapping
    from moesaic.parallel.manifest import Manifest

    content = json.loads((path / "manifest.json").read_text())
    change(content)
    content["digest"] = ""
    with contextlib.suppress(InputError):  # it says so without a digest
        content = to_mapping(from_mapping(Manifest, content).signed())
    (path / "manifest.json").write_text(json.dumps(content))


EXPERTS = "state_dict.decoder.layers.0.ffn.experts.down_proj"


def lose_an_expert(content: dict[str, Any]) -> None:
    content["tensors"][EXPERTS]["parts"].pop()


def lose_all_experts(content: dict[str, Any]) -> None:
    del content["tensors"][EXPERTS]


def prune(content: dict[str, Any]) -> None:
    """Half of the experts, with a shape to match."""
    stored = content["tensors"][EXPERTS]
    half = stored["shape"][0] // 2
    stored["parts"] = [each for each in stored["parts"] if each["offset"][0] < half]
    stored["shape"][0] = half


def repeat(content: dict[str, Any]) -> None:
    first, *others = content["tensors"][EXPERTS]["parts"]
    content["tensors"][EXPERTS]["parts"] = [first, *([first] * len(others))]


def beyond(content: dict[str, Any]) -> None:
    content["tensors"][EXPERTS]["parts"][0]["at"] = 10**9


def elsewhere(content: dict[str, Any]) -> None:
    content["files"]["../x"] = content["files"].pop("content.ckpt")


def newer(content: dict[str, Any]) -> None:
    content["format"] = 2


@pytest.mark.parametrize("change", [lose_an_expert, lose_all_experts, prune, repeat, beyond, elsewhere, newer])
def test_a_manifest_that_lies_is_refused(copied: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(copied, change)
    with pytest.raises(InputError, match=str(copied)) as caught:
        load_checkpoint(copied)
    told: dict[Any, str] = {
        newer: "format=2: must be 1; a newer version",
        elsewhere: "must be a name in the same folder",
    }
    assert told.get(change, EXPERTS) in str(caught.value)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", [".metadata", "content.ckpt", "__1_0.distcp"])
def test_nothing_that_a_strangers_file_names_is_run(copied: Path, tmp_path: Path, name: str) -> None:
    trap = Malicious(tmp_path / "it ran")
    if name == ".metadata":
        (copied / name).write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, copied / name)
    content = (copied / name).read_bytes()

    def same_hash(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for tensor in manifest["tensors"].values():
            for part in tensor["parts"]:
                if part["file"] == name:
                    part |= {"at": 0, "bytes": len(content)}

    rewrite(copied, same_hash)
    if name == ".metadata":
        load_model(copied)  # nobody opens it
    else:
        with pytest.raises(InputError, match=str(copied)):
            load_model(copied)
    assert not trap.target.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.target.exists(), "the trap works"


# ---- what can happen while it is written


def write_where_one_disk_is_full(path: Path, rank: int) -> str:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, before[1]))
    try:
        write(path, 2, seed=1)
    except CannotWrite as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "written"


@pytest.mark.slow_but_for("0")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_told_by_all(workers: Workers, tmp_path: Path, rank: int) -> None:
    path = tmp_path / "it.ckpt"
    workers.run(write, 2, path, 2)
    said = workers.run(write_where_one_disk_is_full, 2, path, rank)
    assert len(set(said)) == 1
    assert said[0].startswith(f"{path}: cannot be written (File too large); what was there is intact")
    assert load_checkpoint(path)["moesaic"]["seed"] == 0
    assert names(tmp_path) == ["it.ckpt"]


def write_where_another_does(path: Path) -> str:
    try:
        write(path, 2)
    except InputError as error:
        return str(error)
    return "written"


def test_two_writers_do_not_meet(workers: Workers, tmp_path: Path) -> None:
    from moesaic.files import lock

    partial_of(tmp_path / "it.ckpt").mkdir()
    with lock(partial_of(tmp_path / "it.ckpt"), "busy"):
        said = workers.run(write_where_another_does, 2, tmp_path / "it.ckpt")
    assert said == [f"{tmp_path / 'it.ckpt'}: another process is writing it"] * 2
    assert workers.run(write_where_another_does, 2, tmp_path / "it.ckpt") == ["written"] * 2


OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def write_and_die(path: Path, rank: int, operation: int) -> int:
    """Write again, and be killed before that operation on a file; returns how many there were."""
    count, mine = 0, distributed.get_rank() == rank
    armed = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if armed and mine and event in OPERATIONS and path.parent.name in str(arguments[0]):
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    try:
        write(path, 2, seed=1)
    finally:
        armed = False
    return count


@pytest.mark.slow_but_for("0.7-1")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", [0.0, pytest.param(None, marks=pytest.mark.slow), 0.7])
def test_a_rank_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, rank: int, place: float | None
) -> None:
    """At one place of the whole, or at each of them."""
    pool, path = Workers(count=2, patience=60), tmp_path / "here" / "it.ckpt"
    try:
        pool.run(write, 2, path, 2)
        count = pool.run(write_and_die, 2, path, rank, -1)[rank]
        assert count > (10 if rank == 0 else 0)
        for operation in range(count) if place is None else [int(place * count)]:
            pool.run(write, 2, path, 2)
            assert names(path.parent) == ["it.ckpt"], "nothing is left over"
            with pytest.raises(RuntimeError, match=f"rank {rank} of 2:\nthe process ended"):
                pool.run(write_and_die, 2, path, rank, operation)
            seed = load_checkpoint(path)["moesaic"]["seed"]
            remove_partials(path.parent)
            assert names(path.parent) == ["it.ckpt"]
            assert load_checkpoint(path)["moesaic"]["seed"] == seed
    finally:
        pool.close()


def test_a_folder_takes_the_place_of_a_file_and_a_file_that_of_a_folder(tmp_path: Path) -> None:
    name, new = tmp_path / "it.ckpt", tmp_path / "new"
    for content in ("a file", "a folder", "a folder", "a file"):
        if content == "a folder":
            new.mkdir()
            (new / "in it").touch()
        else:
            new.touch()
        take_place(new, name)
        assert name.is_dir() == (content == "a folder")
        assert names(tmp_path) == ["it.ckpt"]
    name.rename(old_of(name))  # as a kill between two renames leaves it
    assert standing(name) == old_of(name)
    remove_partials(tmp_path)
    assert standing(name) == name and names(tmp_path) == ["it.ckpt"]
