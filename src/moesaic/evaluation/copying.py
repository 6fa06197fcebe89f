"""Copying in context: does a model predict a passage when it comes for the second time?"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.config import LARGEST_SEED
from moesaic.data.shards import ShardedIds
from moesaic.errors import InputError
from moesaic.losses import likeliest_tokens, token_cross_entropy
from moesaic.models import Decoder

__all__ = ["CopyingConfig", "copying_score", "passages"]


@dataclasses.dataclass(frozen=True)
class CopyingConfig:
    """How much is copied."""

    length: int = dataclasses.field(default=60, metadata={"most": 2**20})  # tokens of a passage, which is seen twice
    sequences: int = dataclasses.field(default=256, metadata={"most": 2**20})
    seed: int = dataclasses.field(default=0, metadata={"most": LARGEST_SEED})

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length={self.length}: must be an integer >= 2")
        if self.sequences < 1:
            raise ValueError(f"sequences={self.sequences}: must be an integer >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be an integer >= 0")


def passages(config: CopyingConfig, tokens: npt.NDArray[Any] | ShardedIds | None, vocab_size: int) -> Tensor:
    """Passages (sequences, length) int64: from all over a stream, or of ids drawn uniformly if `tokens` is None.

    Raises:
        InputError: a stream shorter than a passage.
    """
    if tokens is None:
        draw = torch.Generator().manual_seed(config.seed)
        return torch.randint(vocab_size, (config.sequences, config.length), generator=draw)
    if len(tokens) < config.length:
        raise InputError(f"copying.length={config.length}: the split has {len(tokens)} tokens")
    starts = np.random.default_rng(config.seed).integers(len(tokens) - config.length + 1, size=config.sequences)
    return torch.from_numpy(np.stack([tokens[i : i + config.length] for i in starts]).astype(np.int64))


@torch.inference_mode()
def copying_score(decoder: Decoder, first: Tensor, batch_size: int = 16) -> dict[str, float]:
    """Each passage twice in a row (the test of induction heads of Olsson et al. 2022, arXiv 2209.11895).

    Args:
        first: (N, L) int64.

    Returns:
        "first" and "second": nats per token of both copies, the first token of each left out; "gain": first - second,
        what the model takes from the first copy; "accuracy" on the second.
    """
    was_training = decoder.training
    decoder.eval()
    length, sums, weight = first.size(1), torch.zeros(3, dtype=torch.float64), decoder.head.weight
    for passage in first.to(decoder.device).split(batch_size):
        hidden = decoder.hidden_states(torch.cat((passage, passage[:, :-1]), dim=1))[0]
        labels = passage[:, 1:].flatten()
        for i, start in enumerate((0, length)):
            predicting = hidden[:, start : start + length - 1].flatten(0, 1)
            sums[i] += token_cross_entropy(predicting, weight, labels).sum().cpu()
        sums[2] += (likeliest_tokens(predicting, weight) == labels).sum().cpu()  # on the second copy
    decoder.train(was_training)
    one, two, right = (sums / (first.size(0) * (length - 1))).tolist()
    return {"first": one, "second": two, "gain": one - two, "accuracy": right}
