"""What routers really gave the tokens of a run, and what that cost, where it is not what the config says."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.layers import MoE
from moesaic.layers.mixture import routed_flops
from moesaic.models import Decoder
from moesaic.reading import read_csv, reading

__all__ = ["routed_numbers", "widths_of"]

FORWARD_AND_BACKWARD = 3
"""FLOPs of training over those of a forward pass."""


def routed_numbers(
    decoder: Decoder, metrics_csv: Path, tokens: int, seq_len: int, active_flops: float
) -> dict[str, float]:
    """Experts per token and tokens without any, for each MoE layer, and with them the FLOPs of the training.

    They are means over the logged steps, of routers that state how many experts a token has. `measured_flops` is there
    only if some layer leaves the number of experts, or their width, to the tokens; of all others `active_flops` is
    exact.

    Args:
        tokens: of the whole training.
        active_flops: of the whole training, as the parts state them.
    """
    numbers: dict[str, float] = {}
    measured, more = False, 0.0
    logged = _means(metrics_csv)
    for name, layer in decoder.named_modules():
        if not isinstance(layer, MoE):
            continue
        found, width = logged.get(f"router/{name}/experts_per_token"), logged.get(f"router/{name}/active_width")
        stated = getattr(layer.router, "experts_per_token", None)
        if not isinstance(stated, (int, float)):
            continue  # somebody else's router, that does not say what its FLOPs were counted for
        numbers[f"router/{name}/experts_per_token"] = chosen = float(stated) if found is None else found
        numbers[f"router/{name}/no_expert_share"] = logged.get(f"router/{name}/no_expert_share", 0.0)
        ratio = chosen / stated
        if width is not None and (widths := widths_of(decoder, name)) is not None:
            numbers[f"router/{name}/active_width"] = width
            ratio = width * int(layer.experts.num_experts) / (stated * sum(widths))  # type: ignore[arg-type]
        measured |= width is not None or found is not None
        more += (ratio - 1) * routed_flops(layer.router, layer.experts, seq_len, layer.dim)
    if measured:
        numbers["measured_flops"] = active_flops + FORWARD_AND_BACKWARD * tokens * more
    return numbers


def widths_of(decoder: Decoder, name: str) -> Sequence[int] | None:
    """The width of each expert with weights, where these differ or others have none; else None."""
    experts: Any = getattr(decoder.get_submodule(name), "experts", None)
    inner: Any = getattr(experts, "experts", experts)
    widths: Sequence[int] | None = getattr(inner, "hidden_dims", None)
    if widths is None and inner is not experts and hasattr(inner, "hidden_dim"):
        widths = [int(inner.hidden_dim)] * int(inner.num_experts)
    return widths


def _means(metrics_csv: Path) -> dict[str, float]:
    """Columns of routers, their means over the steps in which they were logged."""
    rows = read_csv(metrics_csv) if metrics_csv.exists() else []
    with reading(metrics_csv):
        found = {
            name: [float(row[name]) for row in rows if row.get(name)]
            for name in dict.fromkeys(name for row in rows for name in row if name.startswith("router/"))
        }
    return {name: float(np.mean(values)) for name, values in found.items() if values}
