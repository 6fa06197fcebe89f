"""Experts without weights and experts in a latent width, against the blocks of transformers that have them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.examples.custom_modules import ReluSquaredExperts
from moesaic.layers import (
    BACKENDS,
    Experts,
    FreeExperts,
    GroupLimitedRouter,
    Latent,
    MlpRouter,
    MoE,
    TopKRouter,
)
from moesaic.models import MoEConfig, account, build_decoder, llama4_toy
from moesaic.models.shapes import num_parameters
from moesaic.parallel.config import ParallelConfig, require_degrees

DIM, HIDDEN, EXPERTS = 12, 10, 6


def redraw(module: nn.Module) -> None:
    """Draw every parameter and selection bias."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
        for name, buffer in module.named_buffers():
            if "bias" in name:
                buffer.normal_(std=0.1)


def outputs(layer: Callable[[Tensor], Any], x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of x and of some weights."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    return (y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.size(-1))).sum(), [x, *weights]))


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        theirs = theirs if mine.shape == theirs.shape else theirs.transpose(-1, -2)[: mine.size(0)]
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def copy(experts: Any, oracle: Any) -> None:
    """The weights of a stack of gated experts, which transformers keeps as (out, in)."""
    with torch.no_grad():
        experts.gate_up_proj.copy_(oracle.gate_up_proj[: experts.num_experts].transpose(1, 2))
        experts.down_proj.copy_(oracle.down_proj.transpose(1, 2))


def test_identity_experts_are_those_of_longcat() -> None:
    pytest.importorskip("transformers")
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=DIM,
        expert_ffn_hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        zero_expert_num=3,
        moe_topk=4,
        routed_scaling_factor=2.0,
    )
    config._experts_implementation = "eager"
    oracle = LongcatFlashMoE(config)
    redraw(oracle)
    router = TopKRouter(DIM, EXPERTS + 3, top_k=4, score_function="softmax", expert_bias=True, scale=2.0)
    assert router.expert_bias is not None
    with torch.no_grad():
        router.weight.copy_(oracle.router.classifier.weight)
        router.expert_bias.copy_(oracle.router.e_score_correction_bias)
    inner = Experts(EXPERTS, DIM, HIDDEN)
    copy(inner, oracle.experts)
    moe = MoE(router=router, experts=FreeExperts(inner, identity=3), score_before_experts=False)
    x = torch.randn(2, 20, DIM)
    mine = outputs(moe, x, router.weight, inner.gate_up_proj, inner.down_proj)
    theirs = outputs(oracle, x, oracle.router.classifier.weight, oracle.experts.gate_up_proj, oracle.experts.down_proj)
    same(mine, theirs)
    load = moe.forward_with_routing(x)[1].tokens_per_expert
    assert load.sum() == 160 and load[EXPERTS:].sum() > 10


def test_skip_experts_and_the_network_of_the_router_are_those_of_zaya() -> None:
    pytest.importorskip("transformers")
    from transformers.models.zaya.configuration_zaya import ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaSparseMoeBlock

    config = ZayaConfig(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        router_hidden_size=8,
        rms_norm_eps=1e-6,
    )
    config._experts_implementation = "eager"
    oracles = [ZayaSparseMoeBlock(config, layer_idx=i) for i in range(3)]
    x, state, moes = torch.randn(2, 20, DIM), None, []
    for i, oracle in enumerate(oracles):
        redraw(oracle)
        gate, network = oracle.gate, oracle.gate.router_mlp
        gate.balancing_biases.zero_()
        with torch.no_grad():
            logits, _, _, next_state = gate(x, router_states=state)
        lead = logits.softmax(dim=-1)[:, :-1].amax(dim=1) - logits.softmax(dim=-1)[:, -1]
        gate.balancing_biases[-1] = lead.median() + 1e-4  # so that about half are skipped
        router = MlpRouter(
            DIM, EXPERTS + 1, router_dim=8, depth_average=i > 0, score_function="softmax", expert_bias=True
        )
        assert router.expert_bias is not None
        with torch.no_grad():
            router.down_proj.load_state_dict(gate.down_proj.state_dict())
            router.norm.weight.copy_(network.norm.weight)
            router.hidden[0].load_state_dict(network.fc1.state_dict())
            router.hidden[1].load_state_dict(network.fc2.state_dict())
            router.weight.copy_(network.out_proj.weight)
            router.expert_bias.copy_(gate.balancing_biases)
            if router.state_scale is not None:
                router.state_scale.copy_(gate.router_states_scale)
        inner = Experts(EXPERTS, DIM, HIDDEN)
        copy(inner, oracle.experts)
        moes.append(MoE(router=router, experts=FreeExperts(inner, skip=1), score_before_experts=False))
        before = None if state is None else state.flatten(0, 1)
        skipped = moes[-1].forward_with_routing(x, router_state=before)[1].tokens_per_expert[-1]
        assert 10 < skipped < 30, "about half are skipped"
        state = next_state

    def ours(x: Tensor) -> Tensor:
        y, state = x.new_zeros(()), None
        for moe in moes:
            out, routing = moe.forward_with_routing(x, router_state=state)
            y, state = y + out, routing.state
        return y

    def theirs(x: Tensor) -> Tensor:
        y, state = x.new_zeros(()), None
        for oracle in oracles:
            out, state = oracle(x, state)
            y = y + out.view_as(x)
        return y

    mine = [[moe.router.weight, moe.router.down_proj.weight, moe.experts.experts.down_proj] for moe in moes]
    their = [[o.gate.router_mlp.out_proj.weight, o.gate.down_proj.weight, o.experts.down_proj] for o in oracles]
    scales = [moe.router.state_scale for moe in moes[1:]]
    their_scales = [oracle.gate.router_states_scale for oracle in oracles[1:]]
    same(outputs(ours, x, *sum(mine, scales)), outputs(theirs, x, *sum(their, their_scales)))


