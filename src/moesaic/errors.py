"""The one exception for bad input: commands print it without a traceback."""

import contextlib
from collections.abc import Iterator

__all__ = ["InputError", "UnknownKey", "naming"]


class InputError(ValueError):
    """What a person gave (config key, file, checkpoint, shape) cannot be used.

    The message names the key or file, says what was found and what is allowed.
    """


class UnknownKey(InputError):
    """A key that this version does not know; in a file, a newer version may have written it."""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what`, such as a config key, in front of what is refused within."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{what}: {error}") from error
