"""Loss of a language model on held-out text: nats per token, bits per byte, loss by position, expert load."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layers import count_tokens
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import Decoder, DecoderOutput

__all__ = ["LanguageModelScore", "evaluate_language_model"]


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

    @torch.no_grad()
    def update(self, output: DecoderOutput, labels: Tensor, valid: Tensor | None = None) -> None:
        """Add logits (B, L, V) against labels (B, L); -100 is ignored."""
        keep = labels != IGNORE_INDEX
        nats = F.cross_entropy(output.logits.float().flatten(0, 1), labels.flatten(), reduction="none")
        length = labels.size(1)
        if self.nats_by_position.numel() < length:
            grow = length - self.nats_by_position.numel()
            self.nats_by_position = F.pad(self.nats_by_position, (0, grow))
            self.tokens_by_position = F.pad(self.tokens_by_position, (0, grow))
        self.nats_by_position[:length] += nats.view_as(labels).cpu().double().sum(dim=0)
        self.tokens_by_position[:length] += keep.sum(dim=0).cpu()
        if self.token_bytes is not None:
            self.num_bytes += int(self.token_bytes.to(labels.device)[labels[keep]].sum())
        for name, routing in output.routing.items():
            mask = None if valid is None else valid.flatten()
            counts = count_tokens(routing.expert_ids, routing.logits.size(1), mask).cpu()
            self.tokens_per_expert[name] = counts + self.tokens_per_expert.get(name, 0)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_by_position.sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nats_by_position.sum()) / max(1, self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenisers; None if the tokens' bytes are not known."""
        if not self.num_bytes:
            return None
        return float(self.nats_by_position.sum()) / math.log(2) / self.num_bytes

    @property
    def loss_by_position(self) -> list[float]:
        """Mean nats per token at each position of the window."""
        return (self.nats_by_position / self.tokens_by_position.clamp(min=1)).tolist()


@torch.inference_mode()
def evaluate_language_model(
    decoder: Decoder,
    batches: Iterable[dict[str, Tensor]],
    token_bytes: Tensor | None = None,
    watch: Callable[[DecoderOutput, dict[str, Tensor]], None] | None = None,
) -> LanguageModelScore:
    """Score `decoder` in evaluation mode on batches of tokens, labels and (optionally) valid, each (B, L).

    `watch` sees each batch and what the decoder said to it, so that one pass serves other measures as well.
    """
    was_training = decoder.training
    device = decoder.embedding.weight.device
    score = LanguageModelScore(token_bytes)
    decoder.eval()
    try:
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            output = decoder(batch["tokens"])
            score.update(output, batch["labels"], batch.get("valid"))
            if watch is not None:
                watch(output, batch)
    finally:
        decoder.train(was_training)
    return score
