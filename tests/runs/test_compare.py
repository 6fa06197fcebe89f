"""moesaic compare as a person uses it: from words to rows, a verdict and a directory that goes on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import moesaic
from moesaic.checkpoints import load_model
from moesaic.cli import compare
from moesaic.comparison.python import Comparison
from moesaic.errors import InputError
from moesaic.imports import handing_in
from moesaic.layers import Routing, TopKRouter

PARTS = '''
"""Parts of a user's own."""
import torch
from torch import nn
from moesaic.layers import Routing, TopKRouter

class Softmax(TopKRouter):
    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k=top_k, score_function="softmax")

class QuadraticMixer(nn.Module):
    """Linear attention with an (L, L) product."""
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
    def forward(self, x, cache=None, attention_mask=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if attention_mask is not None:
            k = k * attention_mask[..., None]
        return torch.tril(torch.relu(q) @ torch.relu(k).transpose(-1, -2)) @ v / x.size(1)
'''


class ExpertChoice(nn.Module):
    """Every expert takes the tokens it likes best, later ones among them."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        best = logits.topk(max(1, x.size(0) * self.top_k // self.num_experts), dim=0).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(0, best, True)
        ids = torch.arange(self.num_experts).expand_as(logits).masked_fill(~chosen, self.num_experts)
        return Routing(logits, torch.sigmoid(logits) * chosen, ids)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture
def common(corpus: Path, folder: Path) -> list[str]:
    tiny = ["debug=smoke", "model.dim=16", "model.attention.head_dim=4", "model.moe.hidden_dim=24", "rounds=1"]
    return [*tiny, "training.steps=4", "data=files", "data.tokenizer=bytes", f"data.path={corpus}", "seeds=2"]


def tiny_config(corpus: Path) -> dict[str, Any]:
    return {
        "model.dim": 16,
        "model.attention.head_dim": 4,
        "model.moe.hidden_dim": 24,
        "training": {"steps": 4, "batch_size": 2, "seq_len": 32, "validation_seq_len": 32, "validation_batches": 1},
        "data": {"source": "files", "path": str(corpus), "tokenizer": "bytes"},
        "trainer.accelerator": "cpu",
    }


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        compare.main(list(arguments))
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out + shown.err


@pytest.mark.slow
def test_costs_alone_tell_validity_costs_and_fairness(common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run("new=mine.parts:Softmax", "new=model.moe.top_k=2", "only=costs", *common, capsys=capsys)
    assert status == 0
    assert re.search(r"Softmax \(mine\.parts\.Softmax\): (\d) of \1 checks pass", shown)
    assert "FAILS" not in shown
    assert "MFLOP per token, training" in shown
    assert "top_k=2: Changes the width of each expert" in shown
    assert "4. Run" not in shown


@pytest.mark.slow
def test_a_built_in_router_is_compared_by_name_and_marked_by_what_its_class_says(
    common: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["new=model.moe.router=quantile", "new=model.moe.router=expert_choice", "baseline=model.moe.router=top_k"]
    status, shown = run(*arms, "only=costs", *common, capsys=capsys)
    assert status == 0
    assert shown.count("FAILS causality: router expert_choice: its class says so") == 1
    assert "FAILS" not in shown.partition("router=quantile")[0] and shown.count("FAILS") == 2
    [stored] = Path("comparisons").glob("*/comparison.json")
    checks = json.loads(stored.read_text())["checks"]
    assert {name: [row["check"] for row in rows] for name, rows in checks.items()} == {
        "router=expert_choice": ["causality", "batch independence"]
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")  # 4 steps are no time to balance in
def test_built_in_routers_are_compared_to_the_end(common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["new=model.moe.router=quantile", "new=model.moe.router=expert_choice", "baseline=model.moe.router=top_k"]
    short = ["training.steps=4", "seeds=2", "rates=[1]", "equal=none", "workers=1", "rounds=1"]
    status, shown = run(*arms, *short, *common, capsys=capsys)
    assert status == 0 and "5. Verdict" in shown
    [results] = Path("comparisons").glob("*")
    table = (results / "table.md").read_text()
    found = (line.removesuffix(" |").split(" | ") for line in table.splitlines() if line.startswith("| "))
    columns, _, *lines = found
    at = columns.index("causal")
    assert {line[0]: tuple(line[at : at + 2]) for line in lines} == {
        "| router=top_k": ("yes", "no"),
        "| router=quantile": ("yes", "no"),
        "| router=expert_choice (sees later tokens)": ("no", "yes"),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")  # 4 steps are no time to balance in
def test_a_router_handed_in_from_python_is_compared_marked_and_not_run_twice(corpus: Path, folder: Path) -> None:
    def leaking(dim: int, num_experts: int, top_k: int) -> nn.Module:
        return ExpertChoice(dim, num_experts, top_k)

    def asked() -> Comparison:
        return moesaic.compare(new=leaking, config=tiny_config(corpus), seeds=2, rates=[1.0], rounds=1, console=quiet())

    found = asked()
    assert found.failed == {}
    [verdict] = found.verdicts
    assert "leaking (sees later tokens)" in verdict
    assert "does not count" in verdict
    assert len(found.rows) == 4
    marks = {row["arm"]: row.get("mark") for row in found.rows}
    assert marks == {"baseline": None, "leaking": "sees later tokens"}
    assert found.directory == Path("comparisons/leaking")
    text = (found.directory / "table.md").read_text()
    assert text.count("leaking (sees later tokens)") >= 2
    rows = (found.directory / "rows.jsonl").read_text()
    assert asked().rows == found.rows
    assert (found.directory / "rows.jsonl").read_text() == rows
    checkpoint = next(found.directory.rglob("leaking*/run/checkpoints/last.ckpt"))
    with pytest.raises(InputError, match=r"handed_in\.leaking"):
        load_model(checkpoint)
    with handing_in(leaking=leaking):
        load_model(checkpoint)
    kept = leaking

    def another() -> Comparison:
        def leaking(dim: int, num_experts: int, top_k: int) -> nn.Module:
            return kept(dim, num_experts, 2)

        return moesaic.compare(new=leaking, config=tiny_config(corpus), seeds=2, rates=[1.0], rounds=1, console=quiet())

    with pytest.raises(InputError, match=r"another comparison, nothing was changed.*handed_in\.leaking"):
        another()
    with pytest.raises(InputError, match=r"another comparison, nothing was changed.*equal"):
        moesaic.compare(
            new=leaking, config=tiny_config(corpus), equal="none", seeds=2, rates=[1.0], rounds=1, console=quiet()
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
def test_keys_that_move_together_and_a_module_that_is_drawn_anew_for_every_run(corpus: Path, folder: Path) -> None:
    router = TopKRouter(16, 8, score_function="softmax")
    before = router.weight.detach().clone()
    found = moesaic.compare(
        new=["model.moe.top_k=2 model.moe.hidden_dim=12", router],
        config=tiny_config(corpus),
        seeds=1,
        rates=[1.0],
        rounds=1,
        console=quiet(),
    )
    assert [row["arm"] for row in found.rows] == ["baseline", "top_k=2, hidden_dim=12", "TopKRouter"]
    assert found.costs["top_k=2, hidden_dim=12"]["overrides"] == {}  # the person's own width stays
    assert torch.equal(router.weight, before)
    assert "no verdict" in found.verdicts[0]


@pytest.mark.slow_but_for(
    "new: missing",
    "-m: several",
    "seeds=0,1",
    "cannot be imported",
    "budget=10:",
    "seed: must be given",
    "no MoE layer",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"new: missing; must be given, such as 'new=model.dim=16 model.attention.head_dim=4"),
        (["new=model.dense_twin=true", "-m"], r"-m: several candidates must be several new="),
        (["new=model.dense_twin=true", "seeds=0,1"], r"seeds=0,1: several seeds must be seeds=\[0,1\]"),
        (["new="], r"is the baseline itself; must differ"),
        (["new=model.dimm=3"], r"new: model.dimm: unknown key \(did you mean model.dim\?\)"),
        (["new='name=x"], r"No closing quotation"),
        (["new=mine.parts:Nothing"], r"cannot be imported"),
        (["new=nowhere.parts:X"], r"cannot be imported"),
        (["new=model.moe.top_k=9"], r"top_k=9: .*must be 1 to num_experts=8"),
        (["new=model.dense_twin=true", "equal=watts"], r"equal: found 'watts'"),
        (["new=model.dense_twin=true", "budget=soon"], r"budget='soon': must be a duration such as"),
        (["new=model.dense_twin=true", "seeds=0"], r"seeds=0: must be a number from 1"),
        (["new=model.dense_twin=true", "seeds=[1,1]"], r"seeds=\[1, 1\]: must be one or more different"),
        (["new=model.dense_twin=true", "new=model.dense_twin=true"], r"two arms are called model.dense_twin=true"),
        (["new=model.dense_twin=true", "budget=10"], r"budget=10: must be a duration such as"),
        (["new=model.dense_twin=true", "seed=5"], r"seed: must be given as seeds"),
        (["new=model.moe.router={type:group_limited,num_groups:3,top_groups:1}"], r"num_groups=3: must divide num_exp"),
        (
            ["new=model.moe.top_k=3 model.moe.router={type:group_limited,num_groups:4,top_groups:1}"],
            r"top_k=3: must be at most 2, the experts of 1 groups",
        ),
        (["new=top_k=2"], r"did you mean model.moe.top_k\?"),
        (["new=model.moe.top_k=1,2"], r"new: model.moe.top_k=1,2: several values must be several candidates"),
        (["new=[mine.parts:Softmax,model.moe.top_k=2]"], r"several candidates must be several new="),
        (["new=seed=3"], r"seed: must be the same in all arms"),
        (["new=training.seq_len=32", "training.validation_seq_len=null"], r"training.seq_len: scores would be of"),
        (["new=data.path=elsewhere"], r"data.path: scores would be of different texts"),
        (["new=training.validation_seq_len=16"], r"validation_seq_len: scores would be of different"),
        (["new=model=enormous"], r"enormous"),
        (["new=mine.parts:Softmax", "model.interleave_moe_layer_step=0"], r"has no MoE layer"),
        (["new=mine.parts:Softmax", "rounds=-1"], r"rounds=-1"),
        (["new=mine.parts:Softmax", "workers=0"], r"workers=0"),
        (["new=mine.parts:Softmax", "rates=[]"], r"rates=\[\]"),
        (["new=mine.parts:Softmax", "rates=[-1,1]"], r"rates="),
        (["new=model.vocab_size=9"], r"model.vocab_size=9: the data have token ids up to \d+"),
    ],
)
def test_bad_input(common: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run(*common, *arguments, capsys=capsys)
    assert status == 2
    assert re.search(message, shown), shown
    assert not Path("comparisons").exists()


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on_in_its_directory(common: list[str], folder: Path) -> None:
    words = ["new=mine.parts:Softmax", "new=mixer:mine.parts.QuadraticMixer", *common, "workers=2", "rates=[1.0,2.0]"]
    command = [sys.executable, "-m", "moesaic", "compare", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(moesaic.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    rows = folder / "comparisons" / "Softmax_QuadraticMixer" / "rows.jsonl"
    first = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not rows.exists() and first.poll() is None:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert first.stdout is not None
    first.stdout.close()
    kept = rows.read_text().splitlines()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows.read_text().splitlines()[: len(kept)] == kept
    assert len(rows.read_text().splitlines()) >= 3 * (2 + 2)
    assert "pairs of runs" in done.stdout
    summary = json.loads((rows.parent / "summary.json").read_text())
    assert summary["complete"]
    assert (rows.parent / "parts" / "mine" / "parts.py").read_text() == PARTS
    for picture in ("effect.png", "curves.png"):
        assert (rows.parent / picture).stat().st_size > 1000
