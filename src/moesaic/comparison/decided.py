"""What a comparison has decided, kept in comparison.json."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesaic.comparison.request import Request
from moesaic.config import require_same
from moesaic.errors import InputError
from moesaic.files import write_json
from moesaic.models import DecoderConfig
from moesaic.models.custom import sources, with_packages
from moesaic.reading import read_json, reading
from moesaic.studies.jobs import canonical

__all__ = ["Decided"]

FORMAT = 1

SECTIONS = ("checks", "fair", "plan")


class Decided:
    """What was decided, so that the next start goes on with it, also on another machine.

    Args:
        models: by the names of the arms.

    Raises:
        InputError: the directory holds another comparison, or a damaged one.
    """

    def __init__(self, request: Request, models: Mapping[str, DecoderConfig]) -> None:
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
            digest = self.stored.pop("digest", None)
            if digest is not None and digest != _digest(self.stored):
                raise InputError("its content has not its digest; put it back, or remove it to decide again")
            for section in SECTIONS:
                self.stored[section].keys()
            found = {key: self.stored[key] for key in wanted}
        advice = "nothing was changed; choose another results_dir, or put it back"
        require_same(f"{self.path}: another comparison, {advice}", found, wanted)

    def get(self, section: str, name: str, make: Callable[[], Any]) -> Any:
        """What was decided under a name; `make` decides it, once."""
        if name not in self.stored[section]:
            self.stored[section][name] = make()
            write_json(self.path, {**self.stored, "digest": _digest(self.stored)})
        return self.stored[section][name]

    def forget(self, section: str, name: str) -> None:
        """Let it be decided again."""
        del self.stored[section][name]

    def _keep_sources(self, folder: Path, models: Mapping[str, DecoderConfig]) -> None:
        """Copy the code of custom parts, for whoever gets the directory."""
        for model in models.values():
            for source in sources(model).values():
                for module, file in with_packages(source.files).items():
                    name = Path(*module.split("."))
                    place = folder / (name / "__init__.py" if file.name == "__init__.py" else name.with_suffix(".py"))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, place)


def _digest(stored: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
