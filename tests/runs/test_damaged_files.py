"""Damage to every kind of file that is read: an InputError that names the file, or what the file meant before."""

import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moesaic import checkpoints
from moesaic.checkpoints import load_checkpoint, load_model, save_model
from moesaic.cli import evaluate
from moesaic.cli.convert import convert
from moesaic.cli.generate import generate_text
from moesaic.config import from_mapping, to_mapping
from moesaic.data import BPETokenizer, DataConfig, load_data
from moesaic.data.sharding import write_shards
from moesaic.distillation import CacheIdentity, TargetCache, TargetFormat
from moesaic.errors import InputError
from moesaic.evaluation.plots import read_columns
from moesaic.evaluation.results import ResultFile, is_numbers
from moesaic.evaluation.sampling import SampleConfig
from moesaic.files import old_of, write_json, write_yaml
from moesaic.interop import from_hf, to_hf
from moesaic.losses.targets import DenseTargets
from moesaic.models import build_decoder, llama4_toy
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import write_row
from moesaic.studies.plan import plan
from moesaic.studies.runner import read_rows
from moesaic.studies.sweep import write_report
from moesaic.studies.worker import work
from moesaic.training.records import CsvTable, environment
from moesaic.training.run import run
from moesaic.training.starting import find_run
from moesaic.training.stored_state import require_training_state

VALUES = ("text", ["list"], None, math.nan, 10**30)

TOKENS = torch.arange(12)[None]

