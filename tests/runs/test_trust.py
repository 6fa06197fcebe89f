"""A stranger's files: nothing that they name is imported or called, whatever command reads them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from moesaic.checkpoints import load_model
from moesaic.cli import main
from moesaic.config import from_mapping
from moesaic.data import DataConfig, load_data
from moesaic.distillation import TargetCache
from moesaic.errors import InputError
from moesaic.imports import VARIABLE, names_in, resolve, trusted, trusting
from moesaic.interop import from_hf, to_hf
from moesaic.interop.__main__ import compute_logits
from moesaic.models import LayerConfig, build_decoder, llama4_toy
from moesaic.studies.config import StudyConfig
from moesaic.studies.runner import read_rows
from moesaic.training.run import run
from moesaic.training.starting import find_run

TOUCH = "import pathlib; pathlib.Path(__file__).with_name('EXECUTED').touch()\n"

PART = """
import os
import functools
import subprocess
from subprocess import run as borrowed
from subprocess import Popen
import torch
from torch import nn
from torch.nn import Identity
from torch.hub import load


class Part(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x, cache=None, attention_mask=None):
        return self.out(x)


class NoModule:
    def __init__(self, **anything):
        TOUCHED


def make(dim):
    return Part(dim)


made = functools.partial(Part)
call = functools.partial(subprocess.run, shell=True)
number = 3
"""

PARTS = (
    {"type": "stranger.Part"},
    {"type": "torch.hub.load", "repo_or_dir": ".", "model": "part", "source": "local"},
    {"type": "os.system", "command": "touch EXECUTED"},
    {"type": "subprocess.run", "args": ["touch", "EXECUTED"]},
    {"type": "hubconf:part"},
    {"type": "moesaic.training.module.LanguageModel", "config": {}, "model": {}},
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stranger's folder, with a person in it."""
    place = tmp_path / "strange"
    (place / "hydra_plugins").mkdir(parents=True)
    for name in ("hubconf", "json", "torch", "yaml", "wandb", "hydra_plugins/plugin", "antigravity", "this"):
        (place / f"{name}.py").write_text(TOUCH + "def part(**anything): pass\n")
    (place / "stranger.py").write_text(TOUCH + PART.replace("TOUCHED", TOUCH.strip()))
    (place / "a b.py").write_text(TOUCH)
    monkeypatch.chdir(place)
    monkeypatch.delenv(VARIABLE, raising=False)
    before = list(sys.path)
    yield place
    sys.path[:] = before
    for name in ("stranger", "hubconf"):
        sys.modules.pop(name, None)


def strange(checkpoint: Path, out: Path, **model: Any) -> Path:
    """A copy of a checkpoint whose model has these keys."""
    content = torch.load(checkpoint, weights_only=True)
    for stored in (content["hyper_parameters"]["model"], content["hyper_parameters"]["config"]["model"]):
        stored.update(model)
    torch.save(content, out)
    return out


def pattern(part: dict[str, Any]) -> dict[str, Any]:
    layers = [{"mixer": part, "ffn": "moe"}]
    return {"pattern": layers, "interleave_moe_layer_step": None, "nope_layer_interval": None}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    told = capsys.readouterr()
    assert stopped.value.code == 2, told
    return told.err


def commands(ckpt: Path, good: Path, corpus: Path) -> dict[str, list[str]]:
    data = ["data=files", f"data.path={corpus}", "data.cache_dir=cache"]
    frozen = ["experiment=codistill_frozen", "debug=smoke", f"distillation.teacher={ckpt}"]
    return {
        "generate": ["generate", str(ckpt), "x"],
        "evaluate": ["evaluate", str(ckpt), *data],
        "evaluate needle": ["evaluate", str(ckpt), "task=needle", *data],
        "evaluate other": ["evaluate", str(good), "task=specialization", f"other_checkpoint={ckpt}", *data],
        "convert": ["convert", str(ckpt), "out"],
        "convert dry": ["convert", str(ckpt), "dry_run=true"],
        "cache-targets": ["cache-targets", str(ckpt), "targets", "data.vocab_size=300", *data],
        "train teacher": ["train", *frozen, "data.vocab_size=300", *data],
        "train ckpt_path": ["train", "debug=smoke", f"ckpt_path={ckpt}", "data.vocab_size=300", *data],
        "extend": ["train", "debug=smoke", "experiment=extend_context", f"ckpt_path={ckpt}", *data],
    }


