"""The exceptions that people see: commands print them without a traceback."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DISK_ERRORS", "CannotWrite", "InputError", "UnknownKey", "naming"]

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Numbers of the system's errors about a full, read-only or failing disk."""


class InputError(ValueError):
    """What a person gave (config key, file, checkpoint, shape) cannot be used.

    The message names the key or file, says what was found and what is allowed.
    """


class CannotWrite(InputError):
    """A file could not be written: a full or read-only disk, missing rights. What was there before is intact."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        self.path, self.error = path, error
        reason = error.strerror or (os.strerror(error.errno) if error.errno else "no space left on the device?")
        super().__init__(
            f"{path}: cannot be written ({reason}); what was there is intact. Make room or choose another place, then "
            "repeat the command"
        )

    def __reduce__(self) -> tuple[type["CannotWrite"], tuple[Path | str, OSError]]:
        return CannotWrite, (self.path, self.error)  # it may cross from another process


class UnknownKey(InputError):
    """A key that this version does not know; in a file, a newer version may have written it."""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what`, such as a config key, in front of what is refused within."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{what}: {error}") from error
