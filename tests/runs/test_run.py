"""A run end to end: what it leaves behind, what it refuses, what it survives."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_runs import BPE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moesaic.checkpoints import load_checkpoint, load_model
from moesaic.errors import InputError
from moesaic.training import run as run_module
from moesaic.training.records import create_run_dir
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only_run(config: dict[str, Any]) -> Path:
    [run_dir] = Path(config["output_dir"]).glob("*/*")
    return run_dir


@pytest.mark.usefixtures("with_pictures")
@pytest.mark.usefixtures("with_plots")
def test_a_run_leaves_everything_behind(composed: Composed, capsys: pytest.CaptureFixture[str]) -> None:
    config = composed()
    metrics = run(config)
    run_dir = only_run(config)
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.json",
        "metrics.csv",
        "routing.csv",
        "sample.txt",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "plots/loss.png",
        "plots/expert_load.png",
        "plots/loss_by_position.png",
        "plots/specialization.png",
        "plots/drift.png",
    ):
        assert (run_dir / name).stat().st_size > 0, name
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    views = ["views/fullest_expert", "views/drift", "views/specialization", "views/loss_by_position"]
    assert events.Tags()["images"] == views
    width, height = events.Images("views/specialization")[0].width, events.Images("views/specialization")[0].height
    assert (width, height) == (500, 375), "the size of a card"
    [text] = [tag for tag in events.Tags()["tensors"] if tag.startswith("sample")]
    shown = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert shown.replace("\n    ", "\n") == "    " + (run_dir / "sample.txt").read_text().rstrip("\n")
    drifts = [row["router/layers.1.ffn/drift"] for row in read_csv(run_dir / "metrics.csv") if row["validation/loss"]]
    assert [bool(drift) for drift in drifts] == [False, True], "checks at step 10, with none before it, and 20"
    assert 0 <= float(drifts[1]) <= 1
    scalars = events.Scalars("router/drift/worst")
    both = [row["router/layers.3.ffn/drift"] for row in read_csv(run_dir / "metrics.csv") if row["validation/loss"]]
    worst = max(float(drifts[1]), float(both[1]))
    assert [(each.step, each.value) for each in scalars] == [(20, pytest.approx(worst))]
    assert not any("file_kind" in key for key in metrics), "all files are .py"
    assert 0 < metrics["router/layers.1.ffn/token_expert_nmi"] <= 1
    assert metrics == json.loads((run_dir / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["steps"] == 20
    assert metrics["tokens"] == 20 * 2 * 64
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["dim"] == 16
    data = json.loads((run_dir / "environment.json").read_text())["data"]
    assert {"gzip -9", "xz -9e"} <= data["baselines"].keys()
    shown = capsys.readouterr().out
    for words in ("MoE 8 x 192, top 1 + shared 192", "tokens/s", "this model", "sample", "router", "next"):
        assert words in shown, words


@pytest.mark.slow
@pytest.mark.usefixtures("with_pictures")
@pytest.mark.usefixtures("with_plots")
def test_a_run_that_only_scores_draws_nothing_and_says_on_what(
    composed: Composed, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed("finish=score", "training.score_windows=3", "training.validation_seq_len=null")
    metrics = run(config)
    run_dir = only_run(config)
    assert not list(run_dir.rglob("*.png")) + list(run_dir.rglob("sample.txt")) + list(run_dir.rglob("tensorboard"))
    assert metrics.keys() >= {"validation/bits_per_byte", "validation/loss_standard_error", "tokens_per_second"}
    assert any(name.endswith("/max_violation") for name in metrics)
    of = metrics["validation/windows_in_split"]
    assert (metrics["validation/windows"], of > 3) == (3, True)
    assert f"on 3 of {of} windows of the validation split" in " ".join(capsys.readouterr().out.split())
    other = run({**config, "seed": 5, "finish": "all", "logger": {}, "sample": {**config["sample"], "prompt": "x"}})
    assert (other["validation/windows"], other["validation/windows_in_split"]) == (3, of)


@pytest.mark.slow
def test_it_learns(composed: Composed) -> None:
    config = composed("training.steps=80", "training.batch_size=8", "training.validate_every=80")
    metrics = run(config)
    assert metrics["validation/bits_per_byte"] < 0.6 * metrics["baselines/byte unigram"]
    rows = read_csv(only_run(config) / "metrics.csv")
    assert not any("no_expert" in column for column in rows[0]), "the router gives every token an expert"
    assert float(rows[-1]["tokens"]) == 80 * 8 * 64
    assert float(rows[0]["train/loss"]) == pytest.approx(math.log(257), rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("with_plots")
def test_dense_model_has_no_router_rows(composed: Composed) -> None:
    config = composed("model.dense_twin=true")
    metrics = run(config)
    assert not any(key.startswith("router/") for key in metrics)
    assert not (only_run(config) / "plots" / "expert_load.png").exists()
    assert not (only_run(config) / "plots" / "specialization.png").exists()
    assert not (only_run(config) / "plots" / "drift.png").exists()


@pytest.mark.slow
def test_kinds_of_files_of_a_mixed_folder(composed: Composed, corpus: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(corpus, mixed)
    for i in range(12):
        (mixed / f"page{i}.md").write_text(f"# Page {i}\n\n" + "Words, words, and more words.\n" * 60)
    config = composed(f"data.path={mixed}", "data.validation_fraction=0.4")
    metrics = run(config)
    found = [metrics[f"router/layers.{layer}.ffn/file_kind_expert_nmi"] for layer in (1, 3)]
    assert all(0 < share <= 1 for share in found)
    # the stream of a memory map holds the same files, and nobody knows their names
    [cache] = [path for path in Path(config["data"]["cache_dir"]).iterdir() if path.is_dir()]
    nameless = run(composed("data.source=memmap", f"data.path={cache}", "name=nameless"))
    assert nameless["validation/loss"] == metrics["validation/loss"]
    assert not any("file_kind" in key for key in nameless)


def test_runs_of_the_same_second_get_directories_of_their_own(tmp_path: Path) -> None:
    paths = {create_run_dir(tmp_path, "same") for _ in range(5)}
    assert len(paths) == 5


def test_checkpoint_is_enough_to_evaluate(trained: Path) -> None:
    metrics = json.loads((trained.parents[1] / "metrics.json").read_text())
    model = load_model(trained)
    assert model.tokenizer is not None
    assert model.tokenizer.vocab_size == model.config.vocab_size > 257
    assert sum(p.numel() for p in model.decoder.parameters()) == metrics["parameters/total"]


@pytest.mark.slow
def test_ckpt_path_continues_bit_equal_in_a_new_directory(composed: Composed) -> None:
    bias = ["model.moe.expert_bias=true", "balance.expert_bias_update_rate=0.01", "training.accumulate=2"]
    whole = composed(*bias, "name=whole")
    run(whole)
    [whole_dir] = Path(whole["output_dir"]).glob("whole/*")
    half = composed(*bias, "name=half", "training.steps=20")
    half["training"]["checkpoint_every"] = 10
    run({**half, "run_dir": str(whole_dir.parent / "half")})
    # the checkpoint of step 10 of an identical run, as a crash would leave it
    stopped = composed(*bias, "name=stopped")
    with pytest.MonkeyPatch.context() as patch:
        original = run_module.LanguageModel.training_step

        def crash(self: Any, batch: Any, batch_index: int) -> Any:
            if self.trainer.global_step == 13:
                raise RuntimeError("power cut")
            return original(self, batch, batch_index)

        patch.setattr(run_module.LanguageModel, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(stopped)
    [stopped_dir] = Path(stopped["output_dir"]).glob("stopped/*")
    assert json.loads((stopped_dir / "metrics.json").read_text())["status"] == "failed"
    rest = composed(*bias, "name=rest", f"ckpt_path={stopped_dir}/checkpoints/last.ckpt")
    run(rest)
    [rest_dir] = Path(rest["output_dir"]).glob("rest/*")
    first = load_checkpoint(whole_dir / "checkpoints" / "last.ckpt")["state_dict"]
    second = load_checkpoint(rest_dir / "checkpoints" / "last.ckpt")["state_dict"]
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [10, 15])
def test_resumed_checks_continue_those_before(
    composed: Composed, checkpoint_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last checkpoint is of a step that was validated."""
    overrides = ["training.steps=40", "training.accumulate=2", f"training.checkpoint_every={checkpoint_every}"]
    whole, killed = composed(*overrides, "name=whole"), composed(*overrides, "name=killed")
    run(whole)
    original = run_module.LanguageModel.training_step
    with monkeypatch.context() as patch:

        def crash(self: Any, batch: Any, batch_index: int) -> Any:
            if self.trainer.global_step == 21:
                raise RuntimeError("power cut")
            return original(self, batch, batch_index)

        patch.setattr(run_module.LanguageModel, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(killed)
    [whole_dir], [killed_dir] = (Path(whole["output_dir"]).glob(f"{name}/*") for name in ("whole", "killed"))
    stopped_at = load_checkpoint(killed_dir / "checkpoints" / "last.ckpt")["global_step"]
    assert stopped_at == 20 // checkpoint_every * checkpoint_every
    run({**killed, "resume": True, "run_dir": str(killed_dir)})
    rows, resumed = (
        [{key: value for key, value in row.items() if "second" not in key} for row in read_csv(path / "metrics.csv")]
        for path in (whole_dir, killed_dir)
    )
    assert resumed == rows
    assert sum(bool(row["router/layers.3.ffn/drift"]) for row in rows) == 3


@pytest.mark.slow_but_for(
    "overrides8-seed=-1: must be an integer from 0 to 4294967295",
    "overrides1-model.moe.top_k=9: must be 1 to num_experts=8",
)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention.num_heads=3"], r"model.attention.num_heads=3: must be a multiple of num_kv_heads=2"),
        (["model.moe.top_k=9"], r"model.moe.top_k=9: must be 1 to num_experts=8"),
        (["model.attention.attention_chunk_size=0"], r"attention_chunk_size=0: must be a number > 0"),
        (["model.attention.head_dim=5"], r"model.attention.head_dim=5: RoPE rotates pairs, head_dim must be even"),
        (["+model.dimm=3"], r"model.dimm: unknown key \(did you mean model.dim\?\)"),
        (["training.steps=many"], r"training.steps: found 'many' \(str\); must be an integer"),
        (["sample.temperature=-1"], r"sample.temperature=-1.0: must be a number >= 0"),
        (["training.steps=0"], r"training.steps=0: must be a number >= 1"),
        (["seed=-1"], r"seed=-1: must be an integer from 0 to 4294967295"),
        (["optimizer.name=sgd"], r"optimizer.name: found 'sgd' \(str\); must be adamw \| muon"),
        (["data.tokenizer=words"], r"data.tokenizer: found 'words'"),
        (["model.vocab_size=100"], r"model.vocab_size=100: the data have token ids up to 256"),
        (["training.seq_len=1000000"], r"seq_len"),
        (["data.path=/nowhere/at/all"], r"/nowhere/at/all"),
        (["trainer.accelerator=gpu"], r"trainer.accelerator='gpu': torch .* finds none"),
        (["ckpt_path=/nowhere.ckpt"], r"checkpoint /nowhere.ckpt: no such file"),
        (["resume=true", "run_dir=/tmp"], r"run_dir='/tmp': not a run directory"),
        (["resume=true"], r"resume=true: no unfinished run"),
        (["balance.expert_bias_update_rate=0.1"], r"it needs model.moe.expert_bias=true"),
        (["model.moe=null"], r"model.moe=None: the depth pattern has MoE layers"),
        (["model.pattern=[{mixer: chunked_rope, ffn: dense}]"], r"give either `pattern` or both intervals"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    composed: Composed, overrides: list[str], message: str
) -> None:
    if "trainer.accelerator=gpu" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = composed(*overrides)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not list(Path(config["output_dir"]).glob("*/*"))


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_are_refused(composed: Composed, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"another shape: model.dim: 16 there, 32 now"):
        run(composed(*BPE, f"ckpt_path={trained}", "model.dim=32"))
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(trained.read_bytes()[: trained.stat().st_size // 2])
    with pytest.raises(InputError, match=r"truncated.ckpt: truncated or not a checkpoint"):
        run(composed(*BPE, f"ckpt_path={truncated}"))
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"weights": torch.zeros(3)}, foreign)
    with pytest.raises(InputError, match=r"foreign.ckpt: not a checkpoint that moesaic wrote"):
        load_model(foreign)


def test_full_disk_is_noticed_before_training(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(InputError, match=r"1 MB free, but checkpoints and logs of this run need about"):
        run(composed())


def test_used_run_dir_is_refused(composed: Composed, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match=r"mine': exists and is not empty"):
        run(composed(f"run_dir={tmp_path / 'mine'}"))
    with pytest.raises(InputError, match=r"run_dir='.*notes.txt': a file; must be a directory"):
        run(composed(f"run_dir={tmp_path / 'mine' / 'notes.txt'}"))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.slow
def test_a_finished_run_is_not_resumed_but_trained_on(
    composed: Composed, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained.stat().st_mtime_ns
    again = run({**composed(*BPE), "resume": True, "run_dir": str(trained.parents[1])})
    assert again == json.loads((trained.parents[1] / "metrics.json").read_text())
    assert "this run is finished, at step 20; to train on, start a new one with ckpt_path=" in capsys.readouterr().out
    assert trained.stat().st_mtime_ns == before
    more = composed(*BPE, f"ckpt_path={trained}", "training.steps=30", "training.log_every=1", "name=more")
    assert run(more)["steps"] == 30
    [more_dir] = Path(more["output_dir"]).glob("more/*")
    assert [row["step"] for row in read_csv(more_dir / "metrics.csv") if row["train/loss"]] == [
        str(step) for step in range(21, 31)
    ]


@pytest.mark.slow
def test_token_ids_without_a_tokenizer(composed: Composed, tmp_path: Path) -> None:
    """A memory map of one's own: bits per byte if the manifest says how many bytes there are, no sample."""
    folder = tmp_path / "ids"
    folder.mkdir()
    for split in ("train", "validation"):
        np.resize(np.arange(50, dtype=np.uint16), 2000).tofile(folder / f"{split}.bin")
    manifest = {"dtype": "uint16", "vocab_size": 50, "validation": {"bytes": 4000}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    config = composed("data.source=memmap", f"data.path={folder}")
    metrics = run(config)
    assert metrics["validation/bits_per_byte"] == pytest.approx(
        metrics["validation/loss"] * 1999 / math.log(2) / 4000, rel=1e-6
    )
    assert not (only_run(config) / "sample.txt").exists()
    with pytest.raises(InputError, match=r"a directory; must be a file, such as its checkpoints/last.ckpt"):
        load_model(only_run(config))


@pytest.mark.slow
def test_auto_precision_is_chosen_once_and_said(
    composed: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.training.precision.TOO_SHORT", 0.0)
    metrics_dir = Path(composed()["output_dir"])
    run(composed("training.steps=1", "trainer.precision=auto", "sample.max_new_tokens=0"))
    stored = yaml.safe_load(next(metrics_dir.rglob("config.yaml")).read_text())
    assert stored["trainer"]["precision"] in ("32-true", "bf16-mixed")
    assert f"{stored['trainer']['precision']}: here bf16-mixed takes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_summary_has_the_rates_that_transfer_gives(
    composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model.parametrization=transfer", "transfer.base.dim=8", "transfer.base.batch=16", "finish=score"]
    run(composed(*overrides, f"run_dir={tmp_path / 'run'}"))
    said = capsys.readouterr().out
    [optimizer] = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]
    for group in optimizer["param_groups"]:
        assert f"{group['name']}: {'muon' if group['muon'] else 'adamw'} at {group['initial_lr']:g}" in said
