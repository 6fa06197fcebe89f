"""The processes that Lightning starts for more devices: they run the same command and share one run directory."""

import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

__all__ = ["rank", "rank_run_dir", "tell_ranks"]

VARIABLE = "MOESAIC_RUN_DIR"


def rank() -> int:
    """The number of this process among those of the run."""
    return int(rank_zero_only.rank)  # type: ignore[attr-defined]


def tell_ranks(run_dir: Path) -> None:
    """Say where the run is to the processes that this one will start."""
    os.environ[VARIABLE] = str(run_dir)


def rank_run_dir() -> Path | None:
    """The run directory that rank 0 made, in a process of another rank; None in rank 0."""
    return Path(os.environ[VARIABLE]) if rank() and VARIABLE in os.environ else None
