"""Other people's layers as `MoEUnderTest`s. Nothing of theirs is imported before it is asked for.

`describe_transformers` recognizes Hugging Face's blocks; `PEERS` makes small layers of several packages.
"""

import copy
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.testing.adapter import MoEUnderTest, Run
from moesaic.testing.reference import Expert, dense_moe, gated_expert

__all__ = ["PEERS", "describe_transformers"]

DIM, HIDDEN = 16, 24

Weights = Mapping[str, Tensor]


def describe_transformers(module: nn.Module) -> MoEUnderTest | None:
    """What is known of a mixture-of-experts block of transformers 5.x; None for any other module."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    describer = TRANSFORMERS.get(kind.__name__)
    # before 5.0 the experts were a list of modules: then nothing is known of them
    if describer is None or not hasattr(module.experts, "gate_up_proj"):
        return None
    return describer(module)


def _llama4(module: Any) -> MoEUnderTest:
    def reference(w: Weights, x: Tensor) -> Tensor:
        return dense_moe(
            x,
            w["router.weight"],
            gated_expert(w["experts.gate_up_proj"], w["experts.down_proj"], module.experts.act_fn),
            top_k=module.top_k,
            score_function="sigmoid",
            score_before_experts=True,
            shared_expert=_gated_mlp(w, "shared_expert", module.shared_expert.activation_fn),
        )

    def with_one_expert() -> nn.Module:
        one = copy.deepcopy(module)
        one.top_k = one.router.top_k = one.num_experts = one.router.num_experts = one.experts.num_experts = 1
        one.router.out_features = 1
        _keep_first_expert(one, ("router.weight", "experts.gate_up_proj", "experts.down_proj"))
        return one

    return MoEUnderTest(
        module,
        dim=module.hidden_dim,
        reference=reference,
        router_weight=lambda module: module.router.weight,
        top_k=module.top_k,
        single_expert=with_one_expert,
    )


def _gated_by_gate(module: Any) -> MoEUnderTest:
    """Mixtral, Qwen3-MoE and DeepSeek-V3: a router called `gate`, and experts of (out, in) weights."""
    gate = module.gate
    bias = getattr(gate, "e_score_correction_bias", None)
    grouped = getattr(gate, "num_group", 1) > 1
    scale = getattr(gate, "routed_scaling_factor", 1.0)

    def reference(w: Weights, x: Tensor) -> Tensor:
        expert = gated_expert(
            w["experts.gate_up_proj"].transpose(1, 2), w["experts.down_proj"].transpose(1, 2), module.experts.act_fn
        )
        shared = getattr(module, "shared_experts", None)
        return dense_moe(
            x,
            w["gate.weight"],
            lambda e, rows: scale * expert(e, rows),
            top_k=gate.top_k,
            score_function="softmax" if bias is None else "sigmoid",
            normalize_scores=getattr(gate, "norm_topk_prob", True),
            expert_bias=None if bias is None else w["gate.e_score_correction_bias"],
            shared_expert=None if shared is None else _gated_mlp(w, "shared_experts", shared.act_fn),
        )

    def balance_loss(module: Any, x: Tensor, valid: Tensor | None) -> Tensor:
        logits = module.gate(x.flatten(0, 1))[0]
        return modeling.load_balancing_loss_func((logits,), logits.size(1), module.gate.top_k, valid)

    def with_one_expert() -> nn.Module:
        one = copy.deepcopy(module)
        one.gate.top_k = one.gate.num_experts = one.experts.num_experts = 1
        _keep_first_expert(one, ("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
        if bias is not None:
            one.gate.e_score_correction_bias = nn.Buffer(bias.detach()[:1].clone())
        return one

    modeling: Any = sys.modules[type(module).__module__]
    return MoEUnderTest(
        module,
        dim=gate.hidden_dim,
        reference=None if grouped else reference,
        router_weight=lambda module: module.gate.weight,
        top_k=gate.top_k,
        balance_loss=balance_loss if hasattr(modeling, "load_balancing_loss_func") else None,
        expert_bias=None if bias is None else lambda module: module.gate.e_score_correction_bias,
        single_expert=None if grouped else with_one_expert,
    )


TRANSFORMERS: dict[str, Callable[[Any], MoEUnderTest]] = {
    "Llama4TextMoe": _llama4,
    "MixtralSparseMoeBlock": _gated_by_gate,
    "Qwen3MoeSparseMoeBlock": _gated_by_gate,
    "DeepseekV3MoE": _gated_by_gate,
}


def transformers_llama4(num_experts: int = 4) -> MoEUnderTest:
    models = _load("transformers.models.llama4", "transformers>=5.2,<6")
    config = models.Llama4TextConfig(
        hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=num_experts, num_experts_per_tok=1
    )
    return _described(models.modeling_llama4.Llama4TextMoe(config))


# "grouped_mm" is what their models choose where nothing is asked for; a block by itself would be left without a choice
def transformers_mixtral(num_experts: int = 4) -> MoEUnderTest:
    models = _load("transformers.models.mixtral", "transformers>=5.2,<6")
    config = models.MixtralConfig(
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_local_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
    )
    config._experts_implementation = "grouped_mm"
    return _described(models.modeling_mixtral.MixtralSparseMoeBlock(config))


def transformers_qwen3(num_experts: int = 4) -> MoEUnderTest:
    models = _load("transformers.models.qwen3_moe", "transformers>=5.2,<6")
    config = models.Qwen3MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        num_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
        norm_topk_prob=False,
    )
    config._experts_implementation = "grouped_mm"
    return _described(models.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config))


def transformers_deepseek_v3(num_experts: int = 4) -> MoEUnderTest:
    models = _load("transformers.models.deepseek_v3", "transformers>=5.2,<6")
    config = models.DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    )
    config._experts_implementation = "grouped_mm"
    return _described(models.modeling_deepseek_v3.DeepseekV3MoE(config))


def torchtitan(num_experts: int = 4) -> MoEUnderTest:
    """Sigmoid top-2 with a selection bias. Its experts compute in bfloat16 whatever their dtype."""
    requirement = "torchtitan==0.3.0 and what it imports, triton included"
    moe = _load("torchtitan.models.common.moe", requirement)
    top_k = min(2, num_experts)
    linear = _load("torchtitan.models.common.linear", requirement).Linear.Config(
        in_features=DIM, out_features=num_experts
    )
    dispatcher = _load("torchtitan.models.common.token_dispatcher", requirement).LocalTokenDispatcher.Config(
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
        bias_step=partial(_torchtitan_bias_step, _load("torchtitan.components.optimizer.optimizer", requirement)),
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
    package = _load("st_moe_pytorch", "st-moe-pytorch==0.1.8")
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
    package = _load("mixture_of_experts", "mixture-of-experts==0.2.3")
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
    package = _load("pytorch_mixtures", "--no-deps pytorch-mixtures==0.1.5")
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
    package = _load("pytorch_mixtures", "--no-deps pytorch-mixtures==0.1.5")
    module = package.ExpertChoiceMoE(_pytorch_mixtures_config(package, num_experts, "ec"))
    return MoEUnderTest(module, dim=DIM, router_weight=lambda module: module.weight.T)


PEERS: dict[str, Callable[..., MoEUnderTest]] = {
    "transformers-llama4": transformers_llama4,
    "transformers-mixtral": transformers_mixtral,
    "transformers-qwen3": transformers_qwen3,
    "transformers-deepseek-v3": transformers_deepseek_v3,
    "torchtitan": torchtitan,
    "st-moe-pytorch": st_moe_pytorch,
    "mixture-of-experts": mixture_of_experts,
    "pytorch-mixtures-topk": pytorch_mixtures_topk,
    "pytorch-mixtures-expert-choice": pytorch_mixtures_expert_choice,
}
"""Factories of small layers, by name."""


def _load(module: str, requirement: str) -> Any:
    """Raises InputError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} cannot be imported ({error}): pip install {requirement}") from error


def _described(module: nn.Module) -> MoEUnderTest:
    described = describe_transformers(module)
    if described is None:
        raise InputError(
            f"{type(module).__name__} of this transformers is not known here: must be transformers>=5.2,<6"
        )
    return described


def _gated_mlp(w: Weights, prefix: str, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    gate, up, down = (w[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return lambda x: (activation(x @ gate.T) * (x @ up.T)) @ down.T


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


def _keep_first_expert(module: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        owner, _, leaf = name.rpartition(".")
        weight = module.get_parameter(name)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight.detach()[:1].clone()))
