"""Moesaic: a mixture-of-experts architecture sandbox. Start with `moesaic.layers` or docs/architecture.md."""

import os
import sys

if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109 (pathlib would be imported from there)
    del sys.path[0]  # python -m puts the working directory first, where a file can stand in for any module

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.comparison.python import compare

__all__ = ["__version__", "compare"]

try:
    __version__ = version("moesaic")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "compare":  # it needs moesaic[train], which the layers do not
        from moesaic.comparison.python import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
