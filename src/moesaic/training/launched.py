"""The processes that Lightning starts for more devices: they run the same command and share one run directory."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from moesaic.errors import InputError
from moesaic.training.lightning_options import require_options

__all__ = [
    "is_lost",
    "is_one_process",
    "processes",
    "rank",
    "rank_run_dir",
    "require_one_process",
    "settle_rank",
    "tell_ranks",
]

VARIABLE = "MOESAIC_RUN_DIR"


def rank() -> int:
    """The number of this process among those of the run."""
    return int(rank_zero_only.rank)  # type: ignore[attr-defined]


def is_one_process(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with these `trainer` keys is one process, whatever a scheduler's variables say."""
    return _devices(trainer) == 1 and trainer.get("num_nodes", 1) == 1


def is_lost(error: BaseException) -> bool:
    """Whether torch says that another process of the run is gone; gloo does so by a RuntimeError."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search("closed by peer|reset by peer", str(error)) is not None
    )


def processes(trainer: Mapping[str, Any]) -> int:
    """How many processes a run with these `trainer` keys has. Lightning says what `auto` and the like mean here.

    Raises:
        InputError: no number of devices or nodes, or none that this machine has.
    """
    devices = _devices(trainer)
    if devices is None:
        made = require_options({"accelerator": trainer.get("accelerator", "cpu"), "devices": trainer["devices"]})
        devices = made.num_devices
    nodes: int = trainer.get("num_nodes", 1)
    if nodes < 1:
        raise InputError(f"trainer.num_nodes={nodes}: must be a number >= 1")
    return devices * nodes


def require_one_process(trainer: Mapping[str, Any], what: str) -> None:
    """Refuse several processes for one of many runs, where this process would have to start the others.

    Lightning repeats the command for that, and the command is the one of all runs.

    Args:
        what: what the run is one of, for the message.

    Raises:
        InputError: it has more than one process.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "LOCAL_RANK" in os.environ or (tasks.isdecimal() and int(tasks) > 1):
        return
    if (number := processes(trainer)) > 1:
        raise InputError(
            f"trainer.devices={trainer.get('devices', 1)}: a run of {what} is one process, not {number}; must be 1, or "
            "start each run by a command of its own"
        )


def settle_rank(trainer: Mapping[str, Any]) -> None:
    """Decide which rank this process has: 0 in a run of one process, though a scheduler may have numbered it.

    Raises:
        InputError: another number of processes was started than `trainer` asks for.
    """
    if is_one_process(trainer):
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        return
    started, devices, nodes = os.environ.get("WORLD_SIZE"), _devices(trainer), trainer.get("num_nodes", 1)
    if started is not None and devices is not None and type(nodes) is int and started != str(devices * nodes):
        raise InputError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: WORLD_SIZE={started} processes were started; it "
            f"must be {devices * nodes}"
        )


def _devices(trainer: Mapping[str, Any]) -> int | None:
    """Devices per node; None where only Lightning can tell."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return devices if type(devices) is int and devices > 0 else None


def tell_ranks(run_dir: Path) -> None:
    """Say where the run is to the processes that this one will start."""
    os.environ[VARIABLE] = str(run_dir)


def rank_run_dir() -> Path | None:
    """The run directory that rank 0 made, in a process of another rank; None in rank 0."""
    return Path(os.environ[VARIABLE]) if rank() and VARIABLE in os.environ else None
