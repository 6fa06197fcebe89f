"""The wheel as a user has it: built, installed, and run from an empty folder without the clone."""

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["debug=smoke", "trainer.precision=32-true", "training.steps=4", "model.dim=16", "model.attention.head_dim=4"]
ROUTER = """from moesaic.layers import TopKRouter

class Mine(TopKRouter):
    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k=top_k, score_function="softmax")
"""
STUDY = """# @package _global_
name: tiny
study:
  question: Does a study run from the wheel?
  equal: nothing
  baseline: one
  seeds: [0]
  tune: null
  arms: {one: {}, two: {model.moe.top_k: 2}}
"""
TEXTS = ["data=files", "data.path=texts", "data.tokenizer=bytes"]


def run(*command: object, folder: Path, **environment: str) -> str:
    """What a command prints; neither the clone nor this process' PYTHONPATH reaches it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def build(source: Path, target: str, to: Path) -> Path:
    """A built sdist or wheel."""
    # in this process' environment: hatchling is one of the [dev] packages
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(to)],
        cwd=source,
        check=True,
        capture_output=True,
    )
    [built] = to.iterdir()
    return built


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = contents(wheel).keys()
    for folder, target, kind in (
        ("src/moesaic", "", "*.py"),
        ("conf", "conf/", "*.yaml"),
        ("benchmarks", "benchmarks/", "*.py"),
    ):
        for path in (ROOT / folder).rglob(kind):
            assert f"moesaic/{target}{path.relative_to(ROOT / folder).as_posix()}" in names
    assert "moesaic/py.typed" in names
    assert {name.split("/")[0] for name in names} <= {
        "moesaic",
        *(n.split("/")[0] for n in names if ".dist-info/" in n),
    }


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as file:
        file.extractall(tmp_path, filter="data")
    [source] = [path for path in tmp_path.iterdir() if path.name.startswith("moesaic-")]
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert [name for name in listed.split("\0") if name and not (source / name).exists()] == []
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-m",
        "not slow",
        "tests/test_docs.py",
        "tests/test_defaults.py",
    ]
    run(*tests, folder=source, PYTHONPATH=str(source / "src"))
    again = build(source, "wheel", tmp_path / "again")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command moesaic of an environment with the wheel and this environment's other packages."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", wheel, folder=home)
    [packages] = home.glob("lib/python*/site-packages")
    # a venv made from a venv sees the packages of the base interpreter; .pth files of these folders are not read,
    # so an editable install of the clone stays out
    others = dict.fromkeys([sysconfig.get_paths()["purelib"], *(p for p in sys.path if "site-packages" in p)])
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    where = run(python, "-c", "import moesaic; print(moesaic.__file__)", folder=home).strip()
    assert Path(where).is_relative_to(packages)
    return home / "bin" / "moesaic"


def test_from_an_empty_folder(command: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    draw = random.Random(0)
    for i in range(8):
        lines = [f"def f{draw.randrange(9)}(x{j}):\n    return x{j} + {draw.randrange(99)}\n" for j in range(40)]
        (texts / f"file{i}.py").write_text("\n".join(lines))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # somebody's repository, which is not ours
    printed = run(command, "train", *SMALL, *TEXTS, "experiment=custom_modules", folder=tmp_path)
    [run_dir] = (tmp_path / "outputs" / "smoke").iterdir()
    assert f"moesaic generate outputs/smoke/{run_dir.name}" in printed
    assert '"git_commit": null' in (run_dir / "environment.json").read_text()
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    assert "bits_per_byte" in run(command, "evaluate", checkpoint, *TEXTS, folder=tmp_path)
    assert run(command, "generate", checkpoint, "def f(x=1", "max_new_tokens=3", folder=tmp_path).startswith(
        "def f(x=1"
    )
    assert "1 of 1" in run(command, "report", "outputs", folder=tmp_path)


def test_the_other_commands_from_an_empty_folder(command: Path, tmp_path: Path) -> None:
    assert "small: 1 x 64 tokens" in run(command, "memory", "small", "seq_len=64", folder=tmp_path)
    assert "pass" in run(command, "conformance", "moesaic", folder=tmp_path)
    run(command, "bench", "experts", "smoke=true", "output=rows.jsonl", folder=tmp_path)
    assert '"commit": ""' in (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text("def f(x):\n    return x + 1\n" * 200)
    (tmp_path / "texts" / "b.py").write_text("def g(y):\n    return y + 2\n" * 200)
    layout = ["model.attention.conv_width=0", "training.steps=2", "data.path=texts", "data=files"]
    layout += ["debug=smoke", "trainer.precision=32-true", "data.tokenizer=bpe", "data.vocab_size=300"]
    run(command, "train", *layout, "run_dir=run", folder=tmp_path)
    checkpoint = "run/checkpoints/last.ckpt"
    assert "parameters" in run(command, "convert", checkpoint, "dry_run=true", folder=tmp_path)
    data = ["data=files", "data.path=texts", "seq_len=64"]
    assert "moesaic train experiment=codistill_cached" in run(
        command, "cache-targets", checkpoint, "targets", *data, folder=tmp_path
    )
    (tmp_path / "my_parts.py").write_text(ROUTER)
    comparison = ["new=my_parts:Mine", "seeds=2", "rounds=1", "rates=[1.0]", "training.steps=2", *SMALL, *TEXTS]
    assert "pairs of runs" in run(command, "compare", *comparison, folder=tmp_path)
    assert (tmp_path / "comparisons" / "Mine" / "effect.png").exists()
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "study_tiny.yaml").write_text(STUDY)
    study = ["--config-dir", "conf", "experiment=study_tiny", *SMALL, *TEXTS, "training.steps=2", "workers=1"]
    run(command, "study", *study, folder=tmp_path)
    [rows] = (tmp_path / "studies").glob("*/rows.jsonl")  # in the working folder: there is no clone
    assert rows.read_text().count("\n") == 2


def test_everything_is_resolved_from_nothing(wheel: Path, tmp_path: Path) -> None:
    """pip install 'moesaic[train]' under constraints.txt in an environment that has nothing."""
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk")
    probe = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--dest", str(tmp_path)]
    if subprocess.run([*probe, "einops"], capture_output=True, check=False).returncode:
        pytest.skip("no package index can be reached")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[train]", folder=tmp_path)
    run(python, "-m", "pip", "check", folder=tmp_path)
    assert "train" in run(tmp_path / "env" / "bin" / "moesaic", "train", "--cfg", "job", folder=tmp_path)
