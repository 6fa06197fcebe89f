"""Evaluation on another text: an installed package at the version that its hash names."""

from pathlib import Path
from typing import Any

import pytest

from moesaic.checkpoints import load_model
from moesaic.errors import InputError
from moesaic.evaluation.other_text import documents_of, other_text_evaluation

SIZES = {"training": {"seq_len": 32, "validation_seq_len": None, "batch_size": 2}}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of two files that cannot be imported: it is only read."""
    folder = tmp_path / "strange_words_to_read"
    (folder / "below").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "below" / "words.py").write_text("".join(f"the {i}th of many words\n" for i in range(60)))
    (folder / "notes.txt").write_text("not a source")
    monkeypatch.syspath_prepend(tmp_path)
    return folder.name


def options(package: str, **changes: Any) -> dict[str, Any]:
    return {"other_text": {"words": {"package": package, "sha256": documents_of(package)[1], **changes}}}


@pytest.mark.slow
def test_bits_per_byte_of_another_text(trained: Path, package: str) -> None:
    documents, _ = documents_of(package)
    assert [document.name for document in documents] == ["__init__.py", "below/words.py"]
    found = other_text_evaluation(trained, SIZES, options(package))
    assert set(found) == {"other_text/words/bits_per_byte"}
    model = load_model(trained)
    assert model.tokenizer is not None
    tokens = sum(len(model.tokenizer.encode(document.text)) + 1 for document in documents) - 1
    size = sum(len(document.text) for document in documents)
    uniform = tokens * model.config.vocab_size.bit_length() / size
    assert 0 < found["other_text/words/bits_per_byte"] < 2 * uniform
    assert found == other_text_evaluation(trained, SIZES, options(package))
    few = other_text_evaluation(trained, SIZES, options(package, windows=3))
    assert few != found


def test_another_version_is_refused(trained: Path, package: str, tmp_path: Path) -> None:
    wanted = options(package)
    (tmp_path / package / "below" / "words.py").write_text("other words " * 30)
    with pytest.raises(InputError, match=r"other_text\.words: package='strange_.*: its content hash is .*; must be"):
        other_text_evaluation(trained, SIZES, wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"evaluation_options\.other_text: missing; must be"),
        ({"a": {"package": "no_such_package_here", "sha256": ""}}, r"other_text\.a: package='no_such.*: not installed"),
        ({"a": {"package": "os.path", "sha256": ""}}, r"other_text\.a\.package='os\.path': must be the name"),
        ({"a": {"package": "json"}}, r"other_text\.a\.sha256"),
        ({"a": {"package": "json", "sha256": "", "windows": 0}}, r"other_text\.a\.windows=0: must be"),
    ],
)
def test_bad_options_are_named(trained: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        other_text_evaluation(trained, SIZES, {"other_text": given})
