"""Keeping experts in use: load-balance loss, router z-loss, loss-free bias update. Pure functions of tensors."""

import torch
from torch import Tensor

from moesaic.layers.checks import require_floating, require_ids, require_numbers, require_tensor
from moesaic.layers.routing import at_least_fp32, count_tokens

__all__ = ["load_balance_loss", "router_z_loss", "update_expert_bias"]


def load_balance_loss(
    logits: Tensor,
    expert_ids: Tensor,
    valid: Tensor | None = None,
    load: Tensor | None = None,
    *,
    num_valid: Tensor | int | None = None,
) -> Tensor:
    """E * sum over e of f_e * P_e (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, eq. 4-6), 1 when balanced.

    f_e is the fraction of routed rows that went to expert e (no gradient), P_e the mean over tokens of
    softmax(logits)_e. The softmax is used for sigmoid routers too: it ranks experts as the sigmoid does, and its
    gradient vanishes neither at zero initialization nor for saturated scores.

    Args:
        logits: (T, E), with gradient.
        expert_ids: (T, K).
        valid: (T,) bool; padding (False) counts in neither f nor P.
        load: (E,) counts to take f from instead of this micro-batch's: those of the whole global batch (Qiu et al.
            2025, arXiv 2501.11873), which lets experts specialize within a micro-batch.
        num_valid: tokens to divide the sum for P by; None counts the valid ones. With those of the global batch, the
            losses of micro-batches and ranks add up to their mean, weighted by tokens.

    Returns:
        Scalar in fp32 (fp64 for fp64); 0 (with a graph) if no token is valid.

    Raises:
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape.
    """
    _require_logits("load_balance_loss", logits, valid)
    require_tensor("load_balance_loss", "expert_ids", expert_ids, (logits.size(0), None), torch.int64)
    require_ids("load_balance_loss", "expert_ids", expert_ids, logits.size(1), ignore=logits.size(1))
    if load is not None:
        require_tensor("load_balance_loss", "load", load, (logits.size(1),))
    num_experts = logits.size(-1)
    counts = (count_tokens(expert_ids, num_experts, valid) if load is None else load).to(at_least_fp32(logits).dtype)
    fraction = counts / counts.sum().clamp(min=1)
    logits = _of_valid(at_least_fp32(logits), valid)
    probabilities = (logits - logits.logsumexp(dim=-1, keepdim=True)).exp()  # on CPUs softmax over 8 is 4 times slower
    return num_experts * (fraction * _mean_over_valid(probabilities, valid, num_valid)).sum()


def router_z_loss(logits: Tensor, valid: Tensor | None = None, *, num_valid: Tensor | int | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps logits small (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, eq. 5).

    Args:
        logits: (T, E), with gradient.
        valid: (T,) bool, False for padding.
        num_valid: tokens to divide by; None counts the valid ones. With those of the global batch, the losses of
            micro-batches and ranks add up to that of the whole.

    Returns:
        Scalar in fp32 (fp64 for fp64).

    Raises:
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape.
    """
    _require_logits("router_z_loss", logits, valid)
    logits = _of_valid(at_least_fp32(logits), valid)
    return _mean_over_valid(logits.logsumexp(dim=-1).square(), valid, num_valid)


@torch.no_grad()
def update_expert_bias(expert_bias: Tensor, tokens_per_expert: Tensor, rate: float) -> None:
    """Move the selection bias (E,) in place by rate * sign(mean load - load): loss-free balancing.

    Wang et al. 2024, arXiv 2408.15664, algorithm 1. Call it once per optimizer step, with the counts (E,) of all valid
    training tokens of that step (all micro-batches and ranks), between backward and step.
    """
    require_floating("update_expert_bias", expert_bias=expert_bias)
    require_tensor("update_expert_bias", "tokens_per_expert", tokens_per_expert, tuple(expert_bias.shape))
    require_numbers(rate=rate)
    load = tokens_per_expert.float()
    expert_bias += rate * torch.sign(load.mean() - load)


def _require_logits(owner: str, logits: Tensor, valid: Tensor | None) -> None:
    require_floating(owner, logits=logits)
    require_tensor(owner, "logits", logits, (None, None))
    if valid is not None:
        require_tensor(owner, "valid", valid, (logits.size(0),), torch.bool)


def _of_valid(logits: Tensor, valid: Tensor | None) -> Tensor:
    """`logits` (T, E) with 0 for padding: a weight of 0 would not hide inf and nan."""
    return logits if valid is None else logits.masked_fill(~valid[:, None], 0)


def _mean_over_valid(x: Tensor, valid: Tensor | None, num_valid: Tensor | int | None) -> Tensor:
    if valid is None:
        mean = x.mean(dim=0)
        return mean if num_valid is None else mean * (x.size(0) / torch.as_tensor(num_valid).to(x))
    count = valid.sum() if num_valid is None else torch.as_tensor(num_valid, device=x.device)
    return torch.tensordot(valid.to(x.dtype) / count.clamp(min=1), x, dims=1)
