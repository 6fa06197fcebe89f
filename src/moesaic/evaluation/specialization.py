"""What each expert takes: which tokens, of which files, where in the window, together with which other experts.

Counted in one pass, by layer.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.data import Tokenizer, TokenStream
from moesaic.layers import Routing

__all__ = [
    "BYTE_CLASSES",
    "FileKinds",
    "Specialization",
    "by_octave",
    "byte_class",
    "explained_share",
    "file_kinds",
    "no_formula",
    "overlap",
    "shorten",
]

BYTE_CLASSES = ("letters", "digits", "whitespace", "punctuation", "other")


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

    0 where they are independent, 1 where the row decides. Of the usual normalizations it is the one by the column's
    entropy (Theil's uncertainty coefficient): a division by the mean of both entropies could not reach 1 where many
    tokens share few experts. Counted from N events, independent rows and columns give about
    (rows - 1) (columns - 1) / 2N nats rather than none, so few events make it too high.

    Args:
        counts: (rows, columns). 0 if only one column occurs.
    """
    joint = counts.double() / counts.sum().clamp(min=1)
    columns = _entropy(joint.sum(dim=0))
    if int((counts.sum(dim=0) > 0).sum()) < 2:  # the entropy of one may be rounded to more than 0
        return 0.0
    return min(1.0, max(0.0, (_entropy(joint.sum(dim=1)) + columns - _entropy(joint.flatten())) / columns))


def overlap(counts: Tensor) -> Tensor:
    """(E, E) from counts (V, E): the mass that two experts' distributions of tokens share; 1 alike, 0 disjoint."""
    shares = (counts.double() / counts.sum(dim=0).clamp(min=1)).T
    return torch.stack([torch.minimum(share, shares).sum(dim=1) for share in shares])


class FileKinds:
    """The kind of file, by suffix, that each token of a stream comes from.

    Args:
        tokens: (n,), each document after an end-of-text id, which counts to it, and one more at the end.
        end_of_text: that id.
        documents: name of each document, in their order.
    """

    def __init__(self, tokens: npt.NDArray[np.integer[Any]], end_of_text: int, documents: Sequence[str]) -> None:
        marks = np.flatnonzero(np.asarray(tokens) == end_of_text)
        if len(marks) != len(documents) + 1:
            raise ValueError(f"{len(marks)} ends of text must be one more than the {len(documents)} documents")
        kinds = [PurePosixPath(name).suffix.lower() or "no suffix" for name in documents]
        self.names = sorted(set(kinds))
        self._starts = torch.from_numpy(marks)
        self._kinds = torch.tensor([self.names.index(kind) for kind in kinds])

    def at(self, positions: Tensor) -> Tensor:
        """Place in `names` of the tokens at these positions of the stream, of any shape."""
        return self._kinds[torch.searchsorted(self._starts, positions, right=True) - 1]


@dataclasses.dataclass
class LayerCounts:
    """Counts of the choices in one MoE layer."""

    by_token: Tensor
    """(V, E): choices of each expert by the token that it was chosen for; top_k choices per token."""
    by_position: Tensor
    """(L, E): the same by position in the window."""
    together: Tensor
    """(E, E): tokens that chose both; on the diagonal those that chose one."""
    then: Tensor | None = None
    """(E, E'): tokens by the first choice here and in the next MoE layer; None in the last one."""
    by_file_kind: Tensor | None = None
    """(F, E): choices by the kind of file; None if unknown."""


