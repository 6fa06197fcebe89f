"""Losses as pure functions of tensors, and the policy that weights soft targets."""

from moesaic.losses.balance import load_balance_loss, router_z_loss, update_expert_bias
from moesaic.losses.codistillation import CodistillationOutput, codistillation_loss, linear_codistillation_loss
from moesaic.losses.contrastive import contrastive_loss
from moesaic.losses.cross_entropy import likeliest_tokens, linear_cross_entropy, token_cross_entropy
from moesaic.losses.divergences import DIVERGENCES
from moesaic.losses.soft_weight import Gate, SoftWeight, SoftWeightConfig, TokenStatistics
from moesaic.losses.targets import DenseTargets, HeadTargets, SampledTargets, Targets, TopKTargets

__all__ = [
    "DIVERGENCES",
    "CodistillationOutput",
    "DenseTargets",
    "Gate",
    "HeadTargets",
    "SampledTargets",
    "SoftWeight",
    "SoftWeightConfig",
    "Targets",
    "TokenStatistics",
    "TopKTargets",
    "codistillation_loss",
    "contrastive_loss",
    "likeliest_tokens",
    "linear_codistillation_loss",
    "linear_cross_entropy",
    "load_balance_loss",
    "router_z_loss",
    "token_cross_entropy",
    "update_expert_bias",
]
