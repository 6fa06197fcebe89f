"""Codistilled runs end to end: frozen, joint, cached and cache-through; what they leave, refuse and survive."""

import csv
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moesaic.checkpoints import load_checkpoint, load_model, save_model
from moesaic.cli import evaluate, generate
from moesaic.config import from_mapping
from moesaic.data import ByteTokenizer, DataConfig, TrainingLoader, load_data
from moesaic.distillation import CacheThrough, TargetCache, stream_keys
from moesaic.distillation.fill import fill_cache
from moesaic.errors import InputError
from moesaic.models import DecoderConfig, MoEConfig, account, build_decoder, llama4_toy
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]

SMALL_TEACHER = ["distillation.teacher_model.dim=24", "distillation.teacher_model.hidden_dim=64"]
SMALL_TEACHER += ["distillation.teacher_model.moe.hidden_dim=32"]


def make_teacher(path: Path, seed: int = 0, vocab_size: int = 257) -> Path:
    toy = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, expert_bias=True))
    sizes = {name: getattr(toy, name) for name in toy.__dataclass_fields__}
    torch.manual_seed(seed)
    decoder = build_decoder(DecoderConfig(**{**sizes, "vocab_size": vocab_size}))
    save_model(path, decoder, ByteTokenizer() if vocab_size == 257 else None)
    return path


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "teacher.ckpt")


@pytest.fixture
def cache(composed: Composed, teacher: Path, tmp_path: Path) -> Path:
    """A complete one for windows of 64 tokens."""
    return make_cache(composed, teacher, tmp_path / "targets")


def make_cache(composed: Composed, teacher: Path, directory: Path, *overrides: str) -> Path:
    sizes = ["data=files", "data.tokenizer=bytes", "seq_len=64", "batch_size=4", "windows_per_shard=8", "k=5"]
    sizes += [f"teacher={teacher}", f"directory={directory}", *overrides]
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        fill_cache(composed(*sizes, config="cache_targets"), Console(file=nowhere))
    return directory


def rows(run_dir: Path, table: str = "metrics.csv") -> list[dict[str, str]]:
    with (run_dir / table).open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in csv.DictReader(file)
        ]


