"""What a comparison has decided, kept in comparison.json."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from moesaic.comparison.request import Request
from moesaic.config import require_same
from moesaic.errors import InputError
from moesaic.files import write_atomically, write_json, writing
from moesaic.models import DecoderConfig
from moesaic.models.custom import sources, with_packages
from moesaic.reading import read_json, reading
from moesaic.studies.jobs import canonical, read_row

__all__ = ["Decided"]

FORMAT = 1

REPLACED = "replaced.jsonl"
"""Rows of arms whose code has changed since."""

SECTIONS = ("checks", "fair", "plan")


class Decided:
    """What was decided, so that the next start goes on with it, also on another machine.

    Of a new arm whose code has changed since, all but the length of the runs is decided again, and its rows are put
    aside: no rows of two codes meet.

    Args:
        models: by the names of the arms.

    Raises:
        InputError: the directory holds another comparison, or a damaged one.
    """

    def __init__(self, request: Request, models: Mapping[str, DecoderConfig]) -> None:
        self.renewed: dict[str, int] = {}
        """By name of the new arms whose code has changed, how many rows were put aside."""
        self.path = request.directory / "comparison.json"
        settings: dict[str, Any] = {"equal": request.equal, "baseline": request.baseline.name}
        settings |= {"budget": request.budget, "rates": None if request.rates is None else list(request.rates)}
        if request.handed:
            settings["handed_in"] = dict(request.handed)
        arms = {arm.name: canonical(arm.config) for arm in request.arms}
        wanted = {"format": FORMAT, "settings": settings, "arms": arms}
        if not self.path.exists():
            self.stored: dict[str, Any] = {**wanted, **{section: {} for section in SECTIONS}}
            self._keep_sources(request.directory / "parts", models)
            return
        with reading(self.path):
            self.stored = read_json(self.path)
            if self.stored.pop("digest", None) != _digest(self.stored):
                raise InputError("its content has not its digest; put it back, or remove it to decide again")
            for section in SECTIONS:
                self.stored[section].keys()
            found = {key: self.stored[key] for key in wanted}
        changed = [arm.name for arm in request.new if _differs_in_code(found["arms"].get(arm.name), arms[arm.name])]
        found["arms"] = {**found["arms"], **{name: arms[name] for name in changed}}
        advice = "nothing was changed; choose another results_dir, or put it back"
        require_same(f"{self.path}: another comparison, {advice}", found, wanted)
        if changed:
            self.renewed = _put_aside(request.directory, changed)
            self._keep_sources(request.directory / "parts", models)
            self.stored["arms"] = arms
            for section in ("checks", "fair"):
                self.stored[section] = {key: each for key, each in self.stored[section].items() if key not in changed}
            self._write()

    def get(self, section: str, name: str, make: Callable[[], Any]) -> Any:
        """What was decided under a name; `make` decides it, once."""
        if name not in self.stored[section]:
            self.stored[section][name] = make()
            self._write()
        return self.stored[section][name]

    def forget(self, section: str, name: str) -> None:
        """Let it be decided again."""
        del self.stored[section][name]

    def _write(self) -> None:
        write_json(self.path, {**self.stored, "digest": _digest(self.stored)})

    def _keep_sources(self, folder: Path, models: Mapping[str, DecoderConfig]) -> None:
        """Copy the code of custom parts, for whoever gets the directory."""
        for model in models.values():
            for source in sources(model).values():
                for module, file in with_packages(source.files).items():
                    name = Path(*module.split("."))
                    place = folder / (name / "__init__.py" if file.name == "__init__.py" else name.with_suffix(".py"))
                    with writing(place):
                        place.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, place)


def _differs_in_code(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Whether two arms have other hashes of the same source files, and nothing else is other."""
    if found is None or found.keys() != wanted.keys():
        return False
    other = [key for key in wanted if found[key] != wanted[key]]
    return bool(other) and all(key.startswith("sources.") for key in other)


def _put_aside(directory: Path, arms: Collection[str]) -> dict[str, int]:
    """Move the rows of some arms into a file of their own; returns how many of each."""
    path, aside = directory / "rows.jsonl", directory / REPLACED
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        of_arm = [read_row(line)["arm"] for line in lines]
    moved = [line for line, arm in zip(lines, of_arm, strict=True) if arm in arms]
    if moved:
        with reading(aside):
            before = aside.read_text(encoding="utf-8") if aside.exists() else ""
        write_atomically(aside, before + "".join(f"{line}\n" for line in moved))
        if left := [line for line, arm in zip(lines, of_arm, strict=True) if arm not in arms]:
            write_atomically(path, "".join(f"{line}\n" for line in left))
        else:
            path.unlink()
    return {arm: of_arm.count(arm) for arm in arms}


def _digest(stored: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
