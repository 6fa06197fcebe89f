"""Early fusion from nothing: its stages as runs of their own, killed and resumed, and what is refused before any."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_parallel_runs import checks, on_a_rank, require_equal_runs

from moesaic.checkpoints import load_checkpoint, load_multimodal, save_model
from moesaic.config import flatten, from_mapping
from moesaic.data import ByteTokenizer, load_data
from moesaic.errors import InputError
from moesaic.models import DecoderConfig, build_decoder
from moesaic.parallel.workers import Workers
from moesaic.training import fusion_stages
from moesaic.training.config import RunConfig
from moesaic.training.fusion_batches import make_batches
from moesaic.training.run import run, run_found
from moesaic.training.starting import find_run

Composed = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.filterwarnings("ignore:.*collapsed.*:RuntimeWarning")

VISION = {
    "image_size": 8,
    "patch_size": 4,
    "dim": 8,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "output_dim": 12,
}
SIZES = {"validation_seq_len": 64, "validation_batches": 1, "seq_len": 64, "validate_every": 2, "log_every": 1}
FEW = [
    *("model.vocab_size=263", "finish=score", "training.steps=4"),
    *("training.validate_every=2", "training.log_every=1", "training.checkpoint_every=1"),
]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 gray pictures, each with a name."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    names = [f"SHADE {i % 7} NUMBER {i}" for i in range(40)]
    for i in range(40):
        Image.fromarray(draw.integers(0, 256, (8, 8)).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *(f"{i}.png,{n}" for i, n in enumerate(names))]))
    return folder


def fused(config: dict[str, Any], pictures: Path, **fusion: Any) -> dict[str, Any]:
    """A composed config with small pictures and short stages."""
    task = {"side": 8, "tile_tokens": 1, "channels": 1, "most_tiles": 1}
    source = {"source": "image_folder", "path": str(pictures), "task": task}
    vision = {**config["fusion"]["vision"], **VISION, "pixel_shuffle": 2}
    short = {"training": {"steps": 3, "batch_size": 4, "checkpoint_every": 1, "score_windows": 2, **SIZES}}
    tower = {"model": {**config["model"], "num_layers": 1, "interleave_moe_layer_step": 0, "vocab_size": 263}}
    cap = {"fusion": {"stage": "contrastive", "concept_cap": 10}}
    stages: dict[str, Any] = {
        "text": short,
        "encoder": {**short, **tower, **cap},
        "frozen": {**short, "fusion": {"stage": "frozen", "share": {"start": 1.0, "end": 1.0}}},
    }
    changed = {**config["fusion"], "pictures": source, "vision": vision, "stages": stages, **fusion}
    return {**config, "data": {**config["data"], "captions": source}, "fusion": changed}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in read]


@pytest.mark.slow
def test_from_nothing_to_the_verdict_and_the_same_when_stopped_in_every_stage(
    composed: Composed,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = composed("experiment=early_fusion", *FEW, "training.score_windows=2")
    whole = fused({**config, "run_dir": str(tmp_path / "whole")}, pictures)
    metrics = run(whole)
    assert capsys.readouterr().out.count("MFLOP per tile in training, on top of") == 3, "all stages but that of text"
    assert metrics["status"] == "finished"
    assert {"validation/loss", "pictures/unseen_picture/bits_per_character", "pictures/unseen_picture/exact"} <= set(
        metrics
    )
    assert metrics["text_model/bits_per_byte"] == pytest.approx(
        json.loads((tmp_path / "whole" / "stages" / "text" / "metrics.json").read_text())["validation/bits_per_byte"]
    )
    logged = {key for row in rows(tmp_path / "whole" / "metrics.csv") for key, value in row.items() if value}
    assert {"train/loss_text", "train/loss_pictures", "validation/loss_pictures"} <= logged
    for name in ("text", "encoder", "frozen"):
        there = tmp_path / "whole" / "stages" / name
        assert json.loads((there / "metrics.json").read_text())["status"] == "finished"
    stages = tmp_path / "whole" / "stages"
    text, frozen = weights(stages / "text"), weights(stages / "frozen")
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in text.items())
    assert load_multimodal(tmp_path / "whole" / "checkpoints" / "last.ckpt").multimodal is not None

    # stopped in each stage by Ctrl-C after its second step, and gone on with by one command
    where_it_runs = Path(config["output_dir"]) / config["name"] / "parted"
    parted = fused({**config, "run_dir": str(where_it_runs)}, pictures)
    resumed = {**parted, "resume": True, "run_dir": None}  # the newest unfinished run, and not one of its stages
    for stopped in ("text", "encoder", "frozen", ""):
        where = where_it_runs / ("stages/" + stopped if stopped else "")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            _stop_after_two_steps(patch, where)
            run_found(find_run(parted if stopped == "text" else resumed))
        assert load_checkpoint(where / "checkpoints" / "last.ckpt")["global_step"] == 1  # before the check
    run_found(find_run(resumed))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(where_it_runs)[name]), name
    assert rows(tmp_path / "whole" / "metrics.csv") == rows(where_it_runs / "metrics.csv")
    assert find_run({**resumed, "run_dir": str(where_it_runs)}).kind == "finished"


def _stop_after_two_steps(patch: pytest.MonkeyPatch, run_dir: Path) -> None:
    from moesaic.training.callbacks import LastCheckpoint

    ended = LastCheckpoint.on_train_batch_end

    def end(self: Any, trainer: Any, *others: Any) -> None:
        ended(self, trainer, *others)
        if trainer.global_step == 2 and Path(trainer.default_root_dir) == run_dir:
            raise KeyboardInterrupt

    patch.setattr(LastCheckpoint, "on_train_batch_end", end)


def test_a_stage_is_its_experiment(composed: Composed) -> None:
    whole = composed("experiment=early_fusion", smoke=False)
    for name in ("text", "encoder", "frozen"):
        found = flatten(fusion_stages.stage_config(whole, name, {"text": "t", "encoder": None}))
        alone = [f"experiment=fusion_{name}", *(["fusion.text=t"] if name == "frozen" else [])]
        assert found == flatten(composed(*alone, smoke=False))


def test_captions_of_a_stage_are_those_of_the_run(composed: Composed, pictures: Path) -> None:
    whole = fused(composed("experiment=early_fusion", smoke=False), pictures)
    whole["fusion"]["stages"] = composed("experiment=early_fusion", smoke=False)["fusion"]["stages"]
    for name in ("text", "encoder", "frozen"):
        asked = fusion_stages.stage_config(whole, name, {"text": "t", "encoder": None})
        assert asked["data"]["captions"] == whole["data"]["captions"] != {}


@pytest.mark.parametrize(
    ("overrides", "fusion", "message"),
    [
        (["model.vocab_size=260"], {}, "model.vocab_size=260: the data have token ids up to 262"),
        (["model.vocab_size=null"], {}, "model.vocab_size=None: must be 263"),
        (["trainer.devices=2"], {"stages": {}}, "parallel.shard=True: must be false with fusion"),
        (["trainer.devices=2", "parallel.shard=false"], {}, "2 processes; fusion.stages are trained by one. Train exp"),
        ([], {"stages": {"text": {"model": {"dim": 8}}}}, "fusion.stages.text: model: must be that of the run"),
        ([], {"stages": {"frozen": {"fusion": {"stage": "frozen"}}}}, "fusion.text=None: must be a checkpoint"),
        ([], {"text": "nowhere.ckpt", "stages": {}}, "fusion.text: checkpoint nowhere.ckpt"),
        (["training.seq_len=8"], {}, "training.seq_len=8: must be at least 22, the tokens of the longest"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(
    composed: Composed, pictures: Path, tmp_path: Path, overrides: list[str], fusion: dict[str, Any], message: str
) -> None:
    config = composed("experiment=early_fusion", *FEW, *overrides, f"run_dir={tmp_path / 'run'}")
    with pytest.raises(InputError, match=message):
        run(fused(config, pictures, **fusion))
    assert not (tmp_path / "run").exists()


def test_pictures_that_have_changed_are_named(composed: Composed, pictures: Path, tmp_path: Path) -> None:
    config = from_mapping(RunConfig, fused(composed("experiment=early_fusion", *FEW), pictures))
    batches = make_batches(config, load_data(config.data))
    (tmp_path / "environment.json").write_text(json.dumps({"data": batches.facts}))
    batches.require_same(tmp_path / "environment.json")
    other = {**batches.facts, "pictures": {"content_hash": "other"}}
    (tmp_path / "environment.json").write_text(json.dumps({"data": other}))
    with pytest.raises(InputError, match=r"fusion.pictures: they have changed .* \(their hash was other"):
        batches.require_same(tmp_path / "environment.json")


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_named(composed: Composed, pictures: Path, tmp_path: Path) -> None:
    text = composed("experiment=fusion_text", "debug=smoke", "model.vocab_size=263", "training.steps=2", "finish=score")
    run({**text, "run_dir": str(tmp_path / "text")})
    path = str(tmp_path / "text" / "checkpoints" / "last.ckpt")
    config = composed("experiment=early_fusion", *FEW, f"run_dir={tmp_path / 'run'}")
    for changes, message in (
        ({"encoder": path}, "fusion.encoder: .* has no encoder"),
        ({"text": path}, "fusion.text: .*model"),
    ):
        other = {**config, "model": {**config["model"], "dim": 32}} if "text" in changes else config
        with pytest.raises(InputError, match=message):
            run(fused(other, pictures, stages={}, **changes))
    assert not (tmp_path / "run").exists()


def test_held_out_texts_are_not_read_as_captions_of_other_pictures(
    composed: Composed, pictures: Path, tmp_path: Path
) -> None:
    fewer = shutil.copytree(pictures, tmp_path / "fewer")
    (fewer / "metadata.csv").write_text("\n".join((pictures / "metadata.csv").read_text().splitlines()[:-9]))
    config = fused(composed("experiment=early_fusion", *FEW, f"run_dir={tmp_path / 'run'}"), pictures, stages={})
    config["data"]["captions"] = {**config["data"]["captions"], "path": str(fewer)}
    with pytest.raises(InputError, match=r"data\.captions: its pictures are not those of fusion\.pictures"):
        run(config)
    assert not (tmp_path / "run").exists()


RANKS = [
    *("trainer.precision=64-true", "training.steps=4", "training.batch_size=4", "training.log_every=1"),
    *("training.validate_every=2", "training.validation_seq_len=64", "finish=score", "model.vocab_size=263"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("joint", ["training.accumulate=2"]),
        ("joint", ["fusion.balance_per_modality=true"]),
        ("frozen", ["fusion.text=text.ckpt"]),
        ("contrastive", ["training.batch_size=8"]),
    ],
)
def test_two_processes_are_one(
    stage: str, overrides: list[str], composed: Composed, pictures: Path, tmp_path: Path, workers: Workers
) -> None:
    """Also where one of them has no picture in a batch, and where pairs of the other are wrong answers."""
    name = {"joint": "early_fusion", "frozen": "fusion_frozen", "contrastive": "fusion_encoder"}[stage]
    for ranks, run_dir in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        typed = (*RANKS, *overrides, f"run_dir={run_dir}", f"trainer.devices={ranks}", "parallel.shard=false")
        config = composed(f"experiment={name}", *typed)
        fusion: dict[str, Any] = {"stages": {}, "share": {"start": 0.75, "end": 0.25}}
        if stage == "frozen":
            fusion["text"] = str(tmp_path / "text.ckpt")
        if stage == "frozen" and ranks == 1:
            save_model(fusion["text"], build_decoder(from_mapping(DecoderConfig, config["model"])), ByteTokenizer())
        found, *_ = workers.run(on_a_rank, ranks, fused(config, pictures, **fusion), typed)
        assert found["status"] == "finished"
    require_equal_runs(tmp_path / "two", tmp_path / "one")
    one, two = (checks(tmp_path / each) for each in ("one", "two"))
    assert len(one) == 2 and all(a == pytest.approx(b, rel=1e-6) for a, b in zip(one, two, strict=True))
