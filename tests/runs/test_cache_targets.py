"""moesaic cache-targets as a person uses it: forecast, resume after kill -9, what is refused and how it is said."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import kill_in_call

from moesaic.checkpoints import load_model, save_model
from moesaic.cli import cache_targets
from moesaic.config import from_mapping
from moesaic.data import ByteTokenizer, DataConfig, TrainingLoader, load_data
from moesaic.data.loaders import windows_at
from moesaic.distillation import (
    CachedTargets,
    CacheThrough,
    TargetCache,
    TargetFormat,
    cache_identity,
    data_settings,
    stream_keys,
)
from moesaic.distillation.fill import fill_cache
from moesaic.errors import InputError
from moesaic.losses.targets import TopKTargets
from moesaic.models import DecoderConfig, MoEConfig, build_decoder, llama4_toy

Composed = Callable[..., dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["data=files", "data.tokenizer=bytes", "seq_len=64", "batch_size=4", "windows_per_shard=8"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    toy = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32))
    path = tmp_path / "teacher.ckpt"
    torch.manual_seed(0)
    sizes = {name: getattr(toy, name) for name in toy.__dataclass_fields__}
    save_model(path, build_decoder(DecoderConfig(**{**sizes, "vocab_size": 257})), ByteTokenizer())
    return path


@pytest.fixture
def given(composed: Composed, teacher: Path, tmp_path: Path) -> Composed:
    """given("key=value", ...) -> the config of a small cache in tmp_path/targets."""

    def compose(*overrides: str) -> dict[str, Any]:
        basis = [f"teacher={teacher}", f"directory={tmp_path / 'targets'}", *SIZES]
        return composed(*basis, *overrides, config="cache_targets")

    return compose


def fill(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the cache holds, and what was printed."""
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"), width=200)  # noqa: SIM115, PTH123
    with console.file:
        found = fill_cache(config, console)
        return found, console.export_text()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.slow_but_for("top_k")
@pytest.mark.parametrize("kind", ["top_k", "sampled", "dense"])
def test_the_forecast_is_right_and_training_batches_find_their_targets(given: Composed, kind: str) -> None:
    config = given(f"kind={kind}", "k=5")
    found, printed = fill(config)
    directory = Path(config["directory"])
    [megabytes] = re.findall(r"forecast  ([\d.]+) MB", printed)
    real = sum(len(content) for content in contents(directory).values()) / 1e6
    assert float(megabytes) == pytest.approx(real, rel=0.05, abs=0.05)
    assert (" distinct ids per token" in printed) == (kind == "sampled")
    assert f"window {found['windows']:,}/{found['windows']:,}" in printed

    data = load_data(from_mapping(DataConfig, config["data"], "data"))
    cache = TargetCache.open(directory, {**data_settings(data, 64), "kind": kind, "temperature": 1.0})
    cache.verify()
    assert len(cache) == found["windows"] == (len(data.train.tokens) - 1) // 64
    source = CachedTargets(cache)
    for batch in TrainingLoader(data.train.tokens, seq_len=64, batch_size=3, num_batches=4, seed=9, fixed_windows=True):
        targets = source.targets(batch)
        if isinstance(targets, TopKTargets):
            with torch.no_grad():
                logits = load_model(config["teacher"]).decoder(batch["tokens"]).logits.flatten(0, 1)
            expected = logits.log_softmax(dim=-1).gather(1, targets.ids)
            torch.testing.assert_close(targets.log_probs, expected, rtol=2**-9, atol=2**-9)
    assert fill(config)[0]["new windows"] == 0
    assert f"distillation.cache={directory}" in cache_targets.describe(config, found)
    assert "distillation.teacher=" not in cache_targets.describe(config, found)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(given: Composed, tmp_path: Path, corpus: Path) -> None:
    sizes = [*SIZES, "seq_len=16"]  # many small shards
    config = given(*sizes, f"directory={tmp_path / 'whole'}")
    windows = fill(config)[0]["windows"]
    killed = tmp_path / "killed"
    command = [str(ROOT / "scripts" / "cache_targets.py"), *sizes]
    command += [f"teacher={config['teacher']}", f"directory={killed}", f"data.path={corpus}"]
    command += [f"data.cache_dir={tmp_path / 'cache'}"]
    # in the middle of writing a shard or the manifest
    kill_in_call("os", "fsync", random.Random(0).randrange(4, 24), command, tmp_path)

    cache = TargetCache.open(killed)
    cache.verify()
    assert 0 < len(cache) < windows
    before = contents(killed)
    found, printed = fill(given(*sizes, f"directory={killed}"))
    assert f"resumed   {len(cache):,} of {windows:,} windows are there already" in printed
    assert found["new windows"] == windows - len(cache)
    after = contents(killed)
    assert after == contents(tmp_path / "whole")
    for shard in json.loads(before["manifest.json"])["shards"]:
        assert after[shard["file"]] == before[shard["file"]]


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(given: Composed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, calls = CacheThrough.fill, itertools.count()

    def interrupted(self: CacheThrough, batch: Any) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt
        whole(self, batch)

    config = given()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CacheThrough, "fill", interrupted)
        fill(config)
    assert len(TargetCache.open(config["directory"])) == 16  # two shards of two batches
    fill(config)
    other = given(f"directory={tmp_path / 'whole'}")
    fill(other)
    assert contents(Path(config["directory"])) == contents(Path(other["directory"]))


