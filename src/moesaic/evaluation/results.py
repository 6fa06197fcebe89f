"""Results of a long evaluation in a file, from which a stopped one goes on."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.config import require_same
from moesaic.data.shards import ShardedIds
from moesaic.errors import InputError
from moesaic.files import make_folder, write_atomically
from moesaic.reading import is_number, read_json, reading, require_finite

__all__ = ["ResultFile", "digest", "is_numbers"]

Ids = npt.NDArray[np.integer[Any]]


class ResultFile:
    """Results as far as they have come, in one JSON file that is rewritten atomically.

    An evaluation that was stopped goes on from it; one of another identity is refused and the file left as it is.

    The picture made from it has its name: where one stands alone, the folder is somebody else's.

    Args:
        path: the file; its folder is made.
        identity: what has to be equal for results to belong together.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.done: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        make_folder(path.parent, "output")
        if not path.exists():
            if (picture := path.with_suffix(".png")).exists():
                raise InputError(
                    f"{picture}: would be overwritten, and {path.name} is not beside it; choose another output"
                )
            self.save()  # whose folder this is has to be known before the first result
        self._read()

    def _read(self) -> None:
        try:
            stored = read_json(self.path)
            require_finite(stored, "")  # it is written again, where numbers must be finite
            old, done, summary = dict(stored["identity"]), dict(stored["done"]), dict(stored["summary"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: not a result file of this evaluation; choose another output") from error
        require_same(f"{self.path}: results of another evaluation, choose another output", old, self.identity)
        self.done, self.summary = done, summary

    def rows(self, name: str, is_whole: Callable[[Any], bool]) -> list[Any]:
        """What there is of a variant, to be appended to.

        Raises:
            InputError: it is not what this evaluation writes.
        """
        rows = self.done.get(name, [])
        with reading(self.path):
            if not is_whole(rows):
                raise InputError(f"{self.path}: done.{name}: damaged; choose another output, or delete the file")
        self.done[name] = rows
        return rows

    def save(self) -> None:
        """Write the file."""
        found = {"identity": self.identity, "summary": self.summary, "done": self.done}
        write_atomically(self.path, json.dumps(found, allow_nan=False) + "\n")


def is_numbers(row: Any, count: int) -> bool:
    """Whether this, read from JSON, is a list of so many finite numbers."""
    return isinstance(row, list) and len(row) == count and all(map(is_number, row))


def digest(tokens: Ids | ShardedIds) -> str:
    """What identifies some text for `ResultFile`."""
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()[:16]  # type: ignore[arg-type]
