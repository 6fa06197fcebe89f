"""Quantiles of what all tokens of a step give, from counts that micro-batches and ranks can add up."""

import torch
from torch import Tensor

__all__ = ["count_values", "quantiles"]


def count_values(values: Tensor, low: Tensor | float, high: Tensor | float, bins: int, valid: Tensor | None) -> Tensor:
    """Counts (E, bins) int64 of values (T, E) in equal bins from low to high.

    Rows with `valid` (T,) False do not count. What is outside counts in the first or the last bin.
    """
    place = ((values - low) / (high - low) * bins).long().clamp(0, bins - 1)
    counted = torch.ones_like(place) if valid is None else valid[:, None].expand_as(place).long()
    counts = torch.zeros(values.size(1), bins, dtype=torch.int64, device=values.device)
    return counts.scatter_add(1, place.T, counted.T)


def quantiles(counts: Tensor, share: float) -> Tensor:
    """Where in the range of the bins, from 0 to 1, each row's lower `share` of the counts (E, bins) ends: (E,) fp32.

    Within a bin values are taken to be spread evenly. Rows without counts give what no caller may use.
    """
    bins = counts.size(1)
    below = counts.cumsum(dim=1).double()
    wanted = share * below[:, -1:]
    place = torch.searchsorted(below, wanted).clamp(max=bins - 1)
    inside = counts.gather(1, place).double()
    begins = below.gather(1, place) - inside
    return ((place + ((wanted - begins) / inside.clamp(min=1)).clamp(0, 1)) / bins).squeeze(1).float()
