"""What a teacher says about N tokens, in four forms: two dense, two sparse."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["DenseTargets", "HeadTargets", "SampledTargets", "Targets", "TopKTargets"]


class DenseTargets(NamedTuple):
    """The teacher's logits."""

    logits: Tensor
    """(N, V)."""


class HeadTargets(NamedTuple):
    """The teacher's last hidden states and its head; logits are hidden @ weight.T, built chunk by chunk."""

    hidden: Tensor
    """(N, D)."""
    weight: Tensor
    """(V, D)."""


class TopKTargets(NamedTuple):
    """The k most probable tokens at a temperature; the rest of the mass is one bucket, the tail."""

    ids: Tensor
    """(N, k) int64, distinct in a row."""
    log_probs: Tensor
    """(N, k), log of the teacher's softmax(logits / temperature)."""
    temperature: float
    entropy: Tensor
    """(N,), of the teacher's softmax(logits), in nats."""
    label_log_prob: Tensor
    """(N,), the teacher's log softmax(logits) of the label; 0 where the label is ignored."""


class SampledTargets(NamedTuple):
    """An unbiased sparse estimate of softmax(logits / temperature) (Anshumann et al. 2025, arXiv 2503.16870)."""

    ids: Tensor
    """(N, S) int64; a row may be filled up with any id of weight 0."""
    weights: Tensor
    """(N, S), summed over a row's equal ids an estimate of the probability with the right expectation."""
    temperature: float
    entropy: Tensor
    """(N,), as in `TopKTargets`."""
    label_log_prob: Tensor
    """(N,), as in `TopKTargets`."""


Targets = DenseTargets | HeadTargets | TopKTargets | SampledTargets
