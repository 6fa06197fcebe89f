"""The one exception for bad input: commands print it without a traceback."""

import contextlib
from collections.abc import Iterator

__all__ = ["InputError", "naming"]


class InputError(ValueError):
    """What a person gave (config key, file, checkpoint, shape) cannot be used.

    The message names the key or file, says what was found and what is allowed.
    """


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what`, such as a config key, in front of what is refused within."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
