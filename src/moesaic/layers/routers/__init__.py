"""Routers beyond top-k, by the name that a config gives them. Each states `causal` and `depends_on_batch`."""

from typing import Literal

from moesaic.layers.control_routers import UniformRouter
from moesaic.layers.router import TopKRouter
from moesaic.layers.routers.capacity import CapacityRouter
from moesaic.layers.routers.expert_choice import ExpertChoiceRouter
from moesaic.layers.routers.groups import GroupLimitedRouter
from moesaic.layers.routers.hashed import HashRouter
from moesaic.layers.routers.mlp import MlpRouter
from moesaic.layers.routers.noisy import NoisyTopKRouter
from moesaic.layers.routers.quantile import QuantileRouter
from moesaic.layers.routers.relu import ReluRouter
from moesaic.layers.routers.sinkhorn import SinkhornRouter
from moesaic.layers.routers.threshold import ThresholdRouter
from moesaic.layers.routers.top_p import TopPRouter

__all__ = [
    "ROUTERS",
    "CapacityRouter",
    "ExpertChoiceRouter",
    "GroupLimitedRouter",
    "HashRouter",
    "MlpRouter",
    "NoisyTopKRouter",
    "QuantileRouter",
    "ReluRouter",
    "RouterName",
    "SinkhornRouter",
    "ThresholdRouter",
    "TopPRouter",
]

RouterName = Literal[
    "top_k",
    "uniform",
    "group_limited",
    "quantile",
    "threshold",
    "hash",
    "expert_choice",
    "sinkhorn",
    "noisy_top_k",
    "capacity",
    "relu",
    "top_p",
    "mlp",
]

ROUTERS: dict[RouterName, type[TopKRouter]] = {
    "top_k": TopKRouter,
    "uniform": UniformRouter,
    "group_limited": GroupLimitedRouter,
    "quantile": QuantileRouter,
    "threshold": ThresholdRouter,
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "noisy_top_k": NoisyTopKRouter,
    "capacity": CapacityRouter,
    "relu": ReluRouter,
    "top_p": TopPRouter,
    "mlp": MlpRouter,
}
"""What `model.moe.router` may name, alone or as {type: NAME, argument: value}."""
