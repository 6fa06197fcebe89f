"""Processes that do not find each other: torch's and gloo's own errors become a sentence."""

import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from torch import distributed

from moesaic.training.meeting import no_meeting

SECOND = timedelta(seconds=1)


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def said(function: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        function(*arguments, **named)
    sentence = no_meeting(error.value)
    assert sentence is not None, str(error.value)
    return str(sentence)


def test_a_port_in_use(port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert said(distributed.TCPStore, "127.0.0.1", port, 2, True, timeout=SECOND) == (
            f"MASTER_PORT={port}: another program uses this port; must be a free one, or unset, so that one is found"
        )


def test_a_rank_that_does_not_come(port: int) -> None:
    assert re.fullmatch(
        r"1 of 2 processes came within \d seconds; all must be started, with the same MASTER_ADDR and MASTER_PORT",
        said(distributed.TCPStore, "127.0.0.1", port, 2, True, timeout=SECOND),
    )


def test_a_first_rank_that_does_not_come(port: int) -> None:
    assert said(distributed.TCPStore, "127.0.0.1", port, 2, False, timeout=SECOND) == (
        f"rank 0 did not answer at 127.0.0.1:{port}; all must be started, with the same MASTER_ADDR and MASTER_PORT"
    )


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense")
    found = said(distributed.ProcessGroupGloo.create_device, interface="nonsense")
    assert found.startswith("GLOO_SOCKET_IFNAME=nonsense: no network interface with an address; must be one of ")
    assert "lo" in found


def test_other_errors_are_left_alone() -> None:
    assert no_meeting(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
