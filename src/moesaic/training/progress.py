"""How far a run is, in tokens, FLOPs and sequences, though batch, length or accumulation changed on the way."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moesaic.training.config import TrainingConfig

__all__ = ["Progress", "move_positions"]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Tokens and FLOPs up to a step, and what each step after it adds."""

    tokens_per_step: int
    """Tokens of an optimizer step, over all ranks."""
    flops_per_token: float
    """Training FLOPs."""
    step: int = 0
    """The optimizer step from which these two count."""
    tokens_before: int = 0
    flops_before: float = 0.0

    def tokens(self, step: int) -> int:
        """Tokens trained up to a step."""
        return self.tokens_before + (step - self.step) * self.tokens_per_step

    def flops(self, step: int) -> float:
        """FLOPs of the model up to a step."""
        return self.flops_before + (step - self.step) * self.tokens_per_step * self.flops_per_token

    def then(self, step: int, tokens_per_step: int, flops_per_token: float) -> "Progress":
        """The progress of a run that goes on from a step with other sizes; with the same ones this one."""
        if (tokens_per_step, flops_per_token) == (self.tokens_per_step, self.flops_per_token):
            return self
        return Progress(tokens_per_step, flops_per_token, step, self.tokens(step), self.flops(step))


def move_positions(checkpoint: dict[str, Any], before: Mapping[str, Any], now: TrainingConfig) -> None:
    """Let the positions in a checkpoint of Lightning's, counted in micro-batches, mean the same sequences as before.

    Args:
        checkpoint: changed in place.
        before: the keys of `training` that the checkpoint was written with.
    """
    step, loops = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
    same = (before["batch_size"], before["accumulate"], before["seq_len"])
    if same == (now.batch_size, now.accumulate, now.seq_len):
        return
    batches = step * now.accumulate
    for state in loops["state_dict"].get("combined_loader", []):
        seen = state.get("offset", 0) + state["next_batch"] * before["batch_size"]
        seen = -(-seen * before["seq_len"] // now.seq_len)
        state.update(next_batch=batches, offset=seen - batches * now.batch_size)
    counts = loops["epoch_loop.batch_progress"]
    for which in ("total", "current"):
        if counts[which]["ready"] == step * before["accumulate"]:  # else of another epoch, which begins anew
            counts[which] = dict.fromkeys(counts[which], batches)
