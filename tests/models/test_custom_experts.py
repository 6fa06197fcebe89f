"""Experts of a user's own in a decoder: built from the config, counted, trained."""

import dataclasses

import torch

from moesaic.examples.custom_modules import ReluSquaredExperts
from moesaic.models import account, build_decoder
from moesaic.models.presets import small
from moesaic.models.shapes import num_parameters, uncounted

PATH = "moesaic.examples.custom_modules.ReluSquaredExperts"


def test_experts_by_dotted_path_are_built_counted_and_learn() -> None:
    whole = small(vocab_size=50)
    assert whole.moe is not None
    config = dataclasses.replace(
        whole, dim=16, attention=dataclasses.replace(whole.attention, head_dim=4), hidden_dim=16
    )
    config = dataclasses.replace(config, moe=dataclasses.replace(whole.moe, hidden_dim=24, experts={"type": PATH}))
    torch.manual_seed(0)
    decoder = build_decoder(config)
    layers = [module for module in decoder.modules() if isinstance(module, ReluSquaredExperts)]
    assert len(layers) == 2
    assert uncounted(config) == (PATH,)
    in_experts = 2 * 2 * 8 * 16 * 24
    assert account(config, 32).parameters == sum(p.numel() for p in decoder.parameters())
    assert num_parameters(config) == account(config, 32).parameters - in_experts
    swiglu = dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts="swiglu"))
    # two matrices in place of three, in two MoE layers with one expert per token
    assert account(swiglu, 32).forward_flops - account(config, 32).forward_flops == 2 * 2 * 16 * 24
    hidden, _ = decoder.hidden_states(torch.randint(50, (2, 32)))
    hidden.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for layer in layers for p in layer.parameters())
