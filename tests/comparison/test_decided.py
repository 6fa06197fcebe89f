"""The directory of a comparison."""

import dataclasses
import json
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
from moesaic.studies.jobs import write_row
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
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"comparison\.json.*its content has not its digest"):
        Decided(request, {})


def test_a_part_that_was_mended_is_decided_again_and_its_rows_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from moesaic.layers import TopKRouter\nclass Mine(TopKRouter):\n    pass\n"
    (tmp_path / "mended_part.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = to_mapping(RunConfig())
    custom = apply_overrides(run, {"model.moe.router": {"type": "mended_part.Mine"}}, "new")
    arms = (Arm("Mine", custom), Arm("top_k=2", apply_overrides(run, {"model.moe.top_k": 2}, "new")))
    request = Request(Arm("baseline", run), arms, tmp_path / "out")
    models = {
        arm.name: from_mapping(DecoderConfig, {**arm.config["model"], "vocab_size": 9}, "model") for arm in request.arms
    }
    decided = Decided(request, models)
    for section, name in (("checks", "Mine"), ("fair", "Mine"), ("fair", "top_k=2"), ("plan", "runs")):
        decided.get(section, name, lambda: {"old": 1})
    rows = request.directory / "rows.jsonl"
    lines = [write_row({"arm": name, "metrics": {}}) for name in ("baseline", "Mine", "top_k=2", "Mine")]
    rows.write_text("".join(f"{line}\n" for line in lines))
    assert Decided(request, models).renewed == {}
    (tmp_path / "mended_part.py").write_text(code + "# mended\n")
    decided = Decided(request, models)
    assert decided.renewed == {"Mine": 2}
    assert {section: list(decided.stored[section]) for section in ("checks", "fair", "plan")} == {
        "checks": [], "fair": ["top_k=2"], "plan": ["runs"]
    }  # fmt: skip
    assert rows.read_text().splitlines() == [lines[0], lines[2]]
    assert (request.directory / "replaced.jsonl").read_text().splitlines() == [lines[1], lines[3]]
    assert (request.directory / "parts" / "mended_part.py").read_text().endswith("# mended\n")
    assert Decided(request, models).renewed == {}
    with pytest.raises(InputError, match="another comparison"):
        Decided(dataclasses.replace(request, equal="none"), models)
    del sys.modules["mended_part"]
