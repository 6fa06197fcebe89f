"""Moesaic: a mixture-of-experts architecture sandbox. Start with `moesaic.layers` or docs/architecture.md."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("moesaic")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
