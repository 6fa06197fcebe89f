"""Contrastive loss of pairs: each picture finds its text among those of the batch, and each text its picture."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers.checks import require_floating, require_tensor

__all__ = ["contrastive_loss"]


def contrastive_loss(pictures: Tensor, texts: Tensor, scale: Tensor | float, groups: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) of cosines, as CLIP has it (arXiv 2103.00020).

    Args:
        pictures: (N, D), of any length.
        texts: (N, D); row i belongs to picture i.
        scale: what cosines are multiplied by, the inverse of a temperature.
        groups: (N,) int64. Pairs of one group are no wrong answers of each other, as two pictures of one name are not.

    Returns:
        (N,) nats in at least fp32: of each pair the mean of both directions.

    Raises:
        TypeError: what is given is no tensor of the right dtype.
        ValueError: another shape.
    """
    require_floating("contrastive_loss", pictures=pictures, texts=texts)
    require_tensor("contrastive_loss", "pictures", pictures, (None, None))
    require_tensor("contrastive_loss", "texts", texts, tuple(pictures.shape))
    wide = torch.promote_types(pictures.dtype, torch.float32)
    logits = scale * F.normalize(pictures.to(wide), dim=-1) @ F.normalize(texts.to(wide), dim=-1).T
    if groups is not None:
        require_tensor("contrastive_loss", "groups", groups, (pictures.size(0),), torch.int64)
        same = groups[:, None] == groups
        same.fill_diagonal_(False)
        logits = logits.masked_fill(same, -torch.inf)
    right = logits.diagonal()
    return (logits.logsumexp(dim=1) + logits.logsumexp(dim=0)) / 2 - right
