"""Runs the MoE blocks of a transformers model on our dispatch and backends, in place and reversibly."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moesaic.errors import InputError
from moesaic.layers.backends import run_experts
from moesaic.layers.clamped_experts import run_with_biases
from moesaic.layers.dispatch import LocalDispatcher
from moesaic.layers.moe import mix_experts
from moesaic.layers.routing import Routing, count_tokens

__all__ = [
    "AcceleratedDeepseekV3Experts",
    "AcceleratedGptOssExperts",
    "AcceleratedLlama4TextExperts",
    "AcceleratedLlama4TextMoe",
    "AcceleratedMixtralExperts",
    "AcceleratedOlmoeExperts",
    "AcceleratedQwen3MoeExperts",
    "accelerate",
    "accelerated_blocks",
    "restore",
]

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger(__name__)

SILU = type(ACT2FN["silu"])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class AcceleratedLlama4TextExperts(Llama4TextExperts):
    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:  # type: ignore[override]
        """rows (R, D) sorted by expert, where the original takes every token once per expert: (E * T, D)."""
        return run_experts(rows, self.gate_up_proj, self.down_proj, rows_per_expert, plain(self.act_fn))


class AcceleratedLlama4TextMoe(Llama4TextMoe):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) -> (T, D), and the router's logits (T, E)."""
        tokens = hidden_states.reshape(-1, self.hidden_dim)
        # router and experts are called as modules: output_router_logits, FSDP and others hook them
        all_scores, logits = self.router(tokens)
        # not the scores: a chosen one can underflow to 0, which is the score of every other expert
        expert_ids = logits.detach().topk(self.router.top_k, dim=1).indices
        scores = all_scores.gather(1, expert_ids)
        routing = Routing(logits, scores, expert_ids, count_tokens(expert_ids, self.num_experts))
        routed = mix_experts(tokens, routing, self.experts, LocalDispatcher(), score_before_experts=True)
        return self.shared_expert(tokens).add_(routed), logits


class RoutedByTheirBlock(nn.Module):
    """`forward` for the experts of the blocks that choose and weigh outside of them.

    Weights are stored (out, in): `gate_up_proj` (E, 2F, D), `down_proj` (E, D, F).
    """

    num_experts: int
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K) -> (T, D).

        Weights of Mixtral and DeepSeek-V3 are fp32 whatever the model's dtype: then the sum over K is taken in fp32.
        """
        # the logits stayed with the block's router, and nothing here reads them
        counts = count_tokens(top_k_index, self.num_experts)
        routing = Routing(logits=top_k_weights, scores=top_k_weights, expert_ids=top_k_index, counts=counts)
        mixed = mix_experts(hidden_states, routing, self.run, LocalDispatcher(), score_before_experts=False)
        return mixed.to(hidden_states.dtype)

    def run(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        return run_experts(rows, gate_up, down, rows_per_expert, plain(self.act_fn))


class AcceleratedMixtralExperts(RoutedByTheirBlock, MixtralExperts):
    pass


class AcceleratedQwen3MoeExperts(RoutedByTheirBlock, Qwen3MoeExperts):
    pass


class AcceleratedOlmoeExperts(RoutedByTheirBlock, OlmoeExperts):
    pass


class AcceleratedDeepseekV3Experts(RoutedByTheirBlock, DeepseekV3Experts):
    pass


class AcceleratedGptOssExperts(RoutedByTheirBlock, GptOssExperts):
    """Weights are stored (in, out) and with biases, and columns of gate and up alternate."""

    def forward(self, hidden_states: Tensor, router_indices: Any = None, routing_weights: Any = None) -> Tensor:
        return super().forward(hidden_states, router_indices, routing_weights)

    def run(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        weights = (self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias)
        return run_with_biases(rows, *weights, rows_per_expert, self._apply_gate)


# what is looked for in a model; a Llama 4 block brings its experts along
BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    Llama4TextMoe: AcceleratedLlama4TextMoe,
    MixtralExperts: AcceleratedMixtralExperts,
    Qwen3MoeExperts: AcceleratedQwen3MoeExperts,
    OlmoeExperts: AcceleratedOlmoeExperts,
    DeepseekV3Experts: AcceleratedDeepseekV3Experts,
    GptOssExperts: AcceleratedGptOssExperts,
}
ACCELERATED = {**BLOCKS, Llama4TextExperts: AcceleratedLlama4TextExperts}
ORIGINALS = {accelerated: original for original, accelerated in ACCELERATED.items()}


def accelerate(model: Model) -> Model:
    """Swap the MoE blocks of a transformers model for ours, in place; returns the model.

    Only the class of each block changes, to a subclass with another `forward`: parameters, names, hooks, state dict,
    `save_pretrained` and isinstance checks stay theirs, nothing is copied, and `restore` undoes it. Blocks that are
    accelerated already are left alone. `config._experts_implementation` has no effect on accelerated blocks.

    Supported are Llama 4 (text, also inside the multimodal model), Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss,
    on any device, in float64, float32, bfloat16 and float16, whole models as well as single blocks. Wrap, shard,
    compile or dispatch over devices afterwards.

    Raises:
        InputError: there is no block to accelerate, or there is one that cannot be; nothing has been changed then.
    """
    blocks = blocks_in(model, BLOCKS)
    if not blocks:
        supported = ", ".join(f"{block.__name__} ({block.__module__.split('.')[2]})" for block in BLOCKS)
        raise InputError(f"{type(model).__name__} has no MoE block that can be accelerated; those are {supported}")
    done = blocks_in(model, BLOCKS.values())
    fresh = {name: block for name, block in blocks.items() if name not in done}
    change_classes(fresh, ACCELERATED, refuse_unless_it_can_run)
    logger.info("%s: %d MoE blocks accelerated, %d were before", type(model).__name__, len(fresh), len(done))
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place; returns the model. Blocks that are not accelerated are left alone.

    Raises:
        InputError: a block was wrapped after it was accelerated; nothing has been changed then.
    """
    change_classes(blocks_in(model, BLOCKS.values()), ORIGINALS)
    return model


