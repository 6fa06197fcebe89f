"""moesaic conformance: a table, the failures, and an exit code."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moesaic.testing import moe_checks


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("rich")
    return importlib.import_module("moesaic.cli.conformance")


def run(script: ModuleType, *arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    return int(stop.value.code or 0)


@pytest.mark.slow
def test_a_layer_known_by_name(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(script, "moesaic-bfloat16") == 0
    out = capsys.readouterr().out
    for check in moe_checks():
        assert check.name in out


@pytest.mark.slow
def test_a_layer_of_ones_own(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own_layer.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Batch(nn.Linear):\n"
        "    def forward(self, x):\n        return super().forward(x - x.mean(dim=0))\n\n\n"
        "def layer():\n    return Batch(8, 8)\n\n\nnumber = 3\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as the command does with the working folder
    assert run(script, "own_layer:layer", "markdown=true") == 1
    out = capsys.readouterr().out
    assert "| batch-mates | **fail** |" in out
    assert "- own_layer:layer, batch-mates: a sequence in a batch and alone: relative error" in out
    assert run(script, "own_layer:layer") == 1
    assert "marin-community/marin#8134" in capsys.readouterr().out.replace("\n", " ")
    assert run(script, "own_layer:number") == 2
    assert "must be a function" in capsys.readouterr().err


@pytest.mark.slow
def test_a_router_whose_signature_says_nothing(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "quiet_router.py").write_text(
        "from torch import nn\n\n\nclass Quiet(nn.Module):\n"
        "    def __init__(self, dim, num_experts, top_k):\n        super().__init__()\n"
        "        self.gate, self.top_k = nn.Linear(dim, num_experts, bias=False), top_k\n\n"
        "    def forward(self, x):\n        logits = self.gate(x)\n"
        "        return logits, *logits.softmax(-1).topk(self.top_k)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert run(script, "quiet_router:Quiet") == 0
    assert "causality" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "nobody: must be package.module:factory, or one of moesaic, "),
        ("no_such:thing", "No module named 'no_such'"),
        ("rigged_parts:Odd", "missing 1 required positional argument: 'gain'"),
        ("rigged_parts:Odd", "a word before the name says what it is: router:, mixer:, ffn:, expert:, dispatcher:"),
    ],
)
def test_a_name_that_is_not_known(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run(script, name) == 2
    assert message in capsys.readouterr().err


def test_without_names_the_known_ones_are_listed(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main([])
    assert "transformers-mixtral" in capsys.readouterr().out


PARTS = """
import torch
from torch import nn
from moesaic.layers import Routing


class Leaking(nn.Module):
    def __init__(self, dim, num_experts):
        super().__init__()
        self.out = nn.Linear(dim, num_experts)

    def forward(self, x) -> Routing:
        logits = self.out(x - x.mean(dim=0))
        scores, ids = logits.sigmoid().topk(1)
        return Routing(logits, scores, ids)


class Mixing(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out(x.cumsum(dim=1))


class Both(Mixing):
    def forward(self, x, cache=None, expert_ids=None):
        return x
"""


@pytest.mark.slow
def test_parts_alone(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run(script, "mixer:own_parts.Mixing") == 0
    assert "cached decoding: it has no make_cache" in capsys.readouterr().out
    assert run(script, "own_parts:Leaking", "mixer:own_parts:Mixing", "markdown=true") == 1
    out = capsys.readouterr().out
    assert "| causality | **fail** | pass |" in out
    assert "- own_parts:Leaking, causality: the output of token 0 depends on later tokens" in out
    assert run(script, "own_parts.Both") == 2
    assert "must be given as router:own_parts.Both or mixer:own_parts.Both" in capsys.readouterr().err.replace(
        "\n", " "
    )