@dataclasses.dataclass
class Specialization:
    """Running counts over batches; `update` adds one.

    Args:
        vocab_size: V.
        token_strings: bytes of each token; None if unknown, then there are no byte classes.
        file_kinds: of the stream that the batches are windows of; None if unknown.
    """

    vocab_size: int
    token_strings: list[bytes] | None = None
    file_kinds: FileKinds | None = None
    layers: dict[str, LayerCounts] = dataclasses.field(default_factory=dict)

    @torch.no_grad()
    def update(self, routing: Mapping[str, Routing], batch: Mapping[str, Tensor]) -> None:
        """Add the routing of a batch of "tokens" and (optionally) "valid", each (B, L).

        With file_kinds, "starts" (B,) has to say where in the stream each window begins.
        """
        tokens = batch["tokens"].cpu()
        valid = batch["valid"].flatten().cpu() if "valid" in batch else torch.ones(tokens.numel(), dtype=torch.bool)
        positions = torch.arange(tokens.size(1)).expand_as(tokens).flatten()[valid]
        ids = tokens.flatten()[valid]
        chosen = {name: decided.expert_ids.cpu()[valid] for name, decided in routing.items()}
        sizes = {name: decided.logits.size(1) for name, decided in routing.items()}
        kinds = None
        if self.file_kinds is not None:
            kinds = self.file_kinds.at((batch["starts"].cpu()[:, None] + torch.arange(tokens.size(1))).flatten()[valid])
        names = list(chosen)
        for i, name in enumerate(names):
            experts = chosen[name]
            mine = _one_hot(experts, sizes[name]).sum(dim=1)
            counts = LayerCounts(
                by_token=_sum_rows(mine, ids, self.vocab_size),
                by_position=_sum_rows(mine, positions, tokens.size(1)),
                together=mine.T @ mine,
            )
            if i + 1 < len(names):
                following = _one_hot(chosen[names[i + 1]][:, 0], sizes[names[i + 1]])
                counts.then = _sum_rows(following, experts[:, 0], sizes[name] + 1)[: sizes[name]]
            if self.file_kinds is not None and kinds is not None:
                counts.by_file_kind = _sum_rows(mine, kinds, len(self.file_kinds.names))
            self.layers[name] = _add(self.layers[name], counts) if name in self.layers else counts

    def by_class(self, name: str) -> Tensor | None:
        """(5, E) choices of a layer by `BYTE_CLASSES`; None if the tokens' bytes are not known."""
        if self._classes is None:
            return None
        return _sum_rows(self.layers[name].by_token[: len(self._classes)], self._classes, len(BYTE_CLASSES))

    def by_file_kind(self, name: str) -> dict[str, Tensor] | None:
        """(E,) choices of a layer by kind of file, the most frequent first; None unless there are two kinds."""
        counts = self.layers[name].by_file_kind
        if self.file_kinds is None or counts is None:
            return None
        order = counts.sum(dim=1).argsort(descending=True, stable=True).tolist()
        seen = {self.file_kinds.names[kind]: counts[kind] for kind in order if counts[kind].any()}
        return seen if len(seen) > 1 else None

    @functools.cached_property
    def _classes(self) -> Tensor | None:
        """(V,) place in `BYTE_CLASSES` of each token."""
        if self.token_strings is None:
            return None
        return torch.tensor([BYTE_CLASSES.index(byte_class(token)) for token in self.token_strings])

    def numbers(self) -> dict[str, float]:
        """For metrics.json: what token, byte class, kind of file, position and the layer before explain of the choice.

        Each is an `explained_share`, positions by octave. `expert_overlap` is the mean over pairs of experts in use.
        """
        found: dict[str, float] = {}
        for name, counts in self.layers.items():
            found[f"router/{name}/token_expert_nmi"] = explained_share(counts.by_token)
            if (classes := self.by_class(name)) is not None:
                found[f"router/{name}/byte_class_expert_nmi"] = explained_share(classes)
            if (kinds := self.by_file_kind(name)) is not None:
                found[f"router/{name}/file_kind_expert_nmi"] = explained_share(torch.stack(list(kinds.values())))
            found[f"router/{name}/position_expert_nmi"] = explained_share(by_octave(counts.by_position))
            if counts.then is not None:
                found[f"router/{name}/next_layer_expert_nmi"] = explained_share(counts.then)
            used = counts.by_token[:, counts.by_token.sum(dim=0) > 0]
            if (experts := used.size(1)) > 1:
                pairs = overlap(used).sum() - experts
                found[f"router/{name}/expert_overlap"] = float(pairs) / (experts * (experts - 1))
        return found

    def counts(self) -> dict[str, dict[str, Any]]:
        """What all of this is made of, as lists: by layer the fields of `LayerCounts`, and the names of the rows."""
        found: dict[str, dict[str, Any]] = {}
        for name, layer in self.layers.items():
            fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
            found[name] = {key: None if value is None else value.tolist() for key, value in fields.items()}
            by_class = self.by_class(name)
            found[name]["by_byte_class"] = None if by_class is None else by_class.tolist()
            found[name]["byte_classes"] = list(BYTE_CLASSES)
            found[name]["file_kinds"] = None if self.file_kinds is None else self.file_kinds.names
        return found

    def describe(self, token: int) -> str:
        """A token for a label."""
        if self.token_strings is None or token >= len(self.token_strings):
            return str(token)
        text = self.token_strings[token].decode("utf-8", errors="backslashreplace")
        shown = repr(shorten(text)).replace(" ", "␣")  # runs of blanks can be counted
        return no_formula(shown) if text else "(end of text)"


def shorten(text: str) -> str:
    """At most 16 characters of it, for a label."""
    return text if len(text) <= 16 else f"{text[:15]}…"


def no_formula(label: str) -> str:
    """As matplotlib shows it letter by letter."""
    return label.replace("$", r"\$")


def by_octave(by_position: Tensor) -> Tensor:
    """(L, E) -> (octaves, E): position 0, 1 to 2, 3 to 6, and so on."""
    octave = torch.tensor([(position + 1).bit_length() - 1 for position in range(by_position.size(0))])
    return _sum_rows(by_position, octave, int(octave.max()) + 1)


def _one_hot(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(...) ids -> (..., E); zeros where there is no expert (an id of E)."""
    return F.one_hot(expert_ids, num_experts + 1)[..., :num_experts]


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
        then=_add_known(old.then, new.then),
        by_file_kind=_add_known(old.by_file_kind, new.by_file_kind),
    )


def _add_known(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    return None if old is None or new is None else old + new


def _entropy(probabilities: Tensor) -> float:
    """Nats."""
    return float(torch.special.entr(probabilities).sum())


def file_kinds(stream: TokenStream, tokenizer: Tokenizer | None) -> FileKinds | None:
    """Kinds of files of a split's tokens; None where the files are not known, as in a memory map or a recall task."""
    if stream.documents is None or tokenizer is None:
        return None
    return FileKinds(np.asarray(stream.tokens), tokenizer.end_of_text, stream.documents)
