"""Losses as pure functions of tensors."""

from moesaic.losses.balance import load_balance_loss, router_z_loss, update_expert_bias
from moesaic.losses.cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy", "load_balance_loss", "router_z_loss", "update_expert_bias"]
