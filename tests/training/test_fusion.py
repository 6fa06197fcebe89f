"""Modules of runs on pictures: what is trained and what stays, losses by modality, text as without pictures."""

from typing import Any

import pytest
import torch
from small_fits import Batch, fit
from small_pictures import Numbers

from moesaic.config import from_mapping, to_mapping
from moesaic.data import ByteTokenizer, TrainingLoader, token_bytes
from moesaic.data.images import Layout, PictureTrainingLoader
from moesaic.data.images.pairs import PairTrainingLoader
from moesaic.data.mixing import MixedTrainingLoader
from moesaic.losses import load_balance_loss
from moesaic.models import DecoderConfig, MultimodalConfig, VisionConfig, account
from moesaic.models.encoder_costs import account_encoder
from moesaic.models.presets import small
from moesaic.training.config import RunConfig
from moesaic.training.fusion import ContrastiveModel, FusionModel
from moesaic.training.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

LAYOUT = Layout(ByteTokenizer(), tile_tokens=1)
VISION = VisionConfig(
    image_size=8, patch_size=4, dim=8, num_layers=1, num_heads=2, hidden_dim=8, output_dim=12, num_channels=1
)
TASK = {"side": 8, "tile_tokens": 1, "channels": 1}
STEPS = 3


def model() -> DecoderConfig:
    given = to_mapping(small(vocab_size=LAYOUT.vocab_size))
    attention = {**given["attention"], "head_dim": 4}
    moe = {**given["moe"], "num_experts": 4, "hidden_dim": 16, "expert_bias": True}
    return from_mapping(DecoderConfig, {**given, "dim": 16, "hidden_dim": 32, "attention": attention, "moe": moe})


def config(stage: str | None, accumulate: int = 1, **fusion: Any) -> dict[str, Any]:
    given = {"stage": stage, "vision": to_mapping(VISION), "text": "t" if stage == "frozen" else None, **fusion}
    pictures = {"source": "image_folder", "path": "p", "task": TASK}
    run = {
        "name": "test",
        "model": to_mapping(model()),
        "training": {"steps": STEPS, "batch_size": 4, "seq_len": 64, "log_every": 1, "accumulate": accumulate},
        "balance": {"expert_bias_update_rate": 0.01},
        "fusion": None if stage is None else {**given, "pictures": pictures},
    }
    return to_mapping(from_mapping(RunConfig, run))


def make(stage: str, **fusion: Any) -> Any:
    torch.manual_seed(0)
    kind = ContrastiveModel if stage == "contrastive" else FusionModel
    tokenizer = LAYOUT.tokenizer
    shared = (to_mapping(model()), tokenizer.to_dict(), token_bytes(tokenizer))
    return kind(config(stage, **fusion), *shared, to_mapping(VISION), LAYOUT.image)


def batches(share: float) -> list[Batch]:
    shared: dict[str, Any] = {"seq_len": 64, "batch_size": 4, "num_batches": STEPS, "seed": 0}
    text = TrainingLoader((torch.arange(2000) % 250).numpy(), **shared)
    pictures = PictureTrainingLoader(Numbers(), LAYOUT, **shared)
    return list(MixedTrainingLoader(text, pictures, lambda i: share, num_batches=STEPS))


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_frozen_text_model_stays_bit_for_bit(share: float) -> None:
    module = make("frozen")
    before = state(module)
    changed = moved(before, state(fit(module, batches(share))))
    assert changed and not any(name.startswith("decoder.") for name in changed)
    assert changed >= {name for name in before if name.endswith("proj.weight") and name.startswith("vision.")}
    assert "projector.weight" in changed


def test_joint_training_moves_all_parts() -> None:
    module = make("joint")
    before = state(module)
    changed = moved(before, state(fit(module, batches(0.5))))
    assert {name.split(".")[0] for name in changed} == {"decoder", "vision", "projector"}
    assert any(name.endswith("expert_bias") for name in changed)


def test_text_alone_trains_as_without_pictures() -> None:
    torch.manual_seed(0)
    tokenizer = LAYOUT.tokenizer
    shared = (to_mapping(model()), tokenizer.to_dict(), token_bytes(tokenizer))
    alone = fit(LanguageModel(config(None), *shared), batches(0.0))
    fused = fit(make("joint"), batches(0.0))
    assert not moved(state(alone.decoder), state(fused.decoder))
    assert alone.hparams.keys() == {"config", "model", "tokenizer", "token_bytes"}


def test_losses_of_both_add_up_to_that_of_the_batch() -> None:
    module, [batch, *_] = make("joint"), batches(0.5)
    fit(module, [batch])
    torch.manual_seed(0)
    fresh = make("joint")
    fit(fresh, [batch])
    found = fresh.log_book.auxiliary
    of_text = int((batch["labels"][:2] != -100).sum())
    of_pictures = int((batch["labels"][2:] != -100).sum())
    whole = (found["train/loss_text"] * of_text + found["train/loss_pictures"] * of_pictures) / (of_text + of_pictures)
    torch.testing.assert_close(whole, fresh._last_loss)


def test_a_step_logs_the_losses_of_its_own_rows_alone() -> None:
    text, pictures = batches(0.0)[0], batches(1.0)[0]
    module = fit(make("joint"), [text, pictures])
    assert "train/loss_pictures" in module.log_book.auxiliary and "train/loss_text" not in module.log_book.auxiliary


