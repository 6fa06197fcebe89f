"""A file is whole or as it was, whatever happens while it is written."""

from pathlib import Path

import pytest

from moesaic.files import atomic, write_atomically, write_json, write_yaml


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
