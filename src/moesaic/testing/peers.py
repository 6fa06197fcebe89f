"""Other people's layers as `MoEUnderTest`s. Nothing of theirs is imported before it is asked for."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.testing.adapter import MoEUnderTest, Run
from moesaic.testing.hugging_face import DIM, HIDDEN, TRANSFORMERS, load
from moesaic.testing.reference import Expert, dense_moe, gated_expert

__all__ = ["PEERS"]

Weights = Mapping[str, Tensor]


def torchtitan(num_experts: int = 4) -> MoEUnderTest:
    """Sigmoid top-2 with a selection bias. Its experts compute in bfloat16 whatever their dtype."""
    requirement = "torchtitan==0.3.0 and what it imports, triton included"
    moe = load("torchtitan.models.common.moe", requirement)
    top_k = min(2, num_experts)
    linear = load("torchtitan.models.common.linear", requirement).Linear.Config(
        in_features=DIM, out_features=num_experts
    )
    dispatcher = load("torchtitan.models.common.token_dispatcher", requirement).LocalTokenDispatcher.Config(
        num_experts=num_experts, top_k=top_k
    )
    module = moe.MoE.Config(
        num_experts=num_experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=DIM, hidden_dim=HIDDEN, num_experts=num_experts),
            token_dispatcher=dispatcher,
        ),
        router=moe.TokenChoiceTopKRouter.Config(num_experts=num_experts, gate=linear, top_k=top_k),
    ).build()
    return MoEUnderTest(
        module,
        dim=DIM,
        reference=partial(_torchtitan_reference, top_k),
        router_weight=lambda module: module.router.gate.weight,
        top_k=top_k,
        expert_bias=lambda module: module.expert_bias_E,
        bias_step=partial(_torchtitan_bias_step, load("torchtitan.components.optimizer.optimizer", requirement)),
        compute_dtype=torch.bfloat16,
    )


def _torchtitan_reference(top_k: int, weights: Weights, x: Tensor) -> Tensor:
    gate, up, down = (weights[f"routed_experts.inner_experts.{name}"] for name in ("w1_EFD", "w3_EFD", "w2_EDF"))
    return dense_moe(
        x,
        weights["router.gate.weight"],
        gated_expert(torch.cat([gate, up], dim=1).transpose(1, 2), down.transpose(1, 2)),
        top_k=top_k,
        score_function="sigmoid",
        expert_bias=weights["expert_bias_E"],
    )


def _torchtitan_bias_step(optimizer: Any, module: Any, micro_batches: Sequence[Tensor], run: Run) -> None:
    """With its own hook, on a model of one block; the block says whether it is recomputed, as theirs do."""
    hooks: list[Callable[[], None]] = []
    block: Any = nn.Module()
    block.moe, block.moe_enabled = module, True
    model: Any = nn.Module()
    model.layers = nn.ModuleDict({"0": block})
    if run.recomputes:
        block.checkpoint_impl = optimizer.CheckpointImpl.NO_REENTRANT
    optimizer.register_moe_load_balancing_hook(
        SimpleNamespace(register_step_pre_hook=hooks.append),
        [model],
        SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1),
    )
    for x in micro_batches:
        run(module, x).square().mean().backward()
    for hook in hooks:
        hook()


def st_moe_pytorch() -> MoEUnderTest:
    """Top-2 GEGLU experts with a capacity per sequence; it refuses top_n < 2, so there is no single expert.

    The thresholds are 0: with the published 0.2 it drops second experts at random, in evaluation as well.
    """
    package = load("st_moe_pytorch", "st-moe-pytorch==0.1.8")
    module = package.MoE(dim=DIM, num_experts=4, threshold_train=0.0, threshold_eval=0.0)

    def reference(w: Weights, x: Tensor) -> Tensor:
        def expert(e: int, rows: Tensor) -> Tensor:
            net = f"experts.experts.{e}.net"
            up, gate = F.linear(rows, w[f"{net}.0.weight"], w[f"{net}.0.bias"]).chunk(2, dim=-1)
            return F.linear(F.gelu(gate) * up * w[f"{net}.1.mult_bias"], w[f"{net}.2.weight"], w[f"{net}.2.bias"])

        return dense_moe(x, w["gate.to_gates.weight"], expert, top_k=2, normalize_scores=True)

    return MoEUnderTest(
        module,
        dim=DIM,
        forward=lambda module, x: module(x).outputs,
        reference=reference,
        router_weight=lambda module: module.gate.to_gates.weight,
        top_k=2,
        balance_loss=lambda module, x, valid: module(x).balance_loss,
        z_loss=lambda module, x: module(x).router_z_loss,
    )


def mixture_of_experts(num_experts: int = 4) -> MoEUnderTest:
    """GShard's top-2 gating with a capacity per sequence, second experts never dropped at random."""
    package = load("mixture_of_experts", "mixture-of-experts==0.2.3")
    module = package.MoE(
        dim=DIM, num_experts=num_experts, hidden_dim=HIDDEN, second_policy_train="all", second_policy_eval="all"
    )

    def reference(w: Weights, x: Tensor) -> Tensor:
        def expert(e: int, rows: Tensor) -> Tensor:
            return F.relu(rows @ w["experts.w1"][e]) @ w["experts.w2"][e]

        router = w["gate.w_gating"].T
        return dense_moe(x, router, expert, top_k=min(2, router.size(0)), normalize_scores=True)

    return MoEUnderTest(
        module,
        dim=DIM,
        reference=reference,
        router_weight=lambda module: module.gate.w_gating.T,
        top_k=min(2, num_experts),
        balance_loss=lambda module, x, valid: module(x)[1],
    )


