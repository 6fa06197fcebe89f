"""Names in Python modules, given by dotted path in a config or on a command line."""

import importlib
from typing import Any

from moesaic.errors import InputError

__all__ = ["resolve"]


def resolve(path: str, where: str) -> Any:
    """Import what `package.module.name` or `package.module:name` stands for.

    Args:
        where: the key or argument that gives the path, for the message.

    Raises:
        InputError: nothing can be imported under this path.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{where}: {path!r} cannot be imported ({error}); it must be package.module.name, importable from here"
        ) from error
