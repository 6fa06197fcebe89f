"""How the processes of a run fail to find each other, said in a sentence."""

import os
import re
import socket

from moesaic.errors import InputError

__all__ = ["no_meeting"]

SAME = "all must be started, with the same MASTER_ADDR and MASTER_PORT"


def no_meeting(error: BaseException) -> InputError | None:
    """What a user can do about an error of torch's rendezvous or of gloo; None for any other error."""
    text = str(error)
    if "EADDRINUSE" in text:
        port = _found(r"port: (\d+)", text) or os.environ.get("MASTER_PORT", "")
        return InputError(
            f"MASTER_PORT={port}: another program uses this port; must be a free one, or unset, so that one is found"
        )
    if came := re.search(r"after (\d+) seconds waiting for clients. (\d+)/(\d+) clients joined", text):
        seconds, joined, expected = came.groups()
        return InputError(f"{joined} of {expected} processes came within {seconds} seconds; {SAME}")
    if where := _found(r"while trying to connect to \(([^)]+)\)", text):
        return InputError(f"rank 0 did not answer at {where.replace(', ', ':')}; {SAME}")
    if interface := _found(r"Unable to find address for: (\S+)", text):
        known = ", ".join(name for _, name in socket.if_nameindex())
        variable = "GLOO_SOCKET_IFNAME"
        if os.environ.get(variable) == interface:
            return InputError(f"{variable}={interface}: no network interface with an address; must be one of {known}")
        return InputError(f"{interface}: no address of this machine; {variable} must be one of {known}")
    return None


def _found(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return None if found is None else found.group(1)
