"""What is measured between two logged steps, and how long training took."""

import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepLog"]


class StepLog:
    """Sums of the micro-batches since the last logged step, and the clock of the run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds spent in training before this process, and up to the last logged step or check."""
        self._started: float | None = None
        self.tokens_per_second = 0.0
        """Tokens per second of training since this process began."""
        self.auxiliary: dict[str, Tensor] = {}
        """What is logged of the step at hand alone: balance losses, losses of kinds of rows, gradient norms."""
        self.nats = torch.zeros(())
        self.micro_batches = 0

    def add(self, nats: Tensor) -> None:
        """Add a micro-batch's share of the step's nats per valid label, times its micro-batches: a scalar.

        Their mean is that of the steps since the last row, where every label of a step counts the same.
        """
        self.nats = self.nats.to(nats.device) + nats
        self.micro_batches += 1

    def start(self, tokens: int) -> None:
        """Start the clock, with so many tokens trained already."""
        self._started = time.perf_counter() - self.seconds
        self._tokens_at_start, self._seconds_at_start = tokens, self.seconds

    def read_clock(self) -> None:
        """Bring `seconds` up to now; nothing before `start`."""
        if self._started is not None:
            self.seconds = time.perf_counter() - self._started

    def row(self, tokens: int, learning_rate: float, distillation: dict[str, float]) -> dict[str, float]:
        """Build the row of a logged step, and begin the next sums.

        Args:
            tokens: trained so far.
            distillation: what to add about soft targets.
        """
        self.read_clock()
        trained, elapsed = tokens - self._tokens_at_start, self.seconds - self._seconds_at_start
        self.tokens_per_second = trained / max(1e-9, elapsed)
        row = {
            "train/loss": (self.nats / self.micro_batches).item(),
            "tokens_per_second": self.tokens_per_second,
            "learning_rate": learning_rate,
        }
        row |= {name: value.item() for name, value in self.auxiliary.items()} | distillation
        self.nats = torch.zeros_like(self.nats)
        self.micro_batches = 0
        return row

    def save(self, state: dict[str, Any]) -> None:
        """Add to what a checkpoint keeps below "moesaic"."""
        state |= {"seconds": self.seconds, "nats": self.nats, "micro_batches": self.micro_batches}

    def load(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]
        self.nats, self.micro_batches = state["nats"], state["micro_batches"]