def test_latent_experts_are_those_of_nemotron() -> None:
    pytest.importorskip("transformers")
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    config = NemotronHConfig(
        hidden_size=DIM,
        moe_latent_size=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
        moe_shared_expert_intermediate_size=14,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        mlp_hidden_act="relu2",
        mlp_bias=False,
    )
    config._experts_implementation = "eager"
    oracle = NemotronHMoE(config)
    redraw(oracle)
    router = GroupLimitedRouter(
        DIM, EXPERTS, top_k=2, num_groups=2, top_groups=1, normalize_scores=True, expert_bias=True, scale=2.5
    )
    experts, latent = ReluSquaredExperts(8, HIDDEN, EXPERTS), Latent(DIM, 8)
    assert router.expert_bias is not None
    with torch.no_grad():
        router.weight.copy_(oracle.gate.weight)
        router.expert_bias.copy_(oracle.gate.e_score_correction_bias)
        experts.up.copy_(oracle.experts.up_proj.transpose(1, 2))
        experts.down.copy_(oracle.experts.down_proj.transpose(1, 2))
        latent.down_proj.load_state_dict(oracle.fc1_latent_proj.state_dict())
        latent.up_proj.load_state_dict(oracle.fc2_latent_proj.state_dict())
    moe = MoE(
        router=router,
        experts=experts,
        latent=latent,
        shared_expert=oracle.shared_experts,  # an ungated network of its own, the same for both
        score_before_experts=False,
    )
    x = torch.randn(2, 20, DIM)
    mine = outputs(moe, x, router.weight, experts.up, latent.down_proj.weight, latent.up_proj.weight)
    theirs = outputs(
        oracle,
        x,
        oracle.gate.weight,
        oracle.experts.up_proj,
        oracle.fc1_latent_proj.weight,
        oracle.fc2_latent_proj.weight,
    )
    same(mine, theirs)


@pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"fp8", "fp8_emulated"}))
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_free_experts_on_every_backend(backend: Any, tokens: int) -> None:
    inner = Experts(3, 8, 8, backend=backend)
    moe = MoE(router=TopKRouter(8, 6, top_k=2), experts=FreeExperts(inner, identity=2, skip=1))
    x = torch.randn(tokens, 8)
    y, routing = moe.forward_with_routing(x)
    expected = torch.zeros_like(x)
    loop = Experts(3, 8, 8, backend="loop")
    loop.load_state_dict(inner.state_dict())
    for t in range(tokens):
        for score, e in zip(routing.scores[t], routing.expert_ids[t].tolist(), strict=True):
            if e < 3:
                count = torch.bincount(torch.tensor([e]), minlength=3)
                expected[t] += loop((score * x[t])[None], count)[0]
            elif e < 5:
                expected[t] += score * x[t]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_accounts_of_free_and_latent_experts() -> None:
    plain = MoEConfig(num_experts=4, hidden_dim=32, shared_hidden_dim=0, top_k=2)
    free = MoEConfig(num_experts=4, hidden_dim=32, shared_hidden_dim=0, top_k=2, identity_experts=3, skip_experts=1)
    latent = MoEConfig(num_experts=4, hidden_dim=32, shared_hidden_dim=0, top_k=2, latent_dim=8)
    models = {"plain": plain, "free": free, "latent": latent}
    of = {name: account(llama4_toy(moe=moe), 16) for name, moe in models.items()}
    dim = llama4_toy().dim
    routers = sum(layer.ffn == "moe" for layer in llama4_toy().layers)
    expert = 3 * dim * 32
    assert of["free"].parameters - of["plain"].parameters == routers * 4 * dim
    assert of["free"].matmul_flops - of["plain"].matmul_flops == routers * 2 * (4 * dim - expert)
    assert of["latent"].matmul_flops - of["plain"].matmul_flops == routers * 2 * (
        2 * dim * 8 + 2 * 3 * 8 * 32 - 2 * expert
    )
    assert free.active_hidden_dim == 32
    for moe in (free, latent):
        config = llama4_toy(moe=moe)
        decoder = build_decoder(config)
        assert sum(p.numel() for p in decoder.parameters()) == num_parameters(config)
        tokens = torch.randint(0, 512, (2, 16))
        decoder(tokens).logits.sum().backward()
        assert all(p.grad is not None for p in decoder.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identity_experts": -1}, "identity_experts=-1: must be a number >= 0"),
        ({"latent_dim": 0}, "latent_dim=0: must be a number > 0"),
        ({"latent_norm": True}, "latent_norm=True: must be false without latent_dim"),
        ({"experts": "normed_swiglu"}, "score_before_experts=True: must be false with experts=normed_swiglu"),
        ({"skip_experts": 1, "top_k": 6}, "top_k=6: must be 1 to num_experts=4 and those without weights"),
    ],
)
def test_bad_sizes(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(num_experts=4, hidden_dim=8, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="experts of width 12: must be 8, the latent width"):
        MoE(router=TopKRouter(12, 2), experts=Experts(2, 12, 8), latent=Latent(12, 8))


def test_they_are_refused_on_several_ranks_by_name() -> None:
    config = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, identity_experts=1))
    with pytest.raises(InputError, match=r"parallel.expert=2: must be 1 with .*moe.identity_experts=1"):
        require_degrees(ParallelConfig(expert=2), 2, 2, config)