STUDY = {"question": "?", "equal": "=", "baseline": "a", "arms": {"a": {}}, "seeds": [0], "tune": None}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file: how to read one in `folder`, with a meaning that can be compared."""

    file: str
    read: Callable[[Path], Any]
    load: Callable[[bytes], Any] | None = None
    dump: Callable[[Any], bytes] | None = None
    parts: tuple[tuple[str, ...], ...] = ((),)
    """Where in its content keys are dropped and values replaced."""
    whole: bool = False
    """Whether a changed value is damage too: the file has a hash of it."""


# ---- the good files


@pytest.fixture(scope="module")
def good(train_once: Callable[..., Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good file, or folder, of each kind."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train([path.read_bytes() for path in corpus.iterdir()], 260)
    decoder = build_decoder(llama4_toy(tokenizer.vocab_size, num_layers=2, nope_layer_interval=0))
    save_model(folder / "weights.ckpt", decoder, tokenizer, seq_len=8)
    to_hf(decoder, folder / "hf")
    convert(folder / "weights.ckpt", folder / "hf_text")
    run = train_once("data.tokenizer=bpe", "data.vocab_size=300")
    for name in ("config.yaml", "metrics.csv", "routing.csv", "environment.json", "metrics.json"):
        (folder / "run").mkdir(exist_ok=True)
        shutil.copy(run / name, folder / "run" / name)
    metrics = json.loads((run / "metrics.json").read_text())
    write_json(folder / "run" / "metrics.json", {**metrics, "status": "stopped"})
    (folder / "run" / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", folder / "run" / "checkpoints" / "last.ckpt")
    load_data(data_config(corpus, folder / "tokens"))
    (folder / "tokens" / next((folder / "tokens").iterdir()).name).rename(folder / "stream")
    make_study(folder / "study")
    make_targets(folder / "targets")
    for place, whole in (("tokenized", True), ("begun", False)):
        make_ids(folder / place, corpus, whole)
    make_study_run(folder / "study_run")
    results = ResultFile(folder / "scores" / "it.json", {"task": "it", "edges": [1, 2]})
    results.done["as_trained"], results.summary["as_trained"] = [[1.0, 2.0]], [{"loss": 1.5}]
    results.save()
    return folder


def data_config(corpus: Path, cache: Path) -> DataConfig:
    return DataConfig("files", str(corpus), tokenizer="bpe", vocab_size=300, cache_dir=str(cache))


def base_config() -> dict[str, Any]:
    model = {**to_mapping(llama4_toy()), "vocab_size": None}
    return {
        "name": "it",
        "seed": 0,
        "model": model,
        "training": {"steps": 4, "batch_size": 2, "seq_len": 16},
        "data": {},
    }


def make_study(folder: Path) -> None:
    study, base = from_mapping(StudyConfig, STUDY), base_config()
    job = plan(study, base, {}).missing[0]
    row = {
        **{"format": 2, **dataclasses.asdict(job), "status": "finished", "error": None, "commit": "c0ffee"},
        **{"uncommitted_changes": False, "torch": "2", "data_hash": "d", "config_hash": "h", "cpu_seconds": 40.0},
        "metrics": {"validation/bits_per_byte": 1.25},
        "curve": {"metric": "validation/bits_per_byte", "tokens": [1, 2], "values": [2.0, 1.25]},
    }
    folder.mkdir()
    (folder / "rows.jsonl").write_text(write_row(row) + "\n")
    write_yaml(folder / "config.yaml", {**base, "study": {"evaluations": [], "evaluation_options": {}}})


def make_targets(folder: Path) -> None:
    identity = CacheIdentity("t" * 64, None, 4, 8, TargetFormat("dense"))
    cache = TargetCache.create(folder, identity)
    tokens = torch.arange(9).remainder(8)[None]
    cache.add(tokens[:, :4], tokens[:, 1:5], DenseTargets(torch.linspace(-1, 1, 32).reshape(4, 8)))
    cache.close()


def ids_config(folder: Path) -> DataConfig:
    return DataConfig("files", str(folder / "text"), tokenizer="bytes", cache_dir=str(folder / "cache"))


def make_ids(folder: Path, corpus: Path, whole: bool) -> None:
    """What moesaic tokenize writes, or what it leaves that was stopped in the middle."""
    shutil.copytree(corpus, folder / "text")

    def stop(what: str, done: int, total: int) -> None:
        if not whole and what == "bytes of text" and done > total / 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_shards(ids_config(folder), folder / "ids", shard_bytes=4000, tell=stop)


def make_study_run(folder: Path) -> None:
    """A finished run of a study, as far as its row needs it."""
    (folder / "run").mkdir(parents=True)
    job = {"row": {"arm": "a", "purpose": "measure", "overrides": {}}, "config": base_config(), "metric": "x/y"}
    write_json(folder / "job.json", {**job, "variants": {}, "evaluations": [], "evaluation_options": {}})
    write_json(folder / "run" / "metrics.json", {"status": "finished", "x/y": 1.5})
    write_json(folder / "run" / "environment.json", environment())
    (folder / "run" / "metrics.csv").write_text("step,tokens,seconds,active_flops,train/loss,validation/loss\n")
    (folder / "cpu_seconds").write_text("2.5")


# ---- what they mean


def of_model(folder: Path) -> Any:
    model = load_model(folder / "weights.ckpt")
    assert model.tokenizer is not None and model.token_bytes is not None
    with torch.no_grad():
        logits = model.decoder(TOKENS).logits
    return logits.tolist(), model.tokenizer.to_dict(), model.token_bytes.tolist(), model.run_config["training"]


def of_training(folder: Path) -> Any:
    path = folder / "run" / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    require_training_state(checkpoint, f"checkpoint {path}")
    with torch.no_grad():
        stream = io.BytesIO()
        torch.save({key: checkpoint[key] for key in sorted(checkpoint)}, stream)
    return stream.getvalue()


def of_hf(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        with torch.no_grad():
            return from_hf(folder / name)(TOKENS).logits.tolist()

    return read


def of_hf_tokenizer(folder: Path) -> Any:
    (folder / "out.ckpt").unlink(missing_ok=True)
    convert(folder / "hf_text", folder / "out.ckpt")
    tokenizer = load_model(folder / "out.ckpt").tokenizer
    return None if tokenizer is None else tokenizer.encode(b"def f(x): return x").tolist()


def of_run(folder: Path) -> Any:
    config = find_run({"resume": True, "run_dir": str(folder / "run")}).config
    return {key: value for key, value in config.items() if key != "run_dir"}


def of_tables(folder: Path) -> Any:
    for name in ("metrics.csv", "routing.csv"):
        CsvTable(folder / "run" / name, []).keep_until(10**9)
    return [column.tolist() for column in read_columns(folder / "run" / "metrics.csv", "step", "train/loss")]


def of_report(folder: Path) -> Any:
    return write_report(folder / "run").replace(str(folder), "")


def of_stream(folder: Path) -> Any:
    data = load_data(DataConfig("memmap", str(folder / "stream")))
    assert data.tokenizer is not None
    facts = {key: value for key, value in data.facts.items() if key != "source"}
    streams = [(np.array(x.tokens).tolist(), x.num_bytes) for x in (data.train, data.validation)]
    return streams, data.tokenizer.to_dict(), facts


def of_study(folder: Path) -> Any:
    return read_rows(folder / "study", from_mapping(StudyConfig, STUDY), base_config())


def of_targets(folder: Path) -> Any:
    cache = TargetCache.open(folder / "targets", {"teacher": "t" * 64, "seq_len": 4, "vocab_size": 8, "kind": "dense"})
    cache.verify()
    tokens = torch.arange(9).remainder(8)[None]
    return [x.tolist() for x in cache.targets(tokens[:, :4], tokens[:, 1:5]) if isinstance(x, torch.Tensor)]


def of_results(folder: Path) -> Any:
    results = ResultFile(folder / "scores" / "it.json", {"task": "it", "edges": [1, 2]})
    return results.rows("as_trained", lambda rows: isinstance(rows, list) and all(is_numbers(row, 2) for row in rows))


def of_ids(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        config = ids_config(folder / name)
        write_shards(config, folder / name / "ids", shard_bytes=4000)
        data = load_data(dataclasses.replace(config, source="memmap", path=str(folder / name / "ids")))
        facts = {key: value for key, value in data.facts.items() if key != "source"}
        return [(np.array(x.tokens).tolist(), x.num_bytes) for x in (data.train, data.validation)], facts

    return read


def of_study_run(folder: Path) -> Any:
    [row] = work(folder / "study_run")
    return {key: value for key, value in row.items() if key != "cpu_seconds"}


def torch_load(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def torch_dump(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


JSON: dict[str, Any] = {"load": json.loads, "dump": lambda content: json.dumps(content).encode()}
YAML: dict[str, Any] = {"load": yaml.safe_load, "dump": lambda content: yaml.safe_dump(content).encode()}
CKPT: dict[str, Any] = {"load": torch_load, "dump": torch_dump}

HEADER: tuple[tuple[str, ...], ...] = (("hyper_parameters",), ("moesaic",), ())
STATE: tuple[tuple[str, ...], ...] = (("loops", "fit_loop"), ("lr_schedulers",), ("callbacks",), ("moesaic",))

KINDS = {
    "checkpoint": Kind("weights.ckpt", of_model, **CKPT, parts=HEADER),
    "training checkpoint": Kind("run/checkpoints/last.ckpt", of_training, **CKPT, parts=STATE),
    "config.yaml": Kind("run/config.yaml", of_run, **YAML),
    "metrics.json": Kind("run/metrics.json", of_report, **JSON),
    "config.yaml of a report": Kind("run/config.yaml", of_report, **YAML),
    "metrics.csv": Kind("run/metrics.csv", of_tables),
    "metrics.csv of a report": Kind("run/metrics.csv", of_report),
    "routing.csv": Kind("run/routing.csv", of_tables),
    "manifest.json": Kind("stream/manifest.json", of_stream, **JSON, whole=True),
    "train.bin": Kind("stream/train.bin", of_stream, whole=True),
    "tokenizer.json": Kind("stream/tokenizer.json", of_stream, **JSON, whole=True),
    "rows.jsonl": Kind("study/rows.jsonl", of_study, **JSON, whole=True),
    "config.yaml of a study": Kind("study/config.yaml", of_study, **YAML),
    "manifest.json of targets": Kind("targets/manifest.json", of_targets, **JSON),
    "shard of targets": Kind("targets/shard-00000.safetensors", of_targets, whole=True),
    "manifest.json of tokenize": Kind("tokenized/ids/manifest.json", of_ids("tokenized"), **JSON, whole=True),
    "tokenizer.json of tokenize": Kind("tokenized/ids/tokenizer.json", of_ids("tokenized"), **JSON, whole=True),
    "begun.json": Kind("begun/ids/begun.json", of_ids("begun"), **JSON, whole=True),
    "done.jsonl": Kind("begun/ids/done.jsonl", of_ids("begun")),
    "shard that is begun": Kind("begun/ids/train-00000.bin", of_ids("begun"), whole=True),
    "environment.json of a study": Kind("study_run/run/environment.json", of_study_run, **JSON),
    "metrics.json of a study": Kind("study_run/run/metrics.json", of_study_run, **JSON),
    "job.json": Kind("study_run/job.json", of_study_run, **JSON, parts=(("row",), ())),
    "cpu_seconds": Kind("study_run/cpu_seconds", of_study_run),
    "results": Kind("scores/it.json", of_results, **JSON),
    "config.json": Kind("hf/config.json", of_hf("hf"), **JSON),
    "model.safetensors": Kind("hf/model.safetensors", of_hf("hf")),
    "tokenizer.json of hf": Kind("hf_text/tokenizer.json", of_hf_tokenizer, **JSON),
}

UNHASHED = (
    *("metrics.csv", "routing.csv", "config.yaml", "metrics.json", "results", "config.json"),
    *("environment.json", "job.json", "cpu_seconds"),
)
"""Kinds, by a part of the name, in which one changed byte may be another value that the format allows."""


# ---- damage


def broken_bytes(content: bytes, flips: int) -> Iterator[tuple[str, bytes]]:
    """Content that was cut, replaced, or has one bit flipped."""
    draw = random.Random(0)
    yield "empty", b""
    yield "garbage", draw.randbytes(500)
    yield "NULs", bytes(len(content))
    yield "text", b"\xff\xfe not what it was"
    for share in (0.02, 0.3, 0.6, 0.98):
        yield f"cut at {share}", content[: int(share * len(content))]
    for _ in range(flips):
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        yield f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def broken_values(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """(what, where, value) of each key that is dropped, and of each value that is replaced."""
    items = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(tree, dict):
            yield f"without {(*place, key)}", (*place, key), KeyError
        for other in VALUES:
            if type(other) is not type(value) or other != value:
                yield f"{(*place, key)} is {other!r}", (*place, key), other
        yield from broken_values(value, (*place, key))


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = copy.copy(tree)
    if len(place) > 1:
        tree[place[0]] = changed(tree[place[0]], place[1:], value)
    elif value is KeyError:
        del tree[place[0]]
    else:
        tree[place[0]] = value
    return tree


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    return at(tree[place[0]], place[1:]) if place else tree


def cases(kind: Kind, content: bytes) -> list[tuple[str, Callable[[], bytes], bool]]:
    """(what, what makes the content, whether another value may be meant)."""
    found: list[tuple[str, Callable[[], bytes], bool]] = [
        (what, lambda broken=broken: broken, False)  # type: ignore[misc]
        for what, broken in broken_bytes(content, flips=40 if "ckpt" in kind.file else 12)
    ]
    load, dump = kind.load, kind.dump
    if load is None or dump is None:
        return found
    tree = load(content)
    for part in kind.parts:
        is_whole = part or len(kind.parts) == 1
        edits = broken_values(at(tree, part), part) if is_whole else ((key, (key,), KeyError) for key in tree)
        for what, place, value in edits:
            made = lambda place=place, value=value: dump(changed(tree, place, value))  # noqa: E731
            found.append((what, made, True))
    return found


def check(kind: Kind, name: str, good: Path, folder: Path, every: int) -> tuple[int, int]:
    """Damage a copy in many ways; returns how many, and how many of them were refused."""
    place = folder / kind.file
    root = kind.file.split("/")[0]

    def fresh() -> None:
        for path in [folder / root] if (folder / root).is_dir() else []:
            shutil.rmtree(path)
        source = good / root
        shutil.copytree(source, folder / root) if source.is_dir() else shutil.copy(source, folder / root)

    fresh()
    meant = kind.read(folder)
    content = (good / kind.file).read_bytes()
    tried = refused = 0
    for what, broken, is_edit in cases(kind, content)[::every]:
        fresh()
        place.write_bytes(broken())
        tried += 1
        try:
            found = kind.read(folder)
        except InputError as error:
            refused += 1
            parts = {place.name, place.parent.name, root}
            assert any(part in str(error) for part in parts), f"{name}, {what}: no file in {error}"
            continue
        if is_edit and not kind.whole:
            continue  # another value that the key allows
        if any(word in name for word in UNHASHED):
            continue
        assert found == meant, f"{name}, {what}: accepted with another meaning"
    return tried, refused


QUICK = {
    **{"checkpoint": 9, "training checkpoint": 97, "config.yaml": 67, "config.yaml of a report": 131},
    **{
        "metrics.json": 61,
        "metrics.json of a study": 9,
        "rows.jsonl": 3,
        "metrics.csv of a report": 3,
        "config.yaml of a study": 11,
        "config.json": 5,
        "tokenizer.json of hf": 151,
        "manifest.json of tokenize": 7,
    },
}
"""Of these kinds `make test` takes one of so many cases, of all others every one."""


@pytest.mark.slow_but_for("train.bin", "shard of targets", "model.safetensors", "tokenizer.json", "job.json")
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_or_harmless(name: str, good: Path, tmp_path: Path) -> None:
    every = QUICK.get(name, 1)
    tried, refused = check(KINDS[name], name, good, tmp_path, every)
    assert refused >= 2 or "report" in name or name in ("metrics.json", "done.jsonl"), (tried, refused)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_more_damage_is_refused_or_harmless(name: str, good: Path, tmp_path: Path) -> None:
    count = len(cases(KINDS[name], (good / KINDS[name].file).read_bytes()))
    assert check(KINDS[name], name, good, tmp_path, max(1, count // 250))[0] > 15


def test_there_are_three_thousand(good: Path) -> None:
    counts = {name: len(cases(kind, (good / kind.file).read_bytes())) for name, kind in KINDS.items()}
    assert sum(counts.values()) > 3000, counts


# ---- single cases


def test_one_flipped_bit_in_forty_places(good: Path, tmp_path: Path) -> None:
    """Of a checkpoint's tensors none goes unseen; elsewhere the file may be as it was."""
    content = bytearray((good / "weights.ckpt").read_bytes())
    stored = torch.load(good / "weights.ckpt", weights_only=True)["state_dict"]
    draw = random.Random(1)
    for name in draw.sample(sorted(stored), k=min(40, len(stored))):
        begins = bytes(content).index(stored[name].numpy().tobytes()[:64])
        at = begins + draw.randrange(min(64, stored[name].nbytes))
        broken = bytearray(content)
        broken[at] ^= 1 << draw.randrange(8)
        (tmp_path / "it.ckpt").write_bytes(broken)
        with pytest.raises(InputError, match=r"it\.ckpt: damaged, the checksum of .* in it is wrong"):
            load_model(tmp_path / "it.ckpt")