def test_losses_of_a_step_are_means_over_its_labels_not_its_micro_batches() -> None:
    parts = [batches(0.0)[0], batches(1.0)[0]]
    together = fit(make("joint", accumulate=2), parts)
    for name, batch in zip(("text", "pictures"), parts, strict=True):
        alone = fit(make("joint"), [batch])
        torch.testing.assert_close(
            together.log_book.auxiliary[f"train/loss_{name}"], alone.log_book.auxiliary[f"train/loss_{name}"]
        )


def test_balance_of_each_modality_by_itself() -> None:
    module, [batch, *_] = make("joint", balance_per_modality=True), batches(0.5)
    fit(module, [batch])
    with torch.no_grad():
        hidden, routing = module.hidden_states(batch)
    valid, is_image = batch["valid"].flatten(), batch["tokens"].flatten() == LAYOUT.image
    counts = type("Counts", (), {"share": 1, "tokens": valid.sum()})()
    for decided in routing.values():
        parts = [load_balance_loss(decided.logits, decided.expert_ids, valid & kind) for kind in (is_image, ~is_image)]
        found = module.load_balance_term(decided, valid, None, counts)
        torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    assert hidden.shape == (4, 64, 16)


def test_contrastive_training_moves_encoder_and_tower() -> None:
    class Pairs(Numbers):
        def sample(self, split: str, index: int) -> Any:
            sample = super().sample(split, 2 * (index // 2) + 1)  # one tile
            return type(sample)((sample.pictures[0], sample.texts[-1]))

    loader = PairTrainingLoader(Pairs(), LAYOUT, seq_len=32, batch_size=8, num_batches=STEPS, seed=0)
    pairs, module = list(loader), make("contrastive")
    before = state(module)
    changed = moved(before, state(fit(module, pairs, pairs)))
    assert {name.split(".")[0] for name in changed} == {"decoder", "vision", "projector", "log_scale"}
    assert 0 < module.score.loss < 10
    assert module.score.num_tokens == 8 * STEPS


def test_validation_keeps_text_and_pictures_apart() -> None:
    module = make("joint")
    fit(module, batches(1.0), [*batches(0.0), *batches(1.0)])
    numbers = module.validation_numbers()
    assert numbers["validation/loss_pictures"] == module.picture_score.loss != module.score.loss
    assert "validation/bits_per_byte_pictures" in numbers


def test_a_checkpoint_says_what_its_encoder_is() -> None:
    module = make("joint")
    assert module.hparams["vision"] == to_mapping(VISION)
    assert module.hparams["image_token"] == LAYOUT.image
    assert {name.split(".")[0] for name in module.state_dict()} == {"decoder", "vision", "projector"}
    assert set(state(module.multimodal)) == set(state(module))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "late"}, r"fusion.stage"),
        ({"text": None, "stage": "frozen"}, r"fusion.text=None: must be a checkpoint in stage frozen"),
        ({"text": "t", "stage": "contrastive"}, r"fusion.text='t'.* must be null in stage contrastive"),
        ({"share": {"start": 1.5}}, r"fusion.share.start=1.5: must be 0 <= value <= 1"),
        ({"vision": {**to_mapping(VISION), "image_size": 16}}, r"fusion.vision: image_size=16; .*task.side=8"),
        ({"vision": {**to_mapping(VISION), "pixel_shuffle": 1}}, r"tiles of 4 tokens; must be .*tile_tokens=1"),
        ({"vision": {**to_mapping(VISION), "num_channels": 3}}, r"num_channels=3; must be .*channels=1"),
        ({"pictures": {"source": "stdlib"}}, r"fusion.pictures.source='stdlib': must be a source of pictures"),
        ({"stages": {"early": {}}}, r"fusion.stages: found 'early'; must be among text, encoder, frozen"),
        ({"concept_cap": 0}, r"fusion.concept_cap=0: must be a number >= 1"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    given = config("joint")
    given["fusion"] = {**given["fusion"], **changes}
    with pytest.raises(ValueError, match=message):
        from_mapping(RunConfig, given)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("ckpt_path", "x", "ckpt_path='x': must be null with fusion"),
        ("data", {"source": "induction"}, "data.source='induction': must be text with a tokenizer"),
    ],
)
def test_what_cannot_be_beside_pictures_is_named(section: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_mapping(RunConfig, {**config("joint"), section: value})


@pytest.mark.parametrize(("stage", "share"), [("joint", 0.5), ("joint", 0.0), ("frozen", 1.0)])
def test_flops_are_those_of_tokens_and_tiles(stage: str, share: float) -> None:
    module, given = make(stage), batches(share)
    fit(module, given)
    tiles = sum(len(batch.get("images", ())) for batch in given)
    assert (tiles > 0) == (share > 0)
    text = account(model(), 64)
    encoder = account_encoder(MultimodalConfig(model(), VISION, LAYOUT.image)).training_flops
    per_token = text.training_flops if stage == "joint" else 2 * text.forward_flops
    assert module.active_flops == pytest.approx(STEPS * 4 * 64 * per_token + tiles * encoder)
