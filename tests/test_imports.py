"""Who imports whom: arrows run one way, and the core needs torch and einops only."""

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic

SOURCE = Path(moesaic.__file__).parent
CLI = SOURCE / "cli"

# a package may import itself and packages of a lower tier
TIERS = {
    "arms": 0,
    "errors": 0,
    "config": 0,
    "devices": 0,
    "imports": 0,
    "interrupts": 0,
    "statistics": 0,
    "allocator": 0,
    "checkout": 0,
    "reading": 1,
    "files": 1,
    "overrides": 1,
    "layers": 0,
    "losses": 1,
    "models": 1,
    "parallel": 2,
    "data": 2,
    "formats": 2,
    "interop": 2,
    "testing": 2,
    "checkpoints": 3,
    "examples": 3,
    "evaluation": 4,
    "distillation": 4,
    "training": 5,
    "studies": 6,
    "comparison": 7,
    "ladder": 7,
    "cli": 8,
    "__main__": 9,
}
ALLOWED_WITHIN_TIER = {("config", "errors"), ("devices", "errors"), ("imports", "errors"), ("models", "losses")}
CORE = {"layers", "losses", "models"}

MODULES = sorted(
    ".".join(("moesaic", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
)


def path_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            assert node.module is not None
            # `from moesaic import data` names a package just as `from moesaic.data import ...` does
            found |= {f"moesaic.{a.name}" for a in node.names} if node.module == "moesaic" else {node.module}
    return found


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_walk_finds_the_modules() -> None:
    assert {"moesaic", "moesaic.layers", "moesaic.layers.moe", "moesaic.models.decoder"} <= set(MODULES)
    assert {package(module) for module in MODULES} - {""} == set(TIERS), "a new package needs a tier"


@pytest.mark.slow_but_for("moesaic.studies.runner")
@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module: str) -> None:
    own = package(module)
    for name in imports(path_of(module)):
        if name.split(".")[0] != "moesaic":
            continue
        other = package(name)
        if (module, name) == ("moesaic", "moesaic.comparison.python"):
            continue  # moesaic.compare, which is looked up when it is asked for
        assert own, f"moesaic itself imports {name}"
        if other in TIERS and other != own and (own, other) not in ALLOWED_WITHIN_TIER:
            assert TIERS[other] < TIERS[own], f"{module} imports {name}"
            assert own != "layers", f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if package(name) in CORE | {"errors", "config", ""}])
def test_the_core_needs_torch_and_einops_only(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(path_of(module))}
    assert roots - set(sys.stdlib_module_names) <= {"moesaic", "torch", "einops"}


@pytest.mark.parametrize("module", MODULES)
def test_only_commands_know_hydra_and_only_training_knows_lightning(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(path_of(module))}
    # overrides.py reads text in Hydra's grammar, and imports it only then
    assert not roots & {"hydra", "omegaconf"} or package(module) == "cli" or module == "moesaic.overrides"
    assert "lightning" not in roots or package(module) == "training"
    assert "pytorch_lightning" not in roots


def test_the_check_for_hydra_can_fail() -> None:
    assert any("hydra" in imports(path) for path in CLI.glob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_all_names_exist(module: str) -> None:
    loaded = importlib.import_module(module)
    public = getattr(loaded, "__all__", None)
    if public is None:
        definitions = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.ImportFrom)
        body = ast.parse(path_of(module).read_text(encoding="utf-8")).body
        assert not [node for node in body if isinstance(node, definitions)], "it defines names but has no __all__"
        return
    assert [name for name in public if not hasattr(loaded, name)] == []
    assert len(set(public)) == len(public)


@pytest.mark.slow
def test_a_fresh_interpreter_loads_nothing_else() -> None:
    program = """
import json, sys

def roots():
    return {name.split(".")[0] for name in sys.modules}

steps = {}
before = roots()
import moesaic
steps["moesaic"] = sorted(roots() - before)
import torch, torch.utils.checkpoint, einops
for name in ("moesaic.layers", "moesaic.losses", "moesaic.models"):
    before = roots()
    __import__(name)
    steps[name] = sorted(roots() - before)
print(json.dumps(steps))
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, roots in json.loads(done.stdout).items():
        foreign = set(roots) - set(sys.stdlib_module_names) - {"moesaic"}
        # einops chooses its backend at first use; nothing of it may be a framework of ours
        assert not foreign, f"import {name} loads {sorted(foreign)}"


def test_the_way_of_a_token_is_read_in_one_sitting() -> None:
    names = ("moe", "router", "dispatch", "experts", "backends")
    assert sum(len((SOURCE / "layers" / f"{name}.py").read_text().splitlines()) for name in names) < 700