def test_a_key_of_a_newer_version_is_said_to_be_one(good: Path, tmp_path: Path) -> None:
    content = torch.load(good / "weights.ckpt", weights_only=True)
    content["hyper_parameters"]["model"]["new_option"] = 1
    torch.save(content, tmp_path / "it.ckpt")
    with pytest.raises(InputError, match=r"it\.ckpt: model\.new_option: unknown key.*; a newer version of moesaic may"):
        load_model(tmp_path / "it.ckpt")


def test_weights_that_are_nan(good: Path, tmp_path: Path) -> None:
    content = torch.load(good / "weights.ckpt", weights_only=True)
    content["state_dict"]["decoder.norm.weight"][3] = math.nan
    torch.save(content, tmp_path / "it.ckpt")
    with pytest.raises(InputError, match=r"it\.ckpt: norm\.weight holds numbers that are not finite"):
        generate_text(str(tmp_path / "it.ckpt"), SampleConfig())


def test_evaluate_refuses_weights_that_are_nan_too(good: Path, tmp_path: Path, composed: Any) -> None:
    content = torch.load(good / "weights.ckpt", weights_only=True)
    content["state_dict"]["decoder.norm.weight"][3] = math.nan
    torch.save(content, tmp_path / "it.ckpt")
    for task in ("score", "loss_by_position"):
        config = composed(f"checkpoint={tmp_path / 'it.ckpt'}", f"task={task}", config="evaluate", smoke=False)
        with pytest.raises(InputError, match=r"checkpoint .*it\.ckpt: norm\.weight holds numbers that are not finite"):
            (evaluate.evaluate if task == "score" else evaluate.evaluate_long_context)(config)


