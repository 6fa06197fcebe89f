"""Experts of different widths, experts with a norm, and Soft MoE: against slow references, counted, in a decoder."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference import mixtures
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.evaluation.routing import RoutingSums
from moesaic.layers import Experts, MoE, NormedExperts, SoftMoE, TopKRouter, UnequalExperts, parameter_kinds
from moesaic.layers.work import Work
from moesaic.models import DecoderConfig, LayerConfig, account, build_decoder, generate, llama4_toy
from moesaic.models.seams import seam_of
from moesaic.parallel.config import ParallelConfig, require_degrees
from moesaic.parallel.context import spread_context

DIM = 8
WIDTHS = (6, 6, 10, 2, 2)


def weights_of(stacks: Sequence[Experts]) -> list[mixtures.Expert]:
    """The experts of some stacks, one by one."""
    pairs = [pair for stack in stacks for pair in zip(stack.gate_up_proj, stack.down_proj, strict=True)]
    return [(*gate_up.chunk(2, dim=1), down) for gate_up, down in pairs]  # type: ignore[misc]


def same(module: nn.Module, found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Output and all gradients of a module are those of a reference."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weighting = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    wanted = [*inputs, *module.parameters()]
    mine, theirs = (torch.autograd.grad((y * weighting).sum(), wanted) for y in (found, expected))
    for one, other in zip(mine, theirs, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def rows_for(rows_per_expert: Sequence[int]) -> Tensor:
    return torch.randn(sum(rows_per_expert), DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_experts_of_different_widths(backend: Any) -> None:
    experts = UnequalExperts(DIM, WIDTHS, backend=backend, dtype=torch.float64)
    loads = [3, 1, 4, 2, 5]
    rows = rows_for(loads)
    found = experts(rows, torch.tensor(loads))
    stacks = [stack for stack in experts.stacks if isinstance(stack, Experts)]
    assert [stack.num_experts for stack in stacks] == [2, 1, 2]
    same(experts, found, mixtures.experts(rows, loads, weights_of(stacks)), rows)
    for uneven in ([0, 7, 0, 1, 0], [0, 0, 0, 0, 0]):
        rows = rows_for(uneven)
        torch.testing.assert_close(
            experts(rows, torch.tensor(uneven)), mixtures.experts(rows, uneven, weights_of(stacks))
        )


def test_flops_of_different_widths_are_those_of_the_loads() -> None:
    experts, loads = UnequalExperts(DIM, WIDTHS, backend="loop"), [3, 1, 4, 0, 5]
    with Work() as work, torch.no_grad():
        experts(torch.randn(13, DIM), torch.tensor(loads))
    assert work.flops == experts.flops_of(loads) == 6 * DIM * (3 * 6 + 6 + 4 * 10 + 5 * 2)
    assert experts.flops_per_token(99) == 6 * DIM * sum(WIDTHS) / 5
    sums = RoutingSums(torch.tensor([*loads, 10, 0, 10]), torch.zeros(2))
    assert sums.active_width(experts.hidden_dims) == pytest.approx((3 * 6 + 6 + 4 * 10 + 5 * 2) / 10)


def toy(**moe: Any) -> DecoderConfig:
    config = llama4_toy(50, num_layers=2)
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **moe))


@pytest.mark.parametrize(
    ("experts", "mean_width", "further"),
    [
        ({"type": "moesaic.layers.UnequalExperts", "hidden_dims": [8, 8, 32, 48]}, 24, 0),
        ({"type": "moesaic.layers.NormedExperts"}, 32, 32),
    ],
    ids=["unequal", "normed"],
)
def test_in_a_decoder_they_are_built_counted_and_learn(experts: dict[str, Any], mean_width: int, further: int) -> None:
    config, plain = (toy(experts=each, score_before_experts=False) for each in (experts, "swiglu"))
    decoder = build_decoder(config)
    assert account(config, 16).parameters == sum(p.numel() for p in decoder.parameters())
    difference = 3 * 32 * (mean_width - 32)
    assert account(config, 16).parameters == account(plain, 16).parameters + 4 * difference + further
    assert account(config, 16).matmul_flops == account(plain, 16).matmul_flops + 2 * difference
    decoder.hidden_states(torch.randint(50, (4, 32)))[0].square().sum().backward()
    for name, parameter in decoder.layers[1].named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name
    with pytest.raises(InputError, match=r"parallel.expert=2: must be 1 with .*moe.experts=moesaic.layers"):
        require_degrees(ParallelConfig(expert=2), 2, 2, config)


def test_experts_with_a_norm() -> None:
    experts = NormedExperts(3, DIM, 6, norm_eps=0.1, dtype=torch.float64)
    nn.init.normal_(experts.norm_weight)
    loads = [4, 1, 2]
    rows = rows_for(loads)
    found = experts(rows, torch.tensor(loads))
    expected = mixtures.experts(rows, loads, weights_of([experts.experts]), 1 + experts.norm_weight, 0.1)
    same(experts, found, expected, rows)
    assert parameter_kinds(experts)["norm_weight"] == "vector"
    with pytest.raises(ValueError, match=r"score_before_experts=True: must be False with NormedExperts, whose norm"):
        MoE(router=TopKRouter(DIM, 3), experts=experts)


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe(slots: int) -> None:
    moe = SoftMoE(DIM, 6, 4, slots=slots, dtype=torch.float64)
    with torch.no_grad():
        moe.scale.fill_(1.7)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    weights = weights_of([moe.experts])
    same(moe, moe(x), mixtures.soft_moe(x, moe.phi, moe.scale, weights, slots), x)
    torch.testing.assert_close(moe(x[0]), moe(x)[0])
    with Work() as work, torch.no_grad():
        moe(x)
    assert work.flops == pytest.approx(moe.flops_per_token(7) * 14)
    assert parameter_kinds(moe)["phi"] == "output" and seam_of(SoftMoE) == ("ffn",)


def test_soft_moe_sees_later_tokens_and_no_other_sequence() -> None:
    moe, x = SoftMoE(DIM, 6, 4), torch.randn(2, 7, DIM)
    y = moe(x)
    later, others = x.clone(), x.clone()
    later[0, -1], others[1] = 0, 0
    assert not torch.allclose(moe(later)[0, 0], y[0, 0]) and not SoftMoE.causal
    torch.testing.assert_close(moe(others)[0], y[0])
    assert not SoftMoE.depends_on_batch
    assert moe(torch.zeros(0, 7, DIM)).shape == (0, 7, DIM)


def test_soft_moe_in_a_decoder() -> None:
    ffn = {"type": "moesaic.layers.SoftMoE", "hidden_dim": 16, "num_experts": 4, "slots": 2}
    pattern = (LayerConfig("nope", "dense"), LayerConfig("nope", ffn))
    config = llama4_toy(
        50, num_layers=2, pattern=pattern, moe=None, interleave_moe_layer_step=None, nope_layer_interval=None
    )
    decoder = build_decoder(config).eval()
    assert account(config, 16).parameters == sum(p.numel() for p in decoder.parameters())
    assert account(config, 16).layers[1].active_parameters == account(config, 16).layers[1].parameters
    tokens = torch.randint(50, (2, 6))
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    with pytest.raises(InputError, match=r"attention_mask: the feed-forward layer 1, SoftMoE, mixes tokens"):
        decoder(tokens, attention_mask=mask)
    with pytest.raises(InputError, match=r"layer 1 ffn: SoftMoE mixes tokens and cannot have pieces of a sequence"):
        spread_context(decoder, None)  # type: ignore[arg-type]
    made = generate(decoder, tokens, max_new_tokens=3, temperature=0.0)  # without a cache, which would be another model
    for length in (6, 7, 8):
        assert torch.equal(made[:, length], decoder(made[:, :length]).logits[:, -1].argmax(dim=-1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnequalExperts(DIM, []), r"hidden_dims=\[\]: must be a list of widths"),
        (lambda: UnequalExperts(DIM, [4, 0]), r"hidden_dims\[1\]=0: must be a number >= 1"),
        (lambda: UnequalExperts(DIM, "48"), r"hidden_dims='48': must be a list"),  # type: ignore[arg-type]
        (lambda: UnequalExperts(DIM, [4, 4.5]), r"hidden_dims\[1\]=4.5: must be an integer >= 1"),  # type: ignore[list-item]
        (lambda: UnequalExperts(DIM, [4], num_experts=2), r"hidden_dims=\[4\]: 1 widths; must be one for each of num_"),
        (lambda: NormedExperts(2, DIM, 4, norm_eps=0), r"norm_eps=0: must be a number > 0"),
        (lambda: SoftMoE(DIM, 4, 2, slots=0), r"slots=0: must be a number >= 1"),
        (lambda: SoftMoE(DIM, 4, 2)(torch.randn(DIM)), r"SoftMoE: x of shape \(8,\); must be \(..., tokens, 8\)"),
        (lambda: SoftMoE(DIM, 4, 2)(torch.randn(2, 3)), r"SoftMoE: x of shape \(2, 3\); its last dimension must be 8"),
        (
            lambda: build_decoder(toy(experts={"type": "moesaic.layers.UnequalExperts", "hidden_dims": [8, 8]})),
            r"layer 1 experts: .*UnequalExperts.* 2 widths; must be one for each of num_experts=4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()
