"""The exceptions that people see: commands print them without a traceback."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DISK_ERRORS", "CannotWrite", "InputError", "LostProcess", "UnknownKey", "naming", "reason", "require_short"]

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
        super().__init__(
            f"{path}: cannot be written ({reason(error)}); what was there is intact. Make room or choose another "
            "place, then repeat the command"
        )

    def __reduce__(self) -> tuple[type["CannotWrite"], tuple[Path | str, OSError]]:
        return CannotWrite, (self.path, self.error)  # it may cross from another process


class LostProcess(RuntimeError):
    """Another process of a run ended without a word, killed or with its machine, so this one cannot go on."""


def reason(error: OSError) -> str:
    """Say why the system refused a file; of a name that is too long, how long it may be."""
    if error.errno == errno.ENAMETOOLONG and isinstance(error.filename, str | bytes):
        try:
            require_short(os.fsdecode(error.filename))
        except InputError as found:
            return str(found)
    return error.strerror or (os.strerror(error.errno) if error.errno else "no space left on the device?")


def require_short(path: str) -> None:
    """Raise InputError for a path, or a name in it, that is longer than a file system takes."""
    names = [len(os.fsencode(name)) for name in Path(path).parts]
    for what, found in (("name", max(names, default=0)), ("path", len(os.fsencode(path)))):
        limit = os.pathconf("/", f"PC_{what.upper()}_MAX") if hasattr(os, "pathconf") else 255
        if found > limit:
            raise InputError(f"a {what} of {found} bytes; must be at most {limit}, the limit of the file system")


class UnknownKey(InputError):
    """A key that this version does not know; in a file, a newer version may have written it."""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Put `what`, such as a config key, in front of what is refused within."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{what}: {error}") from error