LOADER = ("loops", "fit_loop", "state_dict", "combined_loader", 0)


@pytest.mark.slow_but_for(
    "place16-9-epoch=9: the loops are in epoch 1",
    "place15-40-global_step=40: the loops have made 20 steps",
    "place11-3-next_batch=3: must be 20 at global_step=20",
    "place13-value13-damaged",
)
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("optimizer_states", 0, "state", 3), KeyError, r"optimizer_states\[0\]\.state\.3: found 0 steps; must be 20"),
        (("optimizer_states", 0, "state", 3, "step"), torch.tensor(7.0), r"state\.3: found 7 steps; must be 20"),
        (("optimizer_states", 0, "state", 3, "step"), torch.tensor(21.0), r"3\.step=21: must be 1 to global_step=20"),
        (("optimizer_states", 0, "state", 3, "momentum_buffer"), KeyError, r"3\.momentum_buffer: missing"),
        (("optimizer_states", 0, "state", 3, "momentum_buffer"), torch.tensor(math.nan), r"3\.momentum_buffer: must"),
        (("optimizer_states", 0, "state", 48, "exp_avg"), KeyError, r"state\.48\.exp_avg: missing"),
        (("optimizer_states",), [], "must|damaged"),
        (("lr_schedulers", 0, "last_epoch"), -5, r"last_epoch=-5: must be 20 at global_step=20"),
        (("lr_schedulers", 0, "last_epoch"), 21, r"last_epoch=21: must be 20 at global_step=20"),
        (("lr_schedulers", 0, "base_lrs"), [0.1], r"base_lrs: must be 4 rates >= 0"),
        ((*LOADER, "next_batch"), 10**9, r"next_batch=1000000000: must be 20 at global_step=20"),
        ((*LOADER, "next_batch"), 3, r"next_batch=3: must be 20 at global_step=20"),
        ((*LOADER, "offset"), 10**9, r"offset=1000000000: .* sequences of 64 were read, but 2560 tokens trained"),
        (LOADER[:-1], [], "damaged"),
        (("loops", "fit_loop", "epoch_loop.batch_progress", "total", "ready"), 7, r"total\.ready=7: must be 20"),
        (("global_step",), 40, r"global_step=40: the loops have made 20 steps"),
        (("epoch",), 9, r"epoch=9: the loops are in epoch 1"),
        (("moesaic", "progress", "tokens_per_step"), -1, r"moesaic\.progress: found .*; must be counts"),
        (("moesaic", "progress", "step"), 10**9, r"moesaic\.progress: found .*; must be counts"),
        (("moesaic", "seconds"), -1.0, r"moesaic\.seconds=-1\.0: must be a number >= 0"),
        (("moesaic", "nats"), torch.tensor(math.nan), r"moesaic\.nats: must be one finite number"),
        (("moesaic", "logged_load", "nowhere"), torch.ones(4), r"moesaic\.logged_load\.nowhere: must be a layer"),
        (("state_dict", "decoder.norm.weight"), torch.full((16,), math.inf), r"decoder\.norm\.weight holds numbers"),
    ],
)
def test_counters_of_a_checkpoint_belong_together(
    good: Path, tmp_path: Path, place: tuple[Any, ...], value: Any, message: str
) -> None:
    content = torch.load(good / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(changed(content, place, value), tmp_path / "it.ckpt")
    checkpoint = load_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(InputError, match=rf"it\.ckpt: .*({message})"):
        require_training_state(checkpoint, f"checkpoint {tmp_path / 'it.ckpt'}")


def resumed(run_dir: Path) -> None:
    run({"resume": True, "run_dir": str(run_dir)})


@pytest.mark.slow_but_for("routing.csv")
@pytest.mark.parametrize("name", ["metrics.csv", "routing.csv"])
def test_a_damaged_table_is_named_before_a_run_goes_on(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(good / "run", tmp_path / "run")
    before = (tmp_path / "run" / "metrics.json").read_text()
    lines = (tmp_path / "run" / name).read_text().splitlines()
    for damaged in ("\n".join([lines[0], "garbage", *lines[1:]]), "garbage\n" * 4):
        (tmp_path / "run" / name).write_text(damaged)
        with pytest.raises(InputError, match=rf"{name}: (line 2: damaged|found columns)"):
            resumed(tmp_path / "run")
        assert (tmp_path / "run" / name).read_text() == damaged
    assert (tmp_path / "run" / "metrics.json").read_text() == before


@pytest.mark.parametrize("what", ["folder", "pipe", "link to nowhere", "file for the folder"])
def test_what_stands_in_place_of_a_checkpoint_is_refused_and_kept(good: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(good / "run", tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.unlink()
    if what == "folder":
        last.mkdir()
    elif what == "pipe":
        os.mkfifo(last)
    elif what == "link to nowhere":
        last.symlink_to(tmp_path / "elsewhere.ckpt")
    else:
        last.parent.rmdir()
        last.parent.write_text("x")
    with pytest.raises(
        InputError, match=r"checkpoints(/last\.ckpt)?: (a directory|a pipe|no such file; a link|must be a d)"
    ):
        resumed(tmp_path / "run")
    if what != "file for the folder":
        with pytest.raises(InputError, match=r"last\.ckpt: (a directory; must be a file|a pipe|no such file; a link)"):
            load_checkpoint(last)
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_a_finished_run_without_its_checkpoint_is_not_begun_again(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last.ckpt").unlink()
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    write_json(tmp_path / "run" / "metrics.json", {**metrics, "status": "finished"})
    assert find_run({"resume": True, "run_dir": str(tmp_path / "run")}).kind == "finished"
    write_json(tmp_path / "run" / "metrics.json", {**metrics, "status": "finished", "pending": "pictures"})
    with pytest.raises(
        InputError, match=r"last\.ckpt: missing, and .*metrics\.json has a score; put the checkpoint back"
    ):
        find_run({"resume": True, "run_dir": str(tmp_path / "run")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.num_layers": 10**9}, "model.num_layers=1000000000: the weights are of 2 layers"),
        ({"model.dim": 10**9}, "damaged|do not fit its config|must be"),
        ({"model.moe.num_experts": 10**12}, "do not fit its config|damaged|must be"),
        ({"model.vocab_size": 10**18}, "do not fit its config|damaged|must be"),
    ],
)
def test_sizes_are_compared_before_anything_is_made(
    good: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = torch.load(good / "weights.ckpt", weights_only=True)
    for key, value in change.items():
        content["hyper_parameters"] = changed(content["hyper_parameters"], tuple(key.split(".")), value)
    torch.save(content, tmp_path / "it.ckpt")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "it.ckpt")


def test_a_cache_that_was_made_without_hashes_gets_them_once(corpus: Path, tmp_path: Path) -> None:
    config = data_config(corpus, tmp_path)
    first = load_data(config)
    (manifest,) = tmp_path.glob("*/manifest.json")
    sealed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in sealed.items() if key != "sha256"}))
    assert np.array_equal(load_data(config).train.tokens, first.train.tokens)
    assert json.loads(manifest.read_text()) == sealed
    stream = manifest.with_name("train.bin")
    content = stream.read_bytes()
    stream.write_bytes(bytes(len(content)))  # other ids of the vocabulary
    assert np.array_equal(load_data(config).train.tokens, np.frombuffer(content, np.uint16)), "made anew"


def test_a_state_that_names_files_elsewhere_is_refused(good: Path) -> None:
    """ModelCheckpoint removes what its state names."""
    checkpoint = load_checkpoint(good / "run" / "checkpoints" / "last.ckpt")
    (name,) = [key for key in checkpoint["callbacks"] if key.startswith("ModelCheckpoint")]
    folder = checkpoint["callbacks"][name]["dirpath"]
    checkpoint["callbacks"][name]["best_k_models"] = {f"{folder}/../../x": torch.zeros(())}
    with pytest.raises(InputError, match="must be a file in the folder of the checkpoints"):
        require_training_state(checkpoint, "it")


def test_rows_without_a_digest_are_as_before(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good / "study", tmp_path / "study")
    meant = of_study(tmp_path)
    rows = tmp_path / "study" / "rows.jsonl"
    row = json.loads(rows.read_text())
    assert list(row)[-1] == "digest"
    del row["digest"]
    rows.write_text(json.dumps(row) + "\n")
    assert of_study(tmp_path) == meant
    rows.write_text(rows.read_text() + json.dumps({**row, "digest": "0" * 16}) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: damaged, its content has not the digest '0000000000000000'"):
        of_study(tmp_path)


def test_a_checkpoint_that_is_put_back_while_it_is_read_is_read(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of several ranks puts back what a kill had left aside, and another has just looked for it there."""
    path = tmp_path / "it.ckpt"
    shutil.copy(good / "weights.ckpt", old_of(path))
    found = checkpoints.standing

    def stale(asked: Path) -> Path:
        there = found(asked)
        if there == old_of(path) and len(seen) == 1:  # once it has been seen to be a checkpoint
            there.rename(path)
        seen.append(there)
        return there

    seen: list[Path] = []
    monkeypatch.setattr(checkpoints, "standing", stale)
    assert load_checkpoint(path)["state_dict"].keys() == load_checkpoint(good / "weights.ckpt")["state_dict"].keys()
    assert seen[1] == old_of(path) and not old_of(path).exists()
