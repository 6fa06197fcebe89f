"""Loss of a language model on held-out text: nats per token, bits per byte, loss by position, expert load."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.data import AnyEvaluationLoader, Data, EvaluationLoader, evaluation_loader
from moesaic.layers import Routing, count_tokens
from moesaic.losses import token_cross_entropy
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import Decoder

__all__ = ["LanguageModelScore", "evaluate_language_model", "evaluate_split", "on_windows", "sampled_windows"]

Batch = dict[str, Tensor]

Watch = Callable[[Mapping[str, Routing], Batch], None]
"""Sees what each MoE layer decided, by name, and the batch."""

SAMPLE_SEED = 0
"""Seed of the windows that `sampled_windows` draws: runs of all seeds are scored on the same ones."""


@dataclasses.dataclass
class LanguageModelScore:
    """Running sums over batches; `update` adds one, the properties read them.

    Args:
        token_bytes: (V,) length of each token in bytes, for bits per byte; None if unknown.
    """

    token_bytes: Tensor | None = None
    num_bytes: int = 0
    nats_by_position: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    tokens_by_position: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    tokens_per_expert: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    windows_in_split: int | None = None
    """How many windows there are, scored or not; None if unknown."""
    sums_of_windows: list[Tensor] = dataclasses.field(default_factory=list)
    """Nats, tokens and bytes of each window, (3, B) float64 of every batch."""

    @torch.no_grad()
    def score_batch(self, decoder: Decoder, batch: Mapping[str, Tensor]) -> dict[str, Routing]:
        """Run `decoder` on a batch of tokens, labels and (optionally) valid, each (B, L), and add what it scores.

        The (B, L, V) logits are never built.

        Returns:
            what each MoE layer decided, by name.
        """
        hidden, routing = decoder.hidden_states(batch["tokens"])
        labels = batch["labels"]
        nats = token_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, labels.flatten())
        self.update(nats.view_as(labels), labels, routing, batch.get("valid"))
        return routing

    @torch.no_grad()
    def update(
        self, nats: Tensor, labels: Tensor, routing: Mapping[str, Routing] | None = None, valid: Tensor | None = None
    ) -> None:
        """Add nats (B, L) of labels (B, L); they must be 0 where the label is -100, which is ignored."""
        keep = labels != IGNORE_INDEX
        length = labels.size(1)
        if self.nats_by_position.numel() < length:
            grow = length - self.nats_by_position.numel()
            self.nats_by_position = F.pad(self.nats_by_position, (0, grow))
            self.tokens_by_position = F.pad(self.tokens_by_position, (0, grow))
        self.nats_by_position[:length] += nats.cpu().double().sum(dim=0)
        self.tokens_by_position[:length] += keep.sum(dim=0).cpu()
        sizes = torch.zeros_like(labels)
        if self.token_bytes is not None:
            sizes[keep] = self.token_bytes.to(labels.device, labels.dtype)[labels[keep]]
            self.num_bytes += int(sizes.sum())
        window = [each.sum(dim=1).cpu().double() for each in (nats.double(), keep, sizes)]
        self.sums_of_windows.append(torch.stack(window))
        for name, decided in (routing or {}).items():
            mask = None if valid is None else valid.flatten()
            counts = count_tokens(decided.expert_ids, decided.logits.size(1), mask).cpu()
            self.tokens_per_expert[name] = counts + self.tokens_per_expert.get(name, 0)

    def add_up(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Make the loss and the bits per byte those of the batches of all ranks.

        Args:
            over_ranks: the sum of a tensor of each rank.
        """
        self.nats_by_position = over_ranks(self.nats_by_position).cpu()
        self.tokens_by_position = over_ranks(self.tokens_by_position).cpu()
        self.num_bytes = int(over_ranks(torch.tensor(self.num_bytes)))

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_by_position.sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats_by_position.sum()) / max(1, self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers; None if the tokens' bytes are not known."""
        if not self.num_bytes:
            return None
        return float(self.nats_by_position.sum()) / math.log(2) / self.num_bytes

    @property
    def num_windows(self) -> int:
        """Windows scored so far."""
        return sum(sums.size(1) for sums in self.sums_of_windows)

    def numbers(self) -> dict[str, float]:
        """What metrics.json holds: validation/loss, validation/bits_per_byte, and on how many windows of how many.

        Where these are a sample, the standard errors of both too: of a ratio of sums over windows, for the distance to
        the score of all windows (Cochran, Sampling Techniques, 1977, section 6.4).
        """
        numbers = {"validation/loss": self.loss}
        if self.bits_per_byte is not None:
            numbers["validation/bits_per_byte"] = self.bits_per_byte
        scored, of = self.num_windows, self.windows_in_split or self.num_windows
        numbers |= {"validation/windows": scored, "validation/windows_in_split": of}
        if 1 < scored < of:
            nats, tokens, sizes = torch.cat(self.sums_of_windows, dim=1)
            spread = math.sqrt((1 - scored / of) * scored / (scored - 1))
            numbers["validation/loss_standard_error"] = spread * _rest(nats, tokens)
            if self.bits_per_byte is not None and self.token_bytes is not None:
                numbers["validation/bits_per_byte_standard_error"] = spread * _rest(nats / math.log(2), sizes)
        return numbers

    @property
    def loss_by_position(self) -> list[float]:
        """Mean nats per token at each position of the window."""
        return (self.nats_by_position / self.tokens_by_position.clamp(min=1)).tolist()


def _rest(above: Tensor, below: Tensor) -> float:
    """Root of the summed squares of what windows (W,) deviate from the ratio of the sums, per unit of `below`."""
    ratio = above.sum() / below.sum()
    return float((above - ratio * below).square().sum().sqrt() / below.sum())


def on_windows(metrics: Mapping[str, float]) -> str:
    """Say of how many windows the score among these metrics is; "" where it is of the whole split, or nobody knows."""
    scored, of = metrics.get("validation/windows"), metrics.get("validation/windows_in_split")
    return f"on {scored:,.0f} of {of:,.0f} windows" if scored is not None and of is not None and scored < of else ""


def sampled_windows(num_tokens: int, seq_len: int, count: int) -> npt.NDArray[np.int64]:
    """Draw `count` different windows of a stream, always the same ones; all of them where there are no more.

    They are the windows that hold the first of a fixed sequence of random places. So windows of another length are at
    the same places of the text, as far as they can be.

    Returns:
        their numbers, (count,), in order; window i begins at token i * seq_len.
    """
    predicted = num_tokens - 1
    total = -(-predicted // seq_len)
    if count >= total:
        return np.arange(total)
    draw, found = np.random.default_rng(SAMPLE_SEED), dict[int, None]()
    while len(found) < count:
        places = (draw.random(count) * predicted).astype(np.int64)
        found |= dict.fromkeys((places // seq_len).tolist())
    return np.sort(np.array(list(found)[:count], dtype=np.int64))


@torch.inference_mode()
def evaluate_language_model(
    decoder: Decoder, batches: Iterable[Batch], token_bytes: Tensor | None = None, watch: Watch | None = None
) -> LanguageModelScore:
    """Score `decoder` in evaluation mode on batches of tokens, labels and (optionally) valid, each (B, L).

    `watch` sees each batch and how it was routed, so that one pass serves other measures as well.
    """
    was_training = decoder.training
    device = decoder.device
    score = LanguageModelScore(token_bytes)
    decoder.eval()
    try:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            routing = score.score_batch(decoder, batch)
            if watch is not None:
                watch(routing, batch)
    finally:
        decoder.train(was_training)
    return score


def evaluate_split(
    decoder: Decoder,
    data: Data,
    *,
    seq_len: int,
    batch_size: int,
    split: Literal["train", "validation"] = "validation",
    max_batches: int | None = None,
    windows: int | None = None,
    token_bytes: Tensor | None = None,
    watch: Watch | None = None,
    show: Callable[[AnyEvaluationLoader], Iterable[Batch]] = iter,
) -> LanguageModelScore:
    """Score `decoder` on a split, in windows of seq_len tokens that do not overlap.

    Args:
        max_batches: that many batches spread over the split; None takes all of it.
        windows: of text, that many windows as `sampled_windows` draws them; None takes all.
        token_bytes: (V,) bytes of each token. Where nobody knows them, a whole split of text may still know its size.
        show: wraps the loader, for a progress bar.

    Raises:
        InputError: see `evaluation_loader`.
    """
    loader = evaluation_loader(data, seq_len=seq_len, batch_size=batch_size, max_batches=max_batches, split=split)
    if isinstance(loader, EvaluationLoader):
        in_split = -(-(len(loader.tokens) - 1) // seq_len)
        if windows is not None:
            loader.starts = seq_len * sampled_windows(len(loader.tokens), seq_len, windows)
    else:
        in_split = loader.task.test_size(seq_len)
    score = evaluate_language_model(decoder, show(loader), token_bytes, watch)
    score.windows_in_split = in_split
    if score.num_windows == in_split:  # the size of a memory map without a tokenizer is known for the whole split only
        score.num_bytes = score.num_bytes or (data.train if split == "train" else data.validation).num_bytes or 0
    return score
