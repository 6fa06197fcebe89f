"""Processes that do not find each other: torch's and gloo's own errors become a sentence."""

import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import distributed

from moesaic.errors import InputError
from moesaic.training.meeting import meet, no_meeting, require_meeting

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


@pytest.mark.slow
def test_a_rank_that_does_not_come(port: int) -> None:
    assert re.fullmatch(
        r"1 of 2 processes came within \d seconds; all must be started, with the same MASTER_ADDR and MASTER_PORT",
        said(distributed.TCPStore, "127.0.0.1", port, 2, True, timeout=SECOND),
    )


@pytest.mark.slow
def test_a_first_rank_that_does_not_come(port: int) -> None:
    assert said(distributed.TCPStore, "127.0.0.1", port, 2, False, timeout=SECOND) == (
        f"rank 0 did not answer at 127.0.0.1:{port}; all must be started, with the same MASTER_ADDR and MASTER_PORT"
    )


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense")
    found = said(distributed.ProcessGroupGloo.create_device, interface="nonsense")
    assert found.startswith("GLOO_SOCKET_IFNAME=nonsense: no network interface with an address; must be one of ")
    assert "lo" in found


def test_what_no_process_could_meet_by_is_refused_first(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**variables: str) -> str:
        with monkeypatch.context() as patch, pytest.raises(InputError) as error:
            for name in ("GLOO_SOCKET_IFNAME", "MASTER_PORT", "WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            require_meeting(is_first=True)
        return str(error.value)

    assert refusal(GLOO_SOCKET_IFNAME="lo,eth99").startswith("GLOO_SOCKET_IFNAME=eth99: no network interface")
    assert refusal(MASTER_PORT="http") == "MASTER_PORT=http: must be a number from 1 to 65535"
    assert refusal(MASTER_PORT="70000") == "MASTER_PORT=70000: must be a number from 1 to 65535"
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert refusal(MASTER_PORT=str(port)).startswith(f"MASTER_PORT={port}: another program uses this port")
        require_meeting(is_first=False)
        monkeypatch.setenv("WORLD_SIZE", "2")  # whoever set this may have opened the port
        require_meeting(is_first=True)
    monkeypatch.delenv("WORLD_SIZE")
    require_meeting(is_first=True)


@pytest.mark.slow
def test_a_run_says_whom_it_waits_for_and_gives_up(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    environment = LightningEnvironment()
    environment.set_global_rank(0)
    environment.set_world_size(2)
    assert re.match(r"1 of 2 processes came within \d seconds; ", said(meet, environment, patience=2, soon=0.1))
    assert capsys.readouterr().err == f"rank 0 waits for the others of 2 at 127.0.0.1:{port}\n"
    assert not distributed.is_initialized()


def test_other_errors_are_left_alone() -> None:
    assert no_meeting(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
