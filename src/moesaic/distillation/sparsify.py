"""From a teacher's logits to the few numbers per token that are worth keeping."""

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.losses.targets import DenseTargets, HeadTargets, SampledTargets, TopKTargets

__all__ = ["StoredTargets", "TargetFormat", "kept_targets", "sampled_targets", "top_k_targets"]

StoredTargets = TopKTargets | SampledTargets | DenseTargets

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 16_000_000
"""Logits that exist at a time in `kept_targets`; the sampler's running sum needs as many fp64 numbers beside them."""


@dataclasses.dataclass(frozen=True)
class TargetFormat:
    """Form of targets that is kept, and its settings; settings of another kind are ignored."""

    kind: Literal["top_k", "sampled", "dense"] = "top_k"
    temperature: float = 1.0  # of top_k and sampled; dense logits serve every temperature
    k: int = 32  # of top_k
    tail: Literal["bucket", "none"] = "bucket"  # of top_k: other ids are one bucket | the k are scaled to sum to one
    num_samples: int = 50  # of sampled: draws per token; equal ones are kept once
    exponent: float = 1.0  # of sampled: ids are drawn from p^exponent, normalized

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature > 0, "a number > 0")
        _check("k", self.k, self.k >= 1, "a number >= 1")
        # the number of distinct ids of a token is stored in one byte
        _check("num_samples", self.num_samples, 1 <= self.num_samples <= 255, "1 to 255")
        # beyond these, weights of vocabularies as large as Llama 4's leave the range of fp16
        _check("exponent", self.exponent, 0.1 <= self.exponent <= 2, "0.1 to 2")

    def settings(self) -> dict[str, Any]:
        """The kind and the settings that matter to it; a tail only where it is not a bucket, as all were before."""
        names = {
            "top_k": ("kind", "temperature", "k"),
            "sampled": ("kind", "temperature", "num_samples", "exponent"),
            "dense": ("kind",),
        }
        tail = {"tail": self.tail} if self.kind == "top_k" and self.tail != "bucket" else {}
        return {name: getattr(self, name) for name in names[self.kind]} | tail


def _check(name: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


@torch.no_grad()
def top_k_targets(
    logits: Tensor, labels: Tensor, k: int, temperature: float = 1.0, tail: Literal["bucket", "none"] = "bucket"
) -> TopKTargets:
    """The k most probable tokens of each row, most probable first.

    Args:
        logits: (N, V).
        labels: (N,) int64; -100 is ignored.
        k: at most V.
        tail: with none, their probabilities are divided by their sum, so that nothing is left for other tokens.

    Returns:
        In fp32 (fp64 for fp64 logits).
    """
    if not 1 <= k <= logits.size(1):
        raise ValueError(f"k={k}: must be 1 to the vocabulary size, {logits.size(1)}")
    logits = _at_least_fp32(logits)
    log_probs, ids = (logits / temperature).log_softmax(dim=-1).topk(k, dim=-1)
    if tail == "none":
        log_probs = log_probs.log_softmax(dim=-1)
    return TopKTargets(ids, log_probs, temperature, *_statistics(logits, labels))


@torch.no_grad()
def sampled_targets(
    logits: Tensor,
    labels: Tensor,
    num_samples: int,
    exponent: float = 1.0,
    temperature: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> SampledTargets:
    """Random sampling knowledge distillation (Anshumann et al. 2025, arXiv 2503.16870).

    With p = softmax(logits / temperature), ids are drawn num_samples times from q = p^exponent / sum(p^exponent), and
    each draw weighs p / (q * num_samples): the expected weight of every id is its p. Weights do not sum to one, and
    dividing them by their sum would bring the bias back. Equal ids of a row are merged.

    Args:
        logits: (N, V).
        labels: (N,) int64; -100 is ignored.
        generator: of the draws, on any device.

    Returns:
        ids (N, S) ascending in a row with S the largest number of distinct ids of a row, filled up with id 0 of
        weight 0; in fp32 (fp64 for fp64 logits).
    """
    logits = _at_least_fp32(logits)
    log_p = (logits / temperature).log_softmax(dim=-1)
    log_q = (exponent * log_p).log_softmax(dim=-1)
    # inverse transform sampling, so that the draws can come from a CPU generator whatever the device
    cumulative = log_q.double().exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    device = logits.device if generator is None else generator.device
    uniform = torch.rand(len(logits), num_samples, generator=generator, dtype=torch.float64, device=device)
    # below the total even after rounding: else the last id would be taken, though its probability may be 0
    place = torch.minimum(uniform.to(logits.device) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, place, right=True).sort(dim=-1).values

    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = new.cumsum(dim=-1) - 1
    width = int(slot[:, -1].max()) + 1 if len(slot) else 0
    ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)[:, :width]
    counts = torch.zeros_like(log_p[:, :1]).expand(-1, num_samples).contiguous()
    counts = counts.scatter_add_(1, slot, torch.ones_like(counts))[:, :width]
    weights = counts * (log_p.gather(1, ids) - log_q.gather(1, ids)).exp() / num_samples
    weights = weights.masked_fill(counts == 0, 0)  # also where an id of probability 0 fills a row up
    return SampledTargets(ids, weights, temperature, *_statistics(logits, labels))


@torch.no_grad()
def kept_targets(
    teacher: HeadTargets, labels: Tensor, form: TargetFormat, generator: torch.Generator | None = None
) -> StoredTargets:
    """What `form` keeps of N tokens; few of the (N, V) logits exist at a time, unless they are what is kept.

    Args:
        teacher: hidden (N, D), weight (V, D).
        labels: (N,) int64; -100 is ignored.
        generator: of the draws of kind sampled; the same state gives the same targets.
    """
    chunk = max(16, CHUNK_ELEMENTS // teacher.weight.size(0))
    parts: list[StoredTargets] = []
    for rows in torch.arange(len(labels)).split(chunk):
        inside = slice(int(rows[0]), int(rows[-1]) + 1)
        with torch.autocast(teacher.weight.device.type, enabled=False):
            logits = F.linear(teacher.hidden[inside].to(teacher.weight.dtype), teacher.weight)
        if form.kind == "dense":
            parts.append(DenseTargets(logits))
        elif form.kind == "top_k":
            parts.append(top_k_targets(logits, labels[inside], form.k, form.temperature, form.tail))
        else:
            draws = form.num_samples, form.exponent, form.temperature
            parts.append(sampled_targets(logits, labels[inside], *draws, generator=generator))
    return _joined(parts)


def _joined(parts: list[StoredTargets]) -> StoredTargets:
    if len(parts) == 1:
        return parts[0]
    width = max(part[0].size(1) for part in parts)
    columns = []
    for values in zip(*parts, strict=True):
        if not isinstance(values[0], Tensor):
            columns.append(values[0])  # the temperature
        elif values[0].ndim == 2:
            columns.append(torch.cat([F.pad(value, (0, width - value.size(1))) for value in values]))
        else:
            columns.append(torch.cat(values))
    return type(parts[0])(*columns)


def _statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) entropy and log-probability of the label, of softmax(logits) without a temperature."""
    log_p = logits.log_softmax(dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(dim=-1)
    valid = labels != IGNORE_INDEX
    label_log_prob = log_p.gather(1, labels.where(valid, 0)[:, None])[:, 0]
    return entropy, label_log_prob.masked_fill(~valid, 0)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
