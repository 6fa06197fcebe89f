"""Arguments that routers hand on to `TopKRouter`."""

from typing import TypedDict

import torch

from moesaic.layers.router import ScoreFunction

__all__ = ["LinearArguments", "ScoreArguments", "TopKArguments"]


class LinearArguments(TypedDict, total=False):
    """Arguments of `TopKRouter` that make sense for any linear router."""

    scale: float
    bias: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class ScoreArguments(LinearArguments, total=False):
    """Arguments of a router that leaves the scores to `TopKRouter`."""

    score_function: ScoreFunction
    normalize_scores: bool


class TopKArguments(ScoreArguments, total=False):
    """Arguments of a router that leaves the selection to it as well."""

    expert_bias: bool
