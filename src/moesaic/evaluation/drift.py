"""How many choices of experts change: between two checkpoints of a run, and from check to check while it trains."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import InputError
from moesaic.layers import Routing
from moesaic.models import Decoder

__all__ = ["Drift", "RunningDrift", "Watched", "changed_choices"]


def changed_choices(before: Tensor, now: Tensor) -> Tensor:
    """Mark the experts in `now` (T, K) that are not among those that the token had `before` (T, K): (T, K) bool.

    So the order of a token's choices does not count.
    """
    return (now[:, :, None] != before[:, None, :]).all(dim=2)


class Drift:
    """Share of choices that another checkpoint makes differently, by layer; `update` adds a batch.

    Experts are told apart by their number, so this is about two moments of one run: in runs of their own, experts that
    do the same have other numbers.
    """

    def __init__(self, other: Decoder) -> None:
        self.other = other.eval()
        self._changed: dict[str, int] = {}
        self._choices: dict[str, int] = {}

    @torch.no_grad()
    def update(self, routing: Mapping[str, Routing], batch: Mapping[str, Tensor]) -> None:
        """Route the batch's "tokens" (B, L) with the other decoder, and compare.

        Raises:
            InputError: the other decoder has other MoE layers.
        """
        _, theirs = self.other.hidden_states(batch["tokens"])
        if _shapes(theirs) != _shapes(routing):
            raise InputError(
                f"other_checkpoint: its MoE layers (experts, top_k) are {_shapes(theirs)}; they must be those of "
                f"checkpoint: {_shapes(routing)}"
            )
        for name, decided in routing.items():
            changed = changed_choices(theirs[name].expert_ids, decided.expert_ids)
            if "valid" in batch:
                changed = changed[batch["valid"].flatten()]
            self._changed[name] = self._changed.get(name, 0) + int(changed.sum())
            self._choices[name] = self._choices.get(name, 0) + changed.numel()

    def numbers(self) -> dict[str, float]:
        return {f"router/{name}/drift": n / max(1, self._choices[name]) for name, n in self._changed.items()}


Watched = tuple[Tensor, dict[str, Tensor]]
"""Tokens (T,), and what they chose (T, K) by layer."""


class RunningDrift:
    """Share of choices that changed since the check before, by layer, on the first tokens that a check sees.

    `update` adds a batch of a check, `finish` ends it. What is kept between checks is the choices, one byte each where
    there are up to 256 experts.

    Args:
        max_tokens: how many tokens are watched.
    """

    def __init__(self, max_tokens: int = 16_384) -> None:
        self.max_tokens = max_tokens
        self._tokens: list[Tensor] = []
        self._choices: dict[str, list[Tensor]] = {}
        self._before: dict[str, Any] = {}
        self._experts: dict[str, int] = {}

    @torch.no_grad()
    def update(
        self,
        routing: Mapping[str, Routing],
        batch: Mapping[str, Tensor],
        gather: Callable[[Watched], Iterable[Watched]] = lambda watched: [watched],
    ) -> None:
        """Add the routing of a batch of "tokens" and (optionally) "valid", each (B, L).

        Args:
            gather: what all ranks have of the batch, in the order of its rows.
        """
        left = self._left
        if left <= 0 or not routing:
            return
        tokens = batch["tokens"].flatten()
        watched = torch.arange(tokens.numel(), device=tokens.device)
        watched = (watched[batch["valid"].flatten()] if "valid" in batch else watched)[:left]
        chosen = {}
        for name, decided in routing.items():
            chosen[name] = decided.expert_ids[watched].to("cpu", _id_dtype(decided.logits.size(1)))
            self._experts[name] = decided.logits.size(1)
        for seen, choices in gather((tokens[watched].cpu(), chosen)):
            left = self._left
            self._tokens.append(seen[:left])
            for name, ids in choices.items():
                self._choices.setdefault(name, []).append(ids[:left])

    @property
    def _left(self) -> int:
        return self.max_tokens - sum(tokens.numel() for tokens in self._tokens)

    def finish(self) -> dict[str, float]:
        """The shares; empty if no check was before, or one on other tokens (a run that goes on with other data)."""
        if not self._choices:
            return {}
        tokens = hashlib.sha256(torch.cat(self._tokens).numpy().tobytes()).hexdigest()
        choices = {name: _stack(ids, self._experts[name]) for name, ids in self._choices.items()}
        before, self._before = self._before, {"tokens": tokens, "choices": choices}
        self._tokens, self._choices = [], {}
        if before.get("tokens") != tokens:
            return {}
        return {
            f"router/{name}/drift": self._share(name, before["choices"][name], ids)
            for name, ids in choices.items()
            if name in before["choices"]
        }

    def _share(self, name: str, before: Tensor, now: Tensor) -> float:
        """The share of the experts chosen now that were not chosen before; slots without an expert do not count."""
        is_expert = now != self._experts[name]
        return int((changed_choices(before, now) & is_expert).sum()) / max(1, int(is_expert.sum()))

    def state_dict(self) -> dict[str, Any]:
        """Choices of the last check, (T, K) by layer, and the hash of the tokens that they are for."""
        return self._before

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = state


def _stack(ids: list[Tensor], num_experts: int) -> Tensor:
    """Choices (T, K) of several batches as one, as wide as the widest; E ("no expert") fills up."""
    width = max(each.size(1) for each in ids)
    return torch.cat([F.pad(each, (0, width - each.size(1)), value=num_experts) for each in ids])


def _id_dtype(num_experts: int) -> torch.dtype:
    """Wide enough for the ids and for E, "no expert"."""
    return torch.uint8 if num_experts < 2**8 else torch.int16 if num_experts < 2**15 else torch.int32


def _shapes(routing: Mapping[str, Routing]) -> dict[str, tuple[int, int]]:
    return {name: (each.logits.size(1), each.expert_ids.size(1)) for name, each in routing.items()}