def pytorch_mixtures_topk(num_experts: int = 4) -> MoEUnderTest:
    package = load("pytorch_mixtures", "--no-deps pytorch-mixtures==0.1.5")
    top_k = min(2, num_experts)
    module = package.TopkMoE(_pytorch_mixtures_config(package, num_experts, "topk"))

    def reference(w: Weights, x: Tensor) -> Tensor:
        return dense_moe(x, w["weight"].T, _up_down(w), top_k=top_k, normalize_scores=True)

    return MoEUnderTest(
        module,
        dim=DIM,
        reference=reference,
        router_weight=lambda module: module.weight.T,
        top_k=top_k,
    )


def pytorch_mixtures_expert_choice(num_experts: int = 4) -> MoEUnderTest:
    """Experts choose tokens: made for encoders, here to show what that means for the checks of a decoder."""
    package = load("pytorch_mixtures", "--no-deps pytorch-mixtures==0.1.5")
    module = package.ExpertChoiceMoE(_pytorch_mixtures_config(package, num_experts, "ec"))
    return MoEUnderTest(module, dim=DIM, router_weight=lambda module: module.weight.T)


PEERS: dict[str, Callable[..., MoEUnderTest]] = {
    **TRANSFORMERS,
    "torchtitan": torchtitan,
    "st-moe-pytorch": st_moe_pytorch,
    "mixture-of-experts": mixture_of_experts,
    "pytorch-mixtures-topk": pytorch_mixtures_topk,
    "pytorch-mixtures-expert-choice": pytorch_mixtures_expert_choice,
}
"""Factories of small layers, by name."""


def _up_down(w: Weights) -> Expert:
    def expert(e: int, rows: Tensor) -> Tensor:
        up = F.silu(F.linear(rows, w[f"experts.{e}.up.weight"], w[f"experts.{e}.up.bias"]))
        return F.linear(up, w[f"experts.{e}.down.weight"], w[f"experts.{e}.down.bias"])

    return expert


def _pytorch_mixtures_config(package: Any, num_experts: int, router: str) -> Any:
    return package.MoEConfig(
        hidden_dim=DIM,
        intermediate_dim=HIDDEN,
        num_experts=num_experts,
        expert_fn="ff",
        expert_act="silu",
        router_fn=router,
        capacity_factor=1.0 if router == "ec" else None,
        topk=min(2, num_experts) if router == "topk" else None,
        dtype=torch.float32,
    )
