"""Parameters, FLOPs and bytes of encoders by formula, against models that are built and run."""

import dataclasses
from typing import Any

import pytest
import torch

from moesaic.cli import memory as command
from moesaic.errors import InputError
from moesaic.layers import parameter_kinds
from moesaic.layers.work import Work
from moesaic.models import (
    MultimodalConfig,
    VisionConfig,
    build_multimodal,
    estimate_memory,
    llama4_scout,
    llama4_toy,
    llama4_vision,
)
from moesaic.models.encoder_costs import account_encoder, encoder_shapes, estimate_multimodal_memory
from moesaic.models.memory import LiveBytes

VISION = VisionConfig(
    image_size=32, patch_size=4, dim=32, num_layers=3, num_heads=4, hidden_dim=80, output_dim=24, num_channels=1
)
CONFIGS = [
    VISION,
    dataclasses.replace(VISION, class_token=False, learned_positions=False, pixel_shuffle=1),
    dataclasses.replace(VISION, num_channels=3, rope_theta=None, pixel_shuffle=4, num_layers=1),
]


def config(vision: VisionConfig = VISION) -> MultimodalConfig:
    return MultimodalConfig(llama4_toy(vocab_size=40, num_layers=2, dim=16, hidden_dim=24), vision, image_token=30)


@pytest.mark.parametrize("vision", CONFIGS)
def test_shapes_and_kinds_are_those_of_the_model(vision: VisionConfig) -> None:
    model = build_multimodal(config(vision), device="meta")
    kinds = parameter_kinds(model)
    found = [
        (tuple(each.shape), kinds[name])
        for name, each in model.named_parameters()
        if not name.startswith("decoder.")
    ]  # fmt: skip
    assert sorted(found) == sorted((shape.sizes, shape.kind) for shape in encoder_shapes(config(vision)))


@pytest.mark.parametrize("vision", CONFIGS)
def test_flops_are_those_that_run(vision: VisionConfig) -> None:
    model, images = build_multimodal(config(vision)), torch.zeros(2, vision.num_channels, 32, 32)
    with Work() as work:
        tokens = model.embed_images(images)
    counted = account_encoder(config(vision))
    assert counted.forward_flops == work.flops / 2
    assert counted.tokens == len(tokens[0])
    assert counted.training_flops == 3 * counted.forward_flops
    parts = (model.vision, model.projector)
    assert counted.parameters == sum(p.numel() for part in parts for p in part.parameters())


def test_the_encoder_of_llama_4() -> None:
    """The encoder as `test_multimodal.py` has it, and a projector of 4,096 x 5,120."""
    counted = account_encoder(llama4_vision(llama4_scout()))
    assert counted.parameters == 850_960_896 + 4096 * 5120
    assert counted.tokens == 144


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("vision", CONFIGS)
def test_activations_are_those_that_stay(vision: VisionConfig, checkpoint: bool, dtype: torch.dtype) -> None:
    """Within 6%: angles of positions and what is kept per head are small beside them."""
    model = build_multimodal(config(vision), dtype=dtype, checkpoint_activations=checkpoint)
    images = torch.randn(24, vision.num_channels, 32, 32, dtype=dtype)
    with LiveBytes([images, *model.parameters()]) as live:
        out = model.projector(model.vision(images))
        kept = live.current - out.nbytes
    sizes: dict[str, Any] = {"batch_size": 2, "seq_len": 1024, "dtype": dtype, "checkpoint_activations": checkpoint}
    whole = estimate_multimodal_memory(config(vision), images=12, **sizes)
    text = estimate_memory(config().text, **sizes)
    assert whole.activations - text.activations == pytest.approx(kept, rel=0.06)


def test_weights_and_state_add_up() -> None:
    whole = estimate_multimodal_memory(config(), images=2, batch_size=2, seq_len=64)
    text = estimate_memory(config().text, batch_size=2, seq_len=64)
    parameters = account_encoder(config()).parameters
    assert whole.weights - text.weights == whole.gradients - text.gradients == 4 * parameters
    assert whole.optimizer - text.optimizer == 8 * parameters + 4 * len(encoder_shapes(config()))
    assert whole.optimizer_step - text.optimizer_step == 4 * parameters
    assert whole.step > text.step and whole.total > text.total and whole.kv_cache == text.kv_cache
    without = estimate_multimodal_memory(config(), images=0, batch_size=2, seq_len=64)
    assert without.activations == text.activations


def test_images_have_to_fit_into_the_sequence() -> None:
    with pytest.raises(InputError, match="images=5: of 16 image tokens each; must be 0 to 4, as seq_len=64"):
        estimate_multimodal_memory(config(), images=5, batch_size=1, seq_len=64)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["llama4_tiny", "vision=llama4", "images=2", "seq_len=512", "dtype=float32", "optimizer=null"])
    printed = capsys.readouterr().out
    assert "with vision" in printed
    text = dataclasses.replace(command.find_config("llama4_tiny"))
    found = estimate_multimodal_memory(
        MultimodalConfig(text, llama4_vision(llama4_scout()).vision, 1), images=2, batch_size=1, seq_len=512,
        optimizer=None,
    )  # fmt: skip
    assert command.show(found.activations) in printed and command.show(found.total) in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vision=clip"], "vision='clip': must be llama4, a mapping of an encoder's keys, or null"),
        (["vision={image_size: 32}"], "vision.patch_size: missing"),
        (["vision=llama4", "images=-1"], "images=-1: must be an integer >= 0"),
        (["vision=llama4", "images=9", "seq_len=512"], "images=9: of 144 image tokens each; must be 0 to 3"),
        (["vision=llama4", "trace=true"], "trace=true: must be false with vision"),
    ],
)
def test_bad_input_of_the_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["llama4_tiny", *arguments])
    assert capsys.readouterr().err.startswith(f"error: {message}")
