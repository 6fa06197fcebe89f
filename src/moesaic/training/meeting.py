"""How the processes of a run find each other, and in a sentence how they do not."""

import errno
import os
import re
import socket
import sys
import threading
from datetime import timedelta

from lightning.fabric.plugins import ClusterEnvironment
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from moesaic.errors import InputError
from moesaic.interrupts import answering_signals

__all__ = ["meet", "no_meeting", "require_meeting"]

PATIENCE = 600.0
"""Seconds until a process that waits for others gives up: rank 0 may have a large text to read first."""

SOON = 20.0
"""Seconds after which it says that it waits."""

SAME = "all must be started, with the same MASTER_ADDR and MASTER_PORT"
VARIABLE = "GLOO_SOCKET_IFNAME"


def require_meeting(is_first: bool) -> None:
    """Refuse variables of the environment by which no process would find another, before anything is read.

    Args:
        is_first: whether this process is to open MASTER_PORT. torchrun may have opened it already.

    Raises:
        InputError: an interface that is not there, or a port that another program uses.
    """
    known = {name for _, name in socket.if_nameindex()}
    for interface in filter(None, os.environ.get(VARIABLE, "").split(",")):
        if interface not in known:
            raise _no_interface(interface)
    if not (port := os.environ.get("MASTER_PORT")):
        return
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"MASTER_PORT={port}: must be a number from 1 to 65535")
    if is_first and "WORLD_SIZE" not in os.environ:
        with socket.socket() as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                opened.bind(("", int(port)))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise _no_port(port) from error


def _no_interface(interface: str) -> InputError:
    known = ", ".join(name for _, name in socket.if_nameindex())
    return InputError(f"{VARIABLE}={interface}: no network interface with an address; must be one of {known}")


def _no_port(port: str) -> InputError:
    return InputError(
        f"MASTER_PORT={port}: another program uses this port; must be a free one, or unset, so that one is found"
    )


def no_meeting(error: BaseException) -> InputError | None:
    """What a user can do about an error of torch's rendezvous or of gloo; None for any other error."""
    text = str(error)
    if "EADDRINUSE" in text:
        return _no_port(_found(r"port: (\d+)", text) or os.environ.get("MASTER_PORT", ""))
    if came := re.search(r"after (\d+) seconds waiting for clients. (\d+)/(\d+) clients joined", text):
        seconds, joined, expected = came.groups()
        return InputError(f"{joined} of {expected} processes came within {seconds} seconds; {SAME}")
    if where := _found(r"while trying to connect to \(([^)]+)\)", text):
        return InputError(f"rank 0 did not answer at {where.replace(', ', ':')}; {SAME}")
    if interface := _found(r"Unable to find address for: (\S+)", text):
        if os.environ.get(VARIABLE) == interface:
            return _no_interface(interface)
        known = ", ".join(name for _, name in socket.if_nameindex())
        return InputError(f"{interface}: no address of this machine; {VARIABLE} must be one of {known}")
    return None


def meet(environment: ClusterEnvironment, patience: float = PATIENCE, soon: float = SOON) -> None:
    """Make the process group of a run on CPUs, unless there is one.

    Torch would have one patience for this and for what follows, where a rank may wait long for a score of rank 0.

    Raises:
        RuntimeError: see `no_meeting`.
    """
    rank, world_size = environment.global_rank(), environment.world_size()
    if distributed.is_initialized() or world_size == 1:
        return
    address = {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
    os.environ.update(address)

    def come_together() -> None:
        store, *_ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=patience)))
        store.set_timeout(distributed.default_pg_timeout)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)

    def tell() -> None:
        where = ":".join(address.values())
        print(f"rank {rank} waits for the others of {world_size} at {where}", file=sys.stderr, flush=True)

    waiting = threading.Timer(soon, tell)
    waiting.daemon = True
    waiting.start()
    try:
        answering_signals(come_together)
    finally:
        waiting.cancel()


def _found(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return None if found is None else found.group(1)
