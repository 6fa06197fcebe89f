"""The pinned corpus: the same text everywhere, or a refusal that says what differs."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from moesaic.data.pinned import PINNED, Pin, load_pinned, read_package
from moesaic.errors import InputError

ROOT = Path(__file__).parents[2]
TEXT = "def number_{}():\n    return 'a text that is longer than sixty-four bytes, number {}'\n"


def install(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Lay a package out as pip does."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def files_of(name: str, count: int = 12) -> dict[str, str]:
    return {f"{name}/part_{i}.py": TEXT.format(i, name) for i in range(count)}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    install(tmp_path / "site", "one", "1.0", files_of("one"))
    install(tmp_path / "site", "two", "2.5+cpu", files_of("two"))
    return tmp_path / "site"


def pins_of(site: Path) -> dict[str, Pin]:
    found = {}
    for name in ("one", "two"):
        _, version, digest = read_package(name, Counter(), [str(site)])
        assert version is not None
        found[name] = Pin(version, digest)
    return found


def test_another_package_and_generated_files_change_nothing(site: Path) -> None:
    pins = pins_of(site)
    before = load_pinned(0.2, pins, [str(site)]).facts()
    install(site, "extra", "3", files_of("extra"))
    for file in ("one/version.py", "one/tests/test_it.py", "one/generated/table.py"):
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).write_text(TEXT.format(99, file))
        with (site / "one-1.0.dist-info/RECORD").open("a") as record:
            record.write(f"{file},,\n")
    assert load_pinned(0.2, pins, [str(site)]).facts() == before
    assert before["train_files"] + before["validation_files"] == 24
    assert pins["two"].version == "2.5", "what follows a + is the build"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "1.1"}, r"one 1\.0; must be 1\.1"),
        ({"sha256": "0" * 64}, r"one 1\.0 has the content [0-9a-f]{16}; must be 0{16}"),
    ],
)
def test_another_version_or_content_is_refused(site: Path, change: dict[str, str], said: str) -> None:
    pins = pins_of(site)
    pins["one"] = dataclasses.replace(pins["one"], **change)
    with pytest.raises(InputError, match=rf"data\.source='pinned': {said}"):
        load_pinned(0.2, pins, [str(site)])


def test_changed_text_and_a_missing_package_are_refused(site: Path) -> None:
    pins = pins_of(site)
    (site / "one/part_3.py").write_text(TEXT.format(3, "changed"))
    with pytest.raises(InputError, match=r"one 1\.0 has the content"):
        load_pinned(0.2, pins, [str(site)])
    with pytest.raises(InputError, match="three is missing; must be 1"):
        load_pinned(0.2, {"three": Pin("1", "")}, [str(site)])


def test_the_pins_are_what_constraints_say() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    assert {name: pin.version for name, pin in PINNED.items()} == {name: versions.get(name) for name in PINNED}
    assert all(re.fullmatch("[0-9a-f]{64}", pin.sha256) for pin in PINNED.values())


@pytest.mark.slow
def test_the_installed_packages_are_the_pinned_ones() -> None:
    assert load_pinned(0.03).facts()["train_bytes"] > 9e7
