"""The most memory that a run had, whatever its process did before."""

import contextlib
import sys
from pathlib import Path

import torch

from moesaic.allocator import return_freed_memory

__all__ = ["forget_peak_memory", "peak_memory"]


def forget_peak_memory() -> None:
    """Begin the peak anew: a process may have done other runs before, as in a sweep."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    return_freed_memory()
    with contextlib.suppress(OSError):  # another system than Linux, or a kernel that forbids it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Bytes at most since `forget_peak_memory`: of the GPU where one is used, else of this process.

    Where the system cannot begin anew (not Linux), it is the peak of the process so far.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