def states(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def trained(config: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    metrics = run({**config, "run_dir": str(run_dir)})
    assert metrics["status"] == "finished"
    assert metrics == json.loads((run_dir / "metrics.json").read_text())
    logged = [row for row in rows(run_dir) if row["train/loss"]]
    for name in ("soft_weight", "loss_gap", "hard", "soft", "teacher_loss", "agreement"):
        assert all(row[f"distillation/{name}"] for row in logged), name
    assert all(row["train/loss"] == row["distillation/hard"] for row in logged)
    for name in ("soft_weight", "loss_gap", "hard", "soft", "agreement"):
        assert metrics[f"distillation/{name}"] == float(logged[-1][f"distillation/{name}"]), name
    return metrics


# ---- the three sources


@pytest.mark.slow  # test_precisions[frozen-...] runs the same without the pictures
@pytest.mark.usefixtures("with_plots")
def test_frozen(composed: Composed, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed(
        "experiment=codistill_frozen", f"distillation.teacher={teacher}", "distillation.soft_weight.gap=null"
    )
    metrics = trained(config, tmp_path / "it")
    assert (tmp_path / "it" / "plots" / "distillation.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "frozen: " in shown
    assert "its teacher" in shown
    assert metrics["validation/teacher_loss"] > 5, "it was never trained"
    assert metrics["parameters/teacher_total"] == sum(p.numel() for p in load_model(teacher).decoder.parameters())
    last = rows(tmp_path / "it")[-1]
    assert float(last["teacher_flops"]) == pytest.approx(metrics["teacher_flops"])
    assert not any(name.startswith("teacher") for name in states(tmp_path / "it"))

    plain = run({**composed(), "run_dir": str(tmp_path / "plain")})
    assert plain["active_flops"] == metrics["active_flops"]
    assert "teacher_flops" not in plain
    assert not any(name.startswith("distillation/") for name in plain)
    first, other = (float(rows(tmp_path / name)[0]["train/loss"]) for name in ("it", "plain"))
    assert first == pytest.approx(other, rel=1e-6), "the same student begins with the same batch"
    assert "distillation/hard" not in rows(tmp_path / "plain")[0]


@pytest.mark.slow
def test_joint_leaves_a_student_and_a_teacher_that_equals_a_run_of_its_own(composed: Composed, tmp_path: Path) -> None:
    bias = ["model.moe.expert_bias=true", "balance.expert_bias_update_rate=0.01", "training.accumulate=2"]
    config = composed("experiment=codistill_joint", *SMALL_TEACHER, *bias)
    metrics = trained(config, tmp_path / "both")
    alone = composed(*bias)
    given = config["distillation"]["teacher_model"]
    for key, value in given.items():
        alone["model"][key] = {**alone["model"][key], **value} if isinstance(value, dict) else value
    solo = run({**alone, "run_dir": str(tmp_path / "solo")})
    theirs = load_model(tmp_path / "both" / "checkpoints" / "teacher.ckpt")
    assert_equal(
        theirs.decoder.state_dict(), load_model(tmp_path / "solo" / "checkpoints" / "last.ckpt").decoder.state_dict()
    )
    assert metrics["validation/teacher_loss"] == solo["validation/loss"]
    assert metrics["teacher_flops"] == solo["active_flops"]
    assert metrics["parameters/teacher_total"] == solo["parameters/total"]
    for mine, other in zip(rows(tmp_path / "both"), rows(tmp_path / "solo"), strict=True):
        assert mine["teacher/grad_norm"] == other["train/grad_norm"]
        assert mine["validation/teacher_loss"] == other["validation/loss"]
        if mine["train/loss"]:
            assert float(mine["distillation/teacher_loss"]) == pytest.approx(float(other["train/loss"]), rel=1e-6)

    student = load_model(tmp_path / "both" / "checkpoints" / "last.ckpt")
    assert student.config.dim == 16
    assert sum(p.numel() for p in student.decoder.parameters()) == metrics["parameters/total"]
    teacher = tmp_path / "both" / "checkpoints" / "teacher.ckpt"
    next_one = composed("experiment=codistill_frozen", f"distillation.teacher={teacher}", "training.steps=2")
    assert trained(next_one, tmp_path / "next")["validation/teacher_loss"] == metrics["validation/teacher_loss"]


@pytest.mark.slow
def test_cached(
    composed: Composed, teacher: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("experiment=codistill_cached", f"distillation.cache={cache}", "training.accumulate=2")
    metrics = trained(config, tmp_path / "first")
    assert "complete" in capsys.readouterr().out
    assert metrics["teacher_flops"] == 0
    assert "validation/teacher_loss" not in metrics
    # a second student of another kind, from the same cache
    dense = composed("experiment=codistill_cached", f"distillation.cache={cache}", "model.dense_twin=true")
    trained(dense, tmp_path / "second")
    # with the teacher beside a complete cache, nothing is computed and nothing is different
    both = composed(
        "experiment=codistill_cached",
        f"distillation.cache={cache}",
        f"distillation.teacher={teacher}",
        "training.accumulate=2",
    )
    assert trained(both, tmp_path / "third")["teacher_flops"] == 0
    assert_equal(states(tmp_path / "first"), states(tmp_path / "third"))


@pytest.mark.slow
def test_cache_through_pays_for_what_is_missing_once(composed: Composed, teacher: Path, tmp_path: Path) -> None:
    config = composed(
        "experiment=codistill_cached", f"distillation.cache={tmp_path / 'new'}", f"distillation.teacher={teacher}"
    )
    first = trained(config, tmp_path / "first")
    forward = first["teacher_flops"] / (20 * 2 * 64)
    kept = TargetCache.open(tmp_path / "new")
    kept.verify()
    assert len(kept) == 40
    assert forward == account(load_model(teacher).config, 64).forward_flops, "one pass for each window"
    second = trained(config, tmp_path / "second")
    assert second["teacher_flops"] == 0
    assert_equal(states(tmp_path / "first"), states(tmp_path / "second"))
    elsewhere = {**config["distillation"], "cache": str(tmp_path / "never")}
    with pytest.raises(InputError, match="exists and is not empty"):
        run({**config, "distillation": elsewhere, "run_dir": str(tmp_path / "first")})
    assert not (tmp_path / "never").exists()
    third = trained({**config, "seed": 1}, tmp_path / "third")
    assert 0 < third["teacher_flops"] <= first["teacher_flops"]


def grow(corpus: Path, folder: Path) -> Path:
    """The corpus with a file that comes last and one in the middle."""
    shutil.copytree(corpus, folder)
    last = max(file.name for file in folder.iterdir())
    (folder / f"{last}.last.py").write_text("".join(f"y{i} = {i**3}\n" for i in range(200)))
    (folder / "file5.middle.py").write_text("".join(f"x{i} = {i**2}\n" for i in range(99)))
    return folder


@pytest.mark.slow
def test_additional_data_are_added_while_training(
    composed: Composed, corpus: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    """The old windows are read, the teacher passes over the new ones only, and then there is nothing left to pay."""
    settings = ["experiment=codistill_cached", f"distillation.cache={cache}", f"distillation.teacher={teacher}"]
    settings += [f"data.path={grow(corpus, tmp_path / 'grown')}", "training.steps=40", "training.batch_size=8"]
    old = set(TargetCache.open(cache))
    config = composed(*settings)
    tokens = load_data(from_mapping(DataConfig, config["data"], "data")).train.tokens
    windows = set(stream_keys(tokens, 64).tolist())
    assert windows & old and windows - old
    refused({**config, "distillation": {**config["distillation"], "teacher": None}}, r"it holds \d+ of \d+ windows of")

    first = trained(config, tmp_path / "first")
    assert len(windows) < 40 * 8, "more than an epoch"
    added = TargetCache.open(cache)
    assert set(added) == windows | old
    forward = account(load_model(teacher).config, 64).forward_flops
    assert first["teacher_flops"] == len(windows - old) * 64 * forward

    second = trained({**config, "distillation": {**config["distillation"], "teacher": None}}, tmp_path / "second")
    assert second["teacher_flops"] == 0
    assert_equal(states(tmp_path / "first"), states(tmp_path / "second"))

    scratch = TargetCache.open(make_cache(composed, teacher, tmp_path / "anew", f"data.path={tmp_path / 'grown'}"))
    for batch in TrainingLoader(tokens, seq_len=64, batch_size=4, num_batches=20, seed=3, fixed_windows=True):
        mine, theirs = (cache.targets(batch["tokens"], batch["labels"]) for cache in (added, scratch))
        for one, other in zip(mine, theirs, strict=True):  # computed beside other windows: up to fp16's last bit
            torch.testing.assert_close(one, other, rtol=2**-9, atol=2**-9)


@pytest.mark.slow
def test_a_run_that_starts_from_a_checkpoint_takes_what_the_cache_got_since(
    composed: Composed, corpus: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    settings = ["experiment=codistill_cached", f"distillation.cache={cache}", f"distillation.teacher={teacher}"]
    assert trained(composed(*settings), tmp_path / "old")["teacher_flops"] == 0
    grown = f"data.path={grow(corpus, tmp_path / 'grown')}"
    make_cache(composed, teacher, cache, grown)
    start = f"ckpt_path={tmp_path / 'old' / 'checkpoints' / 'last.ckpt'}"
    assert trained(composed(*settings, grown, start, "training.steps=30"), tmp_path / "on")["teacher_flops"] == 0


@pytest.mark.slow
def test_a_student_on_other_text_reads_it_with_the_teachers_tokenizer(
    composed: Composed, corpus: Path, tmp_path: Path
) -> None:
    bpe = ["data.tokenizer=bpe", "data.vocab_size=300", "training.steps=2"]
    run({**composed(*bpe), "run_dir": str(tmp_path / "teacher")})
    teacher = tmp_path / "teacher" / "checkpoints" / "last.ckpt"
    theirs = load_model(teacher).tokenizer
    assert theirs is not None
    frozen = ["experiment=codistill_frozen", f"distillation.teacher={teacher}", *bpe]
    frozen.append(f"data.path={grow(corpus, tmp_path / 'grown')}")
    own = load_data(from_mapping(DataConfig, composed(*frozen)["data"], "data")).tokenizer
    assert own is not None and own.to_dict() != theirs.to_dict()
    trained(composed(*frozen), tmp_path / "student")
    students = load_model(tmp_path / "student" / "checkpoints" / "last.ckpt").tokenizer
    assert students is not None and students.to_dict() == theirs.to_dict()
    refused(composed(*frozen, "data.vocab_size=310"), r"distillation.teacher: .* of 300, the student's has 310")
    refused(composed(*frozen, "data.tokenizer=bytes"), r"distillation.teacher: .* of 300, the student's has 257")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_other_kinds_of_targets(composed: Composed, teacher: Path, tmp_path: Path, kind: str) -> None:
    cache = make_cache(composed, teacher, tmp_path / kind, f"kind={kind}")
    settings = ["distillation.divergence=reverse_kl", "distillation.temperature=2"] if kind == "dense" else []
    trained(composed("experiment=codistill_cached", f"distillation.cache={cache}", *settings), tmp_path / "it")
    settings += ["trainer.precision=bf16-true", "training.steps=2"]
    trained(composed("experiment=codistill_cached", f"distillation.cache={cache}", *settings), tmp_path / "in bf16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("source", ["frozen", "joint", "cached"])
def test_precisions(composed: Composed, teacher: Path, tmp_path: Path, source: str, precision: str) -> None:
    overrides = [f"experiment=codistill_{source}", f"trainer.precision={precision}", "training.steps=4"]
    overrides += SMALL_TEACHER if source == "joint" else [f"distillation.teacher={teacher}"]
    overrides += [f"distillation.cache={tmp_path / 'new'}"] if source == "cached" else []
    trained(composed(*overrides), tmp_path / "it")


@pytest.mark.slow
def test_evaluate_and_generate_take_the_student(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = trained(composed("experiment=codistill_joint", *SMALL_TEACHER), tmp_path / "it")
    for name, key in (("last", "validation/loss"), ("teacher", "validation/teacher_loss")):
        checkpoint = tmp_path / "it" / "checkpoints" / f"{name}.ckpt"
        config = composed("data=files", f"checkpoint={checkpoint}", f"output={tmp_path / name}", config="evaluate")
        assert evaluate.evaluate(config)["loss"] == pytest.approx(metrics[key], rel=1e-5)
        capsys.readouterr()
        generate.main([str(checkpoint), "def f1(", "max_new_tokens=3"])
        assert capsys.readouterr().out.startswith("def f1(")


# ---- refusals


def refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(config)
    assert not Path(config["output_dir"]).exists(), "refused before the run directory exists"


@pytest.mark.slow
def test_a_missing_or_foreign_teacher_is_refused(composed: Composed, tmp_path: Path) -> None:
    refused(composed("experiment=codistill_frozen"), r"distillation.teacher=None: source=frozen needs one")
    nowhere = composed("experiment=codistill_frozen", "distillation.teacher=/nowhere")
    refused(nowhere, r"distillation.teacher: teacher='/nowhere': no such file")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    directory = composed("experiment=codistill_frozen", f"distillation.teacher={tmp_path / 'run'}")
    refused(directory, r"distillation.teacher: .*the directory of a run; give its checkpoint, .*/checkpoints/last.ckpt")
    other = make_teacher(tmp_path / "other.ckpt", vocab_size=300)
    foreign = composed("experiment=codistill_frozen", f"distillation.teacher={other}")
    refused(foreign, r"distillation.teacher: .*a vocabulary of 300, the student's has 257")
    ids = composed(
        "experiment=codistill_frozen",
        f"distillation.teacher={make_teacher(tmp_path / 'bytes.ckpt')}",
        "data.tokenizer=bpe",
        "data.vocab_size=257",
    )
    refused(ids, r"distillation.teacher: .*its tokenizer \(bytes\) is not that of the student's data \(bpe\)")
    shape = composed("experiment=codistill_joint", "distillation.teacher_model.attention.num_heads=3")
    refused(shape, r"distillation.teacher_model.attention.num_heads=3: must be a multiple")


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_refused(composed: Composed, teacher: Path, cache: Path, tmp_path: Path) -> None:
    def cached(*overrides: str) -> dict[str, Any]:
        return composed("experiment=codistill_cached", f"distillation.cache={cache}", *overrides)

    refused(composed("experiment=codistill_cached"), r"distillation.cache=None: source=cached needs one")
    refused(cached("distillation.cache=/nowhere"), r"distillation.cache: /nowhere: no cache of targets")
    refused(cached("training.seq_len=32"), r"distillation.cache: .*windows of another length \(seq_len=64 .* 32 here")
    refused(cached("distillation.temperature=2"), r"distillation.cache: .*at another temperature")
    refused(cached("distillation.divergence=jsd"), r"distillation.cache: .*holds top_k targets, .* not jsd")
    refused(
        cached("model.vocab_size=260"), r"model.vocab_size=260: cached targets have the vocabulary of the data, 257"
    )
    (tmp_path / "others").mkdir()
    for name in ("first.txt", "second.txt"):
        (tmp_path / "others" / name).write_text(f"{name} " * 400)
    others = r"distillation.cache: .*it holds 0 of \d+ windows of the training split, and \d+ others: other data\?"
    refused(cached(f"data.path={tmp_path / 'others'}"), others)
    stale = make_teacher(tmp_path / "stale.ckpt", seed=1)
    refused(
        cached(f"distillation.teacher={stale}"), r"distillation.cache: .*is stale: made by a teacher with other weights"
    )

    manifest = json.loads((cache / "manifest.json").read_text())
    shard = cache / manifest["shards"][1]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7] + b"\xff" * 7)
    refused(cached(), r"distillation.cache: .*shard-00001.safetensors: corrupt")
    shard.write_bytes(content[:-7])
    refused(cached(), r"distillation.cache: .*shard-00001.safetensors: truncated")
    shard.write_bytes(content)
    incomplete = {**manifest, "shards": manifest["shards"][:2]}
    (cache / "manifest.json").write_text(json.dumps(incomplete))
    refused(cached(), r"distillation.cache: .*it holds 16 of \d+ windows of the training split; moesaic cache-targets")
    (cache / "manifest.json").write_text(json.dumps({**manifest, "settings": {"seq_len": 64}}))
    refused(cached(), r"distillation.cache: .*manifest.json: settings.teacher: missing")
    (cache / "manifest.json").write_text(json.dumps(incomplete))
    with_teacher = cached(f"distillation.teacher={teacher}", "training.steps=2")
    assert run(with_teacher)["status"] == "finished"


@pytest.mark.slow
def test_a_checkpoint_of_another_kind_of_run_is_refused(composed: Composed, teacher: Path, tmp_path: Path) -> None:
    run({**composed("training.steps=2"), "run_dir": str(tmp_path / "plain")})
    last = tmp_path / "plain" / "checkpoints" / "last.ckpt"
    start = [f"distillation.teacher={teacher}", f"ckpt_path={last}"]
    message = r"last.ckpt: of a run with distillation source none, the config has frozen"
    refused(composed("experiment=codistill_frozen", *start), message)
    run({**composed("experiment=codistill_joint", *SMALL_TEACHER), "run_dir": str(tmp_path / "both")})
    last = tmp_path / "both" / "checkpoints" / "last.ckpt"
    refused(composed(f"ckpt_path={last}"), r"of a run with distillation source joint, the config has none")
    other = composed(
        "experiment=codistill_joint", *SMALL_TEACHER, "distillation.teacher_model.dim=32", f"ckpt_path={last}"
    )
    refused(other, r"another shape: teacher_model.dim: 24 there, 32 now")
    # weights alone start any run
    model = load_model(last)
    save_model(tmp_path / "weights.ckpt", model.decoder, model.tokenizer)
    start = composed("experiment=codistill_frozen", f"distillation.teacher={teacher}", "training.steps=2")
    assert trained({**start, "ckpt_path": str(tmp_path / "weights.ckpt")}, tmp_path / "on")["steps"] == 2


# ---- resume


@pytest.mark.slow
@pytest.mark.parametrize("source", ["frozen", "joint", "cached"])
def test_crashed_and_resumed_equals_uninterrupted(
    composed: Composed, teacher: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"experiment=codistill_{source}", "model.moe.expert_bias=true", "training.accumulate=2"]
    settings += ["balance.expert_bias_update_rate=0.01", "training.log_every=7", "training.validate_every=12"]
    steps = 60 if source == "cached" else 30  # there more than an epoch, so that windows come again
    settings += SMALL_TEACHER if source == "joint" else [f"distillation.teacher={teacher}"]
    settings += ["training.batch_size=4"] * (source == "cached")

    def config(name: str) -> dict[str, Any]:
        cache = [f"distillation.cache={tmp_path / f'cache-{name}'}"] * (source == "cached")
        return composed(*settings, *cache, f"training.steps={steps}", f"run_dir={tmp_path / name}")

    first = run(config("whole"))
    original = TrainingLoader.batch

    def crash(self: TrainingLoader, i: int) -> Any:
        if i == 2 * steps - 9:  # in the middle of a step
            raise RuntimeError("power cut")
        return original(self, i)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(TrainingLoader, "batch", crash)
        run(config("crashed"))
    assert load_checkpoint(tmp_path / "crashed" / "checkpoints" / "last.ckpt")["global_step"] == steps - 10
    second = run({**config("crashed"), "resume": True})
    for table in ("metrics.csv", "routing.csv"):
        assert rows(tmp_path / "crashed", table) == rows(tmp_path / "whole", table), table
    state = states(tmp_path / "whole")
    assert_equal(state, states(tmp_path / "crashed"))
    assert int(state["soft_weight.updates"]) == steps
    for key in ("validation/loss", "teacher_flops", "validation/teacher_loss"):
        assert first[key] == second[key], key


@pytest.mark.slow
def test_a_resumed_run_counts_what_it_paid_whatever_the_cache_got_since(
    composed: Composed, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(name: str) -> dict[str, Any]:
        settings = [f"distillation.cache={tmp_path / f'cache-{name}'}", f"distillation.teacher={teacher}"]
        return composed("experiment=codistill_cached", *settings, "training.checkpoint_every=5")

    whole = trained(config("whole"), tmp_path / "whole")
    fill, calls = CacheThrough.fill, itertools.count(1)

    def dies(self: CacheThrough, batch: Any) -> None:
        if next(calls) == 9:
            raise RuntimeError("gone")
        fill(self, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr(CacheThrough, "fill", dies)
        run({**config("cut"), "run_dir": str(tmp_path / "cut")})
    assert load_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] == 5
    trained(config("cut"), tmp_path / "other")  # the same windows, from the same cache
    resumed = trained({**config("cut"), "resume": True}, tmp_path / "cut")
    assert resumed["teacher_flops"] == whole["teacher_flops"]
    assert_equal(states(tmp_path / "cut"), states(tmp_path / "whole"))


@pytest.mark.slow
def test_a_teacher_that_changed_is_refused_on_resume(composed: Composed, teacher: Path, tmp_path: Path) -> None:
    config = composed("experiment=codistill_frozen", f"distillation.teacher={teacher}")
    trained(config, tmp_path / "it")
    (tmp_path / "it" / "metrics.json").unlink()  # as if it had been killed just before the end
    teacher.unlink()
    make_teacher(teacher, seed=1)
    with pytest.raises(InputError, match=r"the teacher's weights have changed since this run began"):
        run({**config, "resume": True, "run_dir": str(tmp_path / "it")})