@pytest.mark.slow_but_for("convert dry")
@pytest.mark.parametrize("command", commands(Path(), Path(), Path()))
def test_a_strangers_checkpoint_runs_nothing(
    trained: Path, corpus: Path, folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in PARTS:
        ckpt = strange(trained, folder / "bad.ckpt", **pattern(part))
        told = refused(capsys, *commands(ckpt, trained, corpus)[command])
        assert "bad.ckpt" in told
        assert not (folder / "EXECUTED").exists(), part
        if "train ckpt" not in command and "extend" not in command:  # these compare it with the model that was typed
            path = part["type"].replace(":", ".")
            assert f"names code that would be imported and run: {path}. If you trust it, add trust=[" in told


@pytest.mark.slow
def test_what_is_no_part_is_not_called_even_if_trusted(
    trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = ("NoModule", "borrowed", "Popen", "load", "call", "number")
    others = [{"type": f"stranger.{name}", "args": ["touch", "EXECUTED"]} for name in inside]
    words = "trust=[torch,os,subprocess,moesaic,stranger,hydra]"
    target = {"type": "hydra.utils.call", "config": {"_target_": "os.system", "command": "touch EXECUTED"}}
    for part in (*PARTS[1:4], PARTS[5], target, *others):
        for place in (pattern(part), {"moe": {"num_experts": 4, "hidden_dim": 8, "router": part}}):
            ckpt = strange(trained, folder / "bad.ckpt", **place)
            told = refused(capsys, "generate", str(ckpt), words)
            assert "must be" in told, told
            (folder / "EXECUTED").unlink(missing_ok=True)  # the import of stranger.py, which is trusted
            refused(capsys, "generate", str(ckpt), words)
            assert not (folder / "EXECUTED").exists(), part
    part = {"type": "a b.part"}
    told = refused(capsys, "generate", str(strange(trained, folder / "bad.ckpt", **pattern(part))), words)
    assert "names code as 'a b.part'; must be package.module.name" in told


def test_the_refusal_lists_all_and_says_the_words(trained: Path, folder: Path) -> None:
    model = pattern({"type": "stranger.Part"}) | {
        "moe": {"num_experts": 4, "hidden_dim": 8, "router": {"type": "other.sub.R"}, "dispatcher": {"type": "third:D"}}
    }
    ckpt = strange(trained, folder / "bad.ckpt", **model)
    with pytest.raises(InputError) as refusal:
        load_model(ckpt, trust=["stranger"])
    assert str(refusal.value) == (
        f"checkpoint {ckpt}: names code that would be imported and run: stranger.Part, other.sub.R, third.D. If you "
        "trust it, add trust=[other,stranger,third], set MOESAIC_TRUST=other,stranger,third, or in Python give "
        "trust=('other', 'stranger', 'third')"
    )
    assert not (folder / "EXECUTED").exists()
    for wrong in (["../x"], [3], ["*"], [""]):
        with pytest.raises(InputError, match="must be names of packages"):
            load_model(ckpt, trust=wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_resume_runs_nothing_that_the_stored_config_names(
    train_once: Callable[..., Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = train_once("data.tokenizer=bpe", "data.vocab_size=300")
    run_dir = folder / "run"
    shutil.copytree(own, run_dir)
    (run_dir / "metrics.json").unlink()
    good = yaml.safe_load((own / "config.yaml").read_text())
    changes = [
        {"model": {**good["model"], **pattern(PARTS[0])}},
        {"callbacks": {"it": {"_target_": "stranger.Callback"}}},
        {"logger": {"it": {"_target_": "torch.hub.load", "source": "local"}}},
        {"callbacks": {"it": {"_target_": "a b.Callback"}}},
        {"trust": ["stranger"], "callbacks": {"it": {"_target_": "stranger.Callback"}}},
        {"callbacks": {"it": {"_target_": ["stranger.Callback"]}}},
    ]
    for change in changes:
        (run_dir / "config.yaml").write_text(yaml.safe_dump({**good, **change}))
        told = refused(capsys, "train", "resume=true", f"run_dir={run_dir}")
        assert not (folder / "EXECUTED").exists(), change
        assert "config.yaml" in told or "_target_" in told
    (run_dir / "config.yaml").write_text("it: !!python/object/apply:os.system ['touch EXECUTED']\n")
    refused(capsys, "train", "resume=true", f"run_dir={run_dir}")
    main(["report", str(folder)])
    assert not (folder / "EXECUTED").exists()


def test_the_stored_config_of_a_study_runs_nothing(
    composed: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    base = composed()
    study = from_mapping(
        StudyConfig, {"question": "?", "equal": "=", "baseline": "a", "arms": {"a": {}}, "seeds": [0], "tune": None}
    )
    stored = {**base, "model": {**base["model"], **pattern(PARTS[0])}, "study": {"evaluations": ["stranger.f"]}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "results" / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(InputError, match=r"config\.yaml: names code that would be imported"):
        read_rows(tmp_path / "results", study, base)
    assert not (folder / "EXECUTED").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Part", "make", "made"])
def test_what_was_typed_here_is_trusted_and_loads_elsewhere(
    composed: Callable[..., dict[str, Any]], folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(
        "model.interleave_moe_layer_step=null",
        "model.nope_layer_interval=null",
        f"model.pattern=[{{mixer: {{type: stranger.{name}}}, ffn: dense}}]",
        "training.steps=2",
        f"run_dir={folder / 'run'}",
    )
    assert run(config, Console(quiet=True))["status"] == "finished"
    last = folder / "run" / "checkpoints" / "last.ckpt"
    assert trusted() == frozenset(), "over with the run"
    sys.modules.pop("stranger")
    assert "trust=[stranger]" in refused(capsys, "generate", str(last), "x")
    main(["generate", str(last), "x", "trust=[stranger]", "max_new_tokens=2"])
    assert capsys.readouterr().out.startswith("x")
    assert load_model(last, trust=("stranger",)).config.pattern is not None
    with trusting("stranger"):
        load_model(last)
    with pytest.raises(InputError, match="names code"):
        load_model(last)
    os.environ[VARIABLE] = "other, stranger"  # the fixture took it away, so it does not stay
    try:
        load_model(last)
    finally:
        del os.environ[VARIABLE]
    (folder / "run" / "metrics.json").unlink()
    assert "trust=[stranger]" in refused(capsys, "train", "resume=true", f"run_dir={folder / 'run'}")
    more = {**config, "ckpt_path": str(last), "run_dir": str(folder / "more")}
    assert run({**more, "training": {**config["training"], "steps": 3}}, Console(quiet=True))["status"] == "finished"


@pytest.mark.slow
def test_nothing_in_the_working_directory_stands_in_for_what_is_installed(trained: Path, folder: Path) -> None:
    """As a process, where Python itself would put the folder first."""
    ckpt = strange(trained, folder / "bad.ckpt", **pattern(PARTS[0]))
    for argv in (["generate", str(ckpt), "x"], ["generate", str(trained), "x", "max_new_tokens=1"]):
        done = subprocess.run(
            [sys.executable, "-m", "moesaic", *argv], capture_output=True, text=True, check=False, cwd=folder
        )
        assert done.returncode == (2 if "bad" in argv[1] else 0), done.stderr
        assert not (folder / "EXECUTED").exists()


def test_the_folder_stays_on_the_path_only_for_what_came_from_it(folder: Path) -> None:
    before = list(sys.path)
    with pytest.raises(InputError, match="cannot be imported"):
        resolve("nowhere.Part", "it")
    resolve("collections.abc.Mapping", "it")
    assert sys.path == before and not (folder / "EXECUTED").exists()
    resolve("stranger.Part", "it")
    assert sys.path == [*before, os.path.realpath(folder)]


def test_python_configs_need_no_trust_but_a_part(folder: Path) -> None:
    def decoder(part: dict[str, Any]) -> object:
        layer = LayerConfig(part, "dense")
        return build_decoder(llama4_toy(pattern=(layer,), interleave_moe_layer_step=None, nope_layer_interval=None))

    decoder({"type": "stranger.Part"})
    (folder / "EXECUTED").unlink()
    for part in PARTS[1:4]:
        with pytest.raises(InputError, match="is a function of"):
            decoder(part)
    assert not (folder / "EXECUTED").exists()


def test_names_are_found_wherever_they_stand() -> None:
    config = {
        "model": {"pattern": [{"mixer": {"type": "a.B"}}], "moe": {"router": {"type": "c:D"}}},
        "callbacks": {"x": {"_target_": "e.F"}},
        "study": {"arms": {"it": {"model.moe.router.type": "g.H"}}, "evaluations": ["i.j"], "evaluation_options": {}},
        "type": 3,
    }
    assert names_in(config) == {"a.B", "c.D", "e.F", "g.H", "i.j"}
    assert names_in(json.loads(json.dumps(config))) == names_in(config)


class Pickled:
    """What a pickle can hold: a call."""

    def __reduce__(self) -> Any:
        return os.system, ("touch EXECUTED",)


def pickled_checkpoint(folder: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Pickled(), "moesaic": {}}, folder / "it.ckpt")
    load_model(folder / "it.ckpt")


def foreign_model(folder: Path) -> None:
    decoder = build_decoder(llama4_toy())
    to_hf(decoder, folder / "hf")
    stored = json.loads((folder / "hf" / "config.json").read_text())
    code = {"auto_map": {"AutoModelForCausalLM": "stranger.Part", "AutoConfig": "stranger.Part"}}
    (folder / "hf" / "config.json").write_text(json.dumps({**stored, **code, "trust_remote_code": True}))
    for name in ("stranger.py", "modeling_llama4.py", "configuration_llama4.py"):
        (folder / "hf" / name).write_text(f"{TOUCH}open({str(folder / 'EXECUTED')!r}, 'w')\n")
    from_hf(folder / "hf")
    raise InputError("read, as config.json and safetensors are all there is to read")


def foreign_weights(folder: Path) -> None:
    to_hf(build_decoder(llama4_toy()), folder / "hf")
    (folder / "hf" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Pickled()}, folder / "hf" / "pytorch_model.bin")
    from_hf(folder / "hf")


def pickled_ids(suffix: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        to_hf(build_decoder(llama4_toy()), folder / "hf")
        path = folder / f"ids{suffix}"
        if suffix == ".pt":
            torch.save({"input_ids": Pickled()}, path)
        else:
            np.save(path, np.array([[Pickled()]], dtype=object), allow_pickle=True)
        compute_logits(folder / "hf", path)

    return read


def pickle_in_place(name: str, read: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A reader of a folder in which each file is a pickle."""

    def read_it(folder: Path) -> None:
        (folder / name).mkdir()
        for file in ("config.json", "manifest.json", "tokenizer.json", "train.bin", "rows.jsonl", "config.yaml"):
            (folder / name / file).write_bytes(pickle.dumps(Pickled()))
        (folder / name / "model.safetensors").write_bytes(pickle.dumps(Pickled()))
        read(folder / name)

    return read_it


def tagged(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("name: !!python/object/new:os.system ['touch EXECUTED']\n")
    find_run({"resume": True, "run_dir": str(folder / "run")})


READERS = {
    "checkpoint": pickled_checkpoint,
    "hf folder with auto_map": foreign_model,
    "hf folder with pytorch_model.bin": foreign_weights,
    "ids in .pt": pickled_ids(".pt"),
    "ids in .npy": pickled_ids(".npy"),
    "hf": pickle_in_place("hf", from_hf),
    "memmap": pickle_in_place("ids", lambda folder: load_data(DataConfig("memmap", str(folder)))),
    "targets": pickle_in_place("targets", TargetCache.open),
    "run": pickle_in_place("run", lambda folder: find_run({"resume": True, "run_dir": str(folder)})),
    "tagged config.yaml": tagged,
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_file_of_any_kind_holds_is_not_called(folder: Path, name: str) -> None:
    with pytest.raises(InputError):
        READERS[name](folder)
    assert not (folder / "EXECUTED").exists()
