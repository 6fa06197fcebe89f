"""What each expert takes: which tokens, where in the window, together with which other experts.

Counted in one pass, by layer. Kinds of files are not among it: a token stream does not say which file a document is.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from moesaic.errors import InputError
from moesaic.evaluation.plots import Floats, _figure, _label, _save
from moesaic.layers import Routing
from moesaic.models import Decoder, DecoderOutput

__all__ = [
    "BYTE_CLASSES",
    "Drift",
    "Specialisation",
    "byte_class",
    "explained_share",
    "overlap",
    "plot_specialisation",
]

BYTE_CLASSES = ("letters", "digits", "whitespace", "punctuation", "other")

FREQUENT_TOKENS = 24
"""Rows of the plot by token."""


def byte_class(token: bytes) -> str:
    """The one of `BYTE_CLASSES` that most bytes of a token belong to (ASCII; others: other); a tie goes to the first.

    So " if" are letters, "_x" too, and an end of text, which has no bytes, is other.
    """
    kinds = [_class_of_byte(byte) for byte in token]
    return max(BYTE_CLASSES, key=kinds.count) if kinds else "other"


def _class_of_byte(byte: int) -> str:
    character = chr(byte)
    if byte >= 128:
        return "other"
    if character.isalpha():
        return "letters"
    if character.isdigit():
        return "digits"
    if character in " \t\n\r\v\f":
        return "whitespace"
    return "punctuation" if character.isprintable() else "other"


def explained_share(counts: Tensor) -> float:
    """How much of the choice of column the row explains: mutual information over the entropy of the columns.

    0 where they are independent, 1 where the row decides. Of the usual normalisations it is the one by the column's
    entropy (Theil's uncertainty coefficient): a division by the mean of both entropies could not reach 1 where many
    tokens share few experts. Counted from N events, independent rows and columns give about
    (rows - 1) (columns - 1) / 2N nats rather than none, so few events make it too high.

    Args:
        counts: (rows, columns). 0 if only one column occurs.
    """
    joint = counts.double() / counts.sum().clamp(min=1)
    columns = _entropy(joint.sum(dim=0))
    if columns == 0:
        return 0.0
    return min(1.0, max(0.0, (_entropy(joint.sum(dim=1)) + columns - _entropy(joint.flatten())) / columns))


def overlap(counts: Tensor) -> Tensor:
    """(E, E) from counts (V, E): the mass that two experts' distributions of tokens share; 1 alike, 0 disjoint."""
    shares = (counts.double() / counts.sum(dim=0).clamp(min=1)).T
    return torch.stack([torch.minimum(share, shares).sum(dim=1) for share in shares])


@dataclasses.dataclass
class LayerCounts:
    """Of one MoE layer."""

    by_token: Tensor
    """(V, E): choices of each expert by the token that it was chosen for; top_k choices per token."""
    by_position: Tensor
    """(L, E): the same by position in the window."""
    together: Tensor
    """(E, E): tokens that chose both; on the diagonal those that chose one."""
    then: Tensor | None = None
    """(E, E'): tokens by the first choice here and in the next MoE layer; None in the last one."""


@dataclasses.dataclass
class Specialisation:
    """Running counts over batches; `update` adds one.

    Args:
        vocab_size: V.
        token_strings: bytes of each token; None if unknown, then there are no byte classes.
    """

    vocab_size: int
    token_strings: list[bytes] | None = None
    layers: dict[str, LayerCounts] = dataclasses.field(default_factory=dict)

    @torch.no_grad()
    def update(self, output: DecoderOutput, batch: Mapping[str, Tensor]) -> None:
        """Add the routing of a batch of "tokens" and (optionally) "valid", each (B, L)."""
        tokens = batch["tokens"].cpu()
        valid = batch["valid"].flatten().cpu() if "valid" in batch else torch.ones(tokens.numel(), dtype=torch.bool)
        positions = torch.arange(tokens.size(1)).expand_as(tokens).flatten()[valid]
        ids = tokens.flatten()[valid]
        chosen = {name: routing.expert_ids.cpu()[valid] for name, routing in output.routing.items()}
        sizes = {name: routing.logits.size(1) for name, routing in output.routing.items()}
        names = list(chosen)
        for i, name in enumerate(names):
            experts = chosen[name]
            mine = F.one_hot(experts, sizes[name]).sum(dim=1)
            counts = LayerCounts(
                by_token=_sum_rows(mine, ids, self.vocab_size),
                by_position=_sum_rows(mine, positions, tokens.size(1)),
                together=mine.T @ mine,
            )
            if i + 1 < len(names):
                following = F.one_hot(chosen[names[i + 1]][:, 0], sizes[names[i + 1]])
                counts.then = _sum_rows(following, experts[:, 0], sizes[name])
            self.layers[name] = _add(self.layers[name], counts) if name in self.layers else counts

    def by_class(self, name: str) -> Tensor | None:
        """(5, E) choices of a layer by `BYTE_CLASSES`; None if the tokens' bytes are not known."""
        if self._classes is None:
            return None
        return _sum_rows(self.layers[name].by_token[: len(self._classes)], self._classes, len(BYTE_CLASSES))

    @functools.cached_property
    def _classes(self) -> Tensor | None:
        """(V,) place in `BYTE_CLASSES` of each token."""
        if self.token_strings is None:
            return None
        return torch.tensor([BYTE_CLASSES.index(byte_class(token)) for token in self.token_strings])

    def numbers(self) -> dict[str, float]:
        """For metrics.json: what token, byte class, position and the layer before explain of the choice of expert.

        Each is an `explained_share`, positions by octave. `expert_overlap` is the mean over pairs of experts in use.
        """
        found: dict[str, float] = {}
        for name, counts in self.layers.items():
            found[f"router/{name}/token_expert_nmi"] = explained_share(counts.by_token)
            if (classes := self.by_class(name)) is not None:
                found[f"router/{name}/byte_class_expert_nmi"] = explained_share(classes)
            found[f"router/{name}/position_expert_nmi"] = explained_share(_by_octave(counts.by_position))
            if counts.then is not None:
                found[f"router/{name}/next_layer_expert_nmi"] = explained_share(counts.then)
            used = counts.by_token[:, counts.by_token.sum(dim=0) > 0]
            if (experts := used.size(1)) > 1:
                pairs = overlap(used).sum() - experts
                found[f"router/{name}/expert_overlap"] = float(pairs) / (experts * (experts - 1))
        return found

    def describe(self, token: int) -> str:
        """A token for a label."""
        if self.token_strings is None or token >= len(self.token_strings):
            return str(token)
        text = self.token_strings[token].decode("utf-8", errors="backslashreplace")
        return repr(text).replace("$", r"\$") if text else "(end of text)"


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
    def update(self, output: DecoderOutput, batch: Mapping[str, Tensor]) -> None:
        """Route the batch's "tokens" (B, L) with the other decoder, and compare.

        Raises:
            InputError: the other decoder has other MoE layers.
        """
        _, theirs = self.other.hidden_states(batch["tokens"])
        if _shapes(theirs) != _shapes(output.routing):
            raise InputError(
                f"other_checkpoint: its MoE layers (experts, top_k) are {_shapes(theirs)}; allowed are those of "
                f"checkpoint: {_shapes(output.routing)}"
            )
        for name, routing in output.routing.items():
            kept = (routing.expert_ids[:, :, None] == theirs[name].expert_ids[:, None, :]).any(dim=2)
            if "valid" in batch:
                kept = kept[batch["valid"].flatten()]
            self._changed[name] = self._changed.get(name, 0) + int((~kept).sum())
            self._choices[name] = self._choices.get(name, 0) + kept.numel()

    def numbers(self) -> dict[str, float]:
        return {f"router/{name}/drift": n / max(1, self._choices[name]) for name, n in self._changed.items()}


def plot_specialisation(found: Specialisation, out: Path) -> bool:
    """A row of heat maps per MoE layer: byte classes, frequent tokens, positions, other experts, the next layer.

    False (no file) without MoE layers.
    """
    if not found.layers:
        return False
    columns = 5
    figure, axes = _figure(len(found.layers), columns, width=22, height=1 + 3.9 * len(found.layers))
    for i, (name, counts) in enumerate(found.layers.items()):
        classes, tokens, positions, together, then = axes[columns * i : columns * (i + 1)]
        if (by_class := found.by_class(name)) is None:
            classes.set_visible(False)
        else:
            _heat(classes, by_class, f"{name}: by byte class", "expert", list(BYTE_CLASSES))
        frequent = counts.by_token.sum(dim=1).topk(min(FREQUENT_TOKENS, counts.by_token.size(0))).indices
        labels = [found.describe(token) for token in frequent.tolist()]
        _heat(tokens, counts.by_token[frequent], "by token, most frequent first", "expert", labels)
        octaves = _by_octave(counts.by_position)
        last = counts.by_position.size(0) - 1
        labels = ["0", *(f"{2**k - 1} to {min(2 ** (k + 1) - 2, last)}" for k in range(1, len(octaves)))]
        _heat(positions, octaves, "by position in the window", "expert", labels)
        if counts.together.sum() > counts.together.diagonal().sum():
            chosen = counts.together.diagonal()[:, None].clamp(min=1)
            _heat_shares(together, (counts.together / chosen).numpy(), "chosen too, of what an expert takes", "expert")
        else:
            _heat_shares(together, overlap(counts.by_token).numpy(), "overlap of the experts' tokens", "expert")
        if counts.then is None:
            then.set_visible(False)
        else:
            _heat(then, counts.then, "first choice in the next MoE layer", "expert there", None)
    _save(figure, out)
    return True


def _heat(axis: Axes, counts: Tensor, title: str, x: str, labels: list[str] | None) -> None:
    """Each row's shares; a row without counts stays blank."""
    total = counts.sum(dim=1, keepdim=True).double()
    shares = torch.where(total > 0, counts / total.clamp(min=1), math.nan)
    _heat_shares(axis, shares.numpy(), title, x)
    if labels is not None:
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_ylabel("")


def _heat_shares(axis: Axes, shares: Floats, title: str, x: str) -> None:
    image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    _label(axis, title, x, "expert")
    axis.grid(False)
    assert axis.figure is not None
    axis.figure.colorbar(image, ax=axis, fraction=0.05)
    axis.set_xticks(np.unique(np.linspace(0, shares.shape[1] - 1, min(8, shares.shape[1])).round().astype(int)))


def _by_octave(by_position: Tensor) -> Tensor:
    """(L, E) -> (octaves, E): position 0, 1 to 2, 3 to 6, and so on."""
    octave = torch.tensor([(position + 1).bit_length() - 1 for position in range(by_position.size(0))])
    return _sum_rows(by_position, octave, int(octave.max()) + 1)


def _sum_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """(size, E): the sums of the rows (N, E) with each index (N,)."""
    return torch.zeros(size, rows.size(1), dtype=torch.int64).index_add_(0, index, rows)


def _add(old: LayerCounts, new: LayerCounts) -> LayerCounts:
    length = max(old.by_position.size(0), new.by_position.size(0))
    positions = [F.pad(each.by_position, (0, 0, 0, length - each.by_position.size(0))) for each in (old, new)]
    return LayerCounts(
        by_token=old.by_token + new.by_token,
        by_position=positions[0] + positions[1],
        together=old.together + new.together,
        then=None if old.then is None or new.then is None else old.then + new.then,
    )


def _entropy(probabilities: Tensor) -> float:
    """Nats."""
    return float(torch.special.entr(probabilities).sum())


def _shapes(routing: Mapping[str, Routing]) -> dict[str, tuple[int, int]]:
    return {name: (each.logits.size(1), each.expert_ids.size(1)) for name, each in routing.items()}