def accelerated_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks in `model` that run on our layers now."""
    return list(blocks_in(model, BLOCKS.values()))


def blocks_in(model: nn.Module, classes: Iterable[type[nn.Module]]) -> dict[str, nn.Module]:
    wanted = tuple(classes)
    return {name: module for name, module in model.named_modules() if isinstance(module, wanted)}


def plain(act_fn: nn.Module) -> Callable[[Tensor], Tensor]:
    """Their module around silu as the plain function, whose derivative our backends know."""
    return F.silu if type(act_fn) is SILU else act_fn


def change_classes(
    blocks: dict[str, nn.Module],
    class_of: dict[type[nn.Module], type[nn.Module]],
    check_experts: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """All checks come before the first change."""
    modules = dict(blocks)
    for name, block in blocks.items():
        if isinstance(block, Llama4TextMoe):
            modules[f"{name}.experts".lstrip(".")] = block.experts
    for name, module in modules.items():
        refuse_unless_plain(name, module, class_of)
        if check_experts and hasattr(module, "gate_up_proj"):
            check_experts(name, module)
    for module in modules.values():
        module.__class__ = class_of[type(module)]


def refuse_unless_plain(name: str, module: nn.Module, allowed: dict[type[nn.Module], type[nn.Module]]) -> None:
    if type(module) not in allowed:
        raise InputError(
            f"{name or 'the block'} is a {type(module).__name__}, whose class cannot be changed; quantization, "
            f"parametrisation (LoRA on expert weights) and FSDP replace it: accelerate before them, restore after"
        )
    if "forward" in vars(module):
        raise InputError(
            f"{name or 'the block'} has a forward of its own, set on the instance by expert parallelism or by a "
            f"dispatch over devices (device_map): accelerate before them, restore after"
        )


def refuse_unless_it_can_run(name: str, experts: nn.Module) -> None:
    if getattr(experts, "_is_expert_parallel", False):
        raise InputError(f"{name or 'the block'} is sharded by expert parallelism: all experts must be on one device")
    parts = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    weights = {f"{name}.{part}".lstrip("."): getattr(experts, part) for part in parts if hasattr(experts, part)}
    for key, weight in weights.items():
        if type(weight) is not nn.Parameter:
            raise InputError(
                f"{key} is a {type(weight).__name__}: it must be a plain parameter, not sharded or quantized"
            )
        if weight.is_meta:
            raise InputError(f"{key} is on the meta device: load the weights first (offloaded ones have to come back)")
        if weight.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise InputError(f"{key} is {weight.dtype}: must be {allowed}")
    if len({(weight.device, weight.dtype) for weight in weights.values()}) > 1:
        found = ", ".join(f"{key} {weight.dtype} on {weight.device}" for key, weight in weights.items())
        raise InputError(f"{found}: {'both' if len(weights) == 2 else 'all'} must have one dtype and one device")
