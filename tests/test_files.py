"""A file is whole or as it was, whatever happens while it is written."""

from pathlib import Path

import pytest
import torch

from moesaic.checkpoints import write_checkpoint
from moesaic.errors import CannotWrite, InputError
from moesaic.files import atomic, require_disk_space, write_atomically, write_json, write_yaml


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with atomic(path) as partial:
        partial.write_bytes(b"abc")
        assert not path.exists()
        assert partial.parent == tmp_path
    assert path.read_bytes() == b"abc"
    assert [found.name for found in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_it_is_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def fail() -> None:
        with atomic(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_kill_left_behind_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic(path) as partial:
        left = partial
        partial.write_text("first")
    left.write_text("half of what a killed process wrote")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert not left.exists()


def test_numbers_and_mappings(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1]})
    write_yaml(tmp_path / "a.yaml", {"b": [1], "a": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ]\n}\n'
    assert (tmp_path / "a.yaml").read_text() == "b:\n- 1\na: null\n"


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    (tmp_path / ".file.txt.partial").symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match=r"file.txt: cannot be written \(No space left on device\)"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_torch_hides_the_reason_of_a_failed_write_but_it_is_found(tmp_path: Path) -> None:
    (tmp_path / ".model.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(CannotWrite, match=r"model.ckpt: cannot be written \(No space left on device\)"):
        write_checkpoint(tmp_path / "model.ckpt", {"weights": torch.zeros(100_000)})
    assert not list(tmp_path.iterdir())


def test_room_is_looked_for_where_a_directory_will_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="MB free"):
        require_disk_space(tmp_path / "not" / "there" / "yet", 10**18)
    assert not list(tmp_path.iterdir())