@pytest.mark.slow_but_for("seed=true-", "windows_per_shard=6-", "accelerator=tpu-")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], r"teacher=None: it is needed \(teacher=RUN/checkpoints/last.ckpt\)"),
        (["directory=null"], r"directory=None: it is needed \(directory=targets\)"),
        (["seq_len=0"], r"seq_len=0: must be an integer >= 1"),
        (["windows_per_shard=6"], r"windows_per_shard=6: must be a multiple of batch_size=4"),
        (["kind=top_p"], r"kind: found 'top_p' \(str\) \(did you mean top_k\?\); must be top_k \| sampled \| dense"),
        (["temperature=0"], r"temperature=0.0: must be a number > 0"),
        (["k=258"], r"k=258: the vocabulary has 257 entries"),
        (["seq_len=99999999"], r"seq_len=99999999: the training split has \d+ tokens"),
        (["teacher=/nowhere"], r"teacher='/nowhere': no such file or directory"),
        (["data.tokenizer=bpe", "data.vocab_size=257"], r"its tokenizer \(bytes\) is not that of .* data \(bpe\)"),
        (["data.tokenizer=bpe", "data.vocab_size=280"], r"a vocabulary of 257, the student's has 280"),
        (["accelerator=tpu"], r"accelerator='tpu': must be"),
        (["seed=1.5"], r"seed=1.5: must be an integer"),
        (["seed=true"], r"seed=True: must be an integer"),
        (["kind=sampled", "seed=null"], r"seed=None: must be an integer"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    given: Composed, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fill(given(*overrides))
    assert not (tmp_path / "targets").exists()


def test_a_directory_of_a_run_is_no_teacher(given: Composed, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    message = r"teacher='.*run': the directory of a run; give its checkpoint, .*run/checkpoints/last.ckpt"
    with pytest.raises(InputError, match=message):
        fill(given(f"teacher={tmp_path / 'run'}"))


def read_all(config: dict[str, Any]) -> dict[int, list[Any]]:
    """The targets of every window of the data of `config`, by key."""
    tokens = load_data(from_mapping(DataConfig, config["data"], "data")).train.tokens
    cache = TargetCache.open(config["directory"])
    cache.verify()
    keys = stream_keys(tokens, 64)
    batches = [windows_at(tokens, np.array([64 * window]), 64) for window in range(len(keys))]
    return {
        key: list(cache.targets(batch["tokens"], batch["labels"]))
        for key, batch in zip(keys.tolist(), batches, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top_k", "sampled", "dense"])
def test_new_data_are_added_to_an_old_cache(given: Composed, corpus: Path, tmp_path: Path, kind: str) -> None:
    """One file that comes last leaves all windows before it alone, one in the middle moves those behind it."""
    grown = tmp_path / "grown"
    shutil.copytree(corpus, grown)
    names = sorted(file.name for file in grown.iterdir())
    config = given(f"data.path={grown}", f"kind={kind}", "k=5")
    first, _ = fill(config)
    old = contents(tmp_path / "targets")

    (grown / f"{names[-1]}.last.py").write_text("LAST = {\n" + "".join(f"    {i**3}: {i},\n" for i in range(300)))
    second, printed = fill(config)
    total = second["windows"]
    assert f"resumed   {first['windows']} of {total} windows are there already" in printed
    assert f"MB for {total - first['windows']} windows" in printed
    assert second["new windows"] == total - first["windows"] > 0
    now = contents(tmp_path / "targets")
    assert all(now[name] == content for name, content in old.items() if name.startswith("shard"))

    (grown / f"{names[len(names) // 2]}.middle.py").write_text("".join(f"x{i} = {i**2}\n" for i in range(200)))
    before = len(TargetCache.open(tmp_path / "targets"))
    third, printed = fill(config)
    missing = int(re.findall(r"MB for (\d+) windows", printed)[0])
    assert third["new windows"] == missing
    assert 0 < missing < len(read_all(config)), "what lies before it is known"
    assert third["windows"] == before + missing, "what the new grid no longer has is left alone"
    assert fill(config)[0]["new windows"] == 0
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    assert len({shard["data"] for shard in manifest["shards"]}) == 3, "the data that each shard was made for"

    anew = {**config, "directory": str(tmp_path / "anew")}
    assert fill(anew)[0]["new windows"] == len(read_all(anew))
    added, scratch = read_all(config), read_all(anew)
    assert added.keys() == scratch.keys()
    for key, targets in added.items():
        for mine, theirs in zip(targets, scratch[key], strict=True):
            # computed beside other windows: equal but for the last bits, which fp16 seldom shows
            torch.testing.assert_close(mine, theirs, rtol=2**-9, atol=2**-9)


@pytest.mark.slow
def test_text_that_comes_twice_is_computed_once(given: Composed, tmp_path: Path) -> None:
    folder = tmp_path / "repeats"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / name).write_text(f"{name}\n" + "y" * 64 * 40)
    found, printed = fill(given(f"data.path={folder}"))
    data = load_data(from_mapping(DataConfig, given(f"data.path={folder}")["data"], "data"))
    assert found["windows"] == len(set(stream_keys(data.train.tokens, 64).tolist())) < 12
    assert f"window {found['windows']}/{found['windows']}" in printed


BPE = ["data.tokenizer=bpe", "data.vocab_size=280"]


@pytest.mark.slow
def test_text_is_read_with_the_teachers_tokenizer(given: Composed, corpus: Path, tmp_path: Path) -> None:
    """Else the BPE of a larger training split would be another one, and the teacher refused."""
    tokenizer = load_data(from_mapping(DataConfig, given(*BPE)["data"], "data")).tokenizer
    assert tokenizer is not None
    toy = llama4_toy()
    sizes = {name: getattr(toy, name) for name in toy.__dataclass_fields__}
    save_model(tmp_path / "bpe.ckpt", build_decoder(DecoderConfig(**{**sizes, "vocab_size": 280})), tokenizer)
    teacher = f"teacher={tmp_path / 'bpe.ckpt'}"
    first, _ = fill(given(teacher, *BPE))
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1, "the tokens that are there are taken"

    grown = tmp_path / "grown"
    shutil.copytree(corpus, grown)
    (grown / "zzz.py").write_text("another = vocabulary(of_long, words, qwertyuiop)\n" * 99)
    other = load_data(from_mapping(DataConfig, given(*BPE, f"data.path={grown}")["data"], "data")).tokenizer
    assert other is not None
    assert other.to_dict() != tokenizer.to_dict()
    config = given(teacher, *BPE, f"data.path={grown}")
    second, printed = fill(config)
    assert f"resumed   {first['windows']} of {second['windows']} windows" in printed
    assert f" distillation.teacher={tmp_path / 'bpe.ckpt'}" in cache_targets.describe(config, second)
    for size, message in [(290, "a vocabulary of 280, the student's has 290"), (None, "has 257")]:
        data = ["data.tokenizer=bytes"] if size is None else ["data.tokenizer=bpe", f"data.vocab_size={size}"]
        with pytest.raises(InputError, match=message):
            fill(given(teacher, *data, f"data.path={grown}"))


def test_a_full_disk_is_refused(given: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"directory='.*targets': 0.0 MB free, but the targets need \d"):
        fill(given())
    assert not (tmp_path / "targets").exists()


@pytest.mark.slow
def test_a_cache_of_another_teacher_is_refused(given: Composed, teacher: Path) -> None:
    config = given()
    fill(config)
    model = load_model(teacher)
    with torch.no_grad():
        model.decoder.head.weight[0, 0] += 1e-3
    changed = teacher.with_name("changed.ckpt")
    save_model(changed, model.decoder, model.tokenizer)
    with pytest.raises(InputError, match=r"is stale: made by a teacher with other weights"):
        fill(given(f"teacher={changed}"))
    data = load_data(from_mapping(DataConfig, config["data"], "data"))
    of = cache_identity(load_model(teacher).decoder, data, seq_len=64, form=TargetFormat())
    TargetCache.open(config["directory"], of.settings())


@pytest.mark.slow
def test_the_command_line(given: Composed, teacher: Path, tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "cache_targets.py")]
    refused = subprocess.run([*command, "sequence=3"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: sequence: unknown key; must be one of data, teacher, directory, seq_len, ")
    command += [*SIZES, f"teacher={teacher}", "directory=targets", f"data.path={corpus}", "seq_len=128"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = "moesaic train experiment=codistill_cached distillation.cache=targets training.seq_len=128"
    assert told in done.stdout and done.stdout.endswith(f" data.path={corpus}\n")
    assert (tmp_path / "targets" / "manifest.json").exists()
