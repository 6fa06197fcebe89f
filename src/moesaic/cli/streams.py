"""Standard output and error that end nothing: neither a closed pipe, a full disk, nor a letter they cannot show."""

import errno
import io
import os
import sys
from typing import IO, TextIO

__all__ = ["keep_going"]


class _Surviving(io.FileIO):
    """A file descriptor whose first failed write sends all that follows to nowhere, also that of child processes."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno != errno.EPIPE and self.fileno() == 1:  # whoever closes a pipe knows it
                print(f"warning: standard output: {error.strerror}; nothing more is printed", file=sys.stderr)
            return memoryview(data).nbytes


def keep_going() -> None:
    """Let every print of this process succeed: what cannot be encoded is shown as `?`, a reader that left is ignored.

    Streams that somebody replaced, as pytest and notebooks do, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # a shell closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: PTH123, SIM115
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _surviving(stream))


def _surviving(stream: TextIO) -> IO[str]:
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # a console of Windows
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Surviving(raw.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=bool(stream.line_buffering),
        write_through=stream.write_through,  # type: ignore[attr-defined]
    )
