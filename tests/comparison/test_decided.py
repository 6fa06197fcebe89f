"""The directory of a comparison."""

import dataclasses
import sys
from pathlib import Path

import pytest

from moesaic.comparison.arms import Arm, part_overrides
from moesaic.comparison.decided import Decided
from moesaic.comparison.request import Request
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.overrides import apply_overrides
from moesaic.training.config import RunConfig


def test_a_package_is_kept_as_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "kept_package/__init__.py": "from kept_package.sub.router import Mine",
        "kept_package/sub/__init__.py": "",
        "kept_package/sub/router.py": "from moesaic.layers import TopKRouter\nfrom ..helper import HELP\n"
        "class Mine(TopKRouter):\n    pass\n",
        "kept_package/helper.py": "HELP = 1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = to_mapping(RunConfig())
    model = from_mapping(DecoderConfig, {**run["model"], "vocab_size": 9}, "model")
    changed = apply_overrides(run, part_overrides("router", "kept_package.Mine", model), "new")
    moe = dataclasses.replace(model.moe, router={"type": "kept_package.Mine"})  # type: ignore[type-var]
    request = Request(Arm("baseline", run), (Arm("Mine", changed),), tmp_path / "out")
    Decided(request, {"Mine": dataclasses.replace(model, moe=moe)})
    kept = {str(path.relative_to(tmp_path / "out" / "parts")) for path in (tmp_path / "out").rglob("*.py")}
    assert kept == files.keys()
    for name in [name for name in sys.modules if name.split(".")[0] == "kept_package"]:
        del sys.modules[name]


def test_what_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    run = to_mapping(RunConfig())
    request = Request(
        Arm("baseline", run), (Arm("new", apply_overrides(run, {"model.moe.top_k": 2}, "new")),), tmp_path
    )
    assert Decided(request, {}).get("plan", "runs", lambda: {"steps": 4, "rates": (1.0,)})["steps"] == 4
    assert Decided(request, {}).get("plan", "runs", lambda: {})["steps"] == 4
    path = tmp_path / "comparison.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": "x"'))
    with pytest.raises(InputError, match=r"comparison\.json.*its content has not its digest"):
        Decided(request, {})
