"""Loss far beyond the training length: streamed with the cache, and by position."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.data.shards import ShardedIds
from moesaic.errors import InputError
from moesaic.evaluation.results import ResultFile, is_numbers
from moesaic.evaluation.variants import Variant
from moesaic.models import Decoder
from moesaic.statistics import mean_and_error

__all__ = [
    "LossByPosition",
    "LossByPositionConfig",
    "choose_stretches",
    "log_buckets",
    "loss_by_position",
    "stream_nats",
]

Ids = npt.NDArray[np.integer[Any]]


@dataclasses.dataclass(frozen=True)
class LossByPositionConfig:
    """How far, on how much text, and how finely loss by position is measured."""

    # the longest context over the training length
    multiple: float = dataclasses.field(default=16.0, metadata={"most": 2**20})
    # at most; null: as many as the text has
    stretches: int | None = dataclasses.field(default=32, metadata={"most": 2**20})
    within: Literal["stream", "files"] = "stream"  # files one after the other, or each stretch from one file's start
    chunk_tokens: int = dataclasses.field(default=256, metadata={"most": 2**20})
    buckets_per_octave: int = dataclasses.field(default=2, metadata={"most": 2**10})

    def __post_init__(self) -> None:
        for name in ("multiple", "stretches", "chunk_tokens", "buckets_per_octave"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: must be a number > 0")


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Sums of nats per stretch and bucket; position p is the prediction from p + 1 tokens of context.

    Args:
        edges: bucket k holds the positions edges[k] to edges[k + 1] - 1.
        nats: (S, buckets) fp64, S stretches.
        num_bytes: (S, buckets) int64, bytes of the predicted tokens; None if unknown.
    """

    edges: tuple[int, ...]
    nats: Tensor
    num_bytes: Tensor | None

    def per_stretch(self, start: int = 0, end: int | None = None) -> Tensor:
        """(S,) mean nats per token over the buckets that lie within positions start to end - 1."""
        chosen, tokens = self._buckets(start, end)
        return self.nats[:, chosen].sum(dim=1) / tokens

    def loss(self, start: int = 0, end: int | None = None) -> tuple[float, float]:
        """(nats per token, its standard error over stretches; nan for a single stretch)."""
        return mean_and_error(self.per_stretch(start, end))

    def difference(self, other: "LossByPosition", start: int = 0, end: int | None = None) -> tuple[float, float]:
        """(this loss minus the other's on the same stretches, its standard error paired by stretch)."""
        return mean_and_error(self.per_stretch(start, end) - other.per_stretch(start, end))

    def bits_per_byte(self, start: int = 0, end: int | None = None) -> float | None:
        if self.num_bytes is None:
            return None
        chosen, _ = self._buckets(start, end)
        total = int(self.num_bytes[:, chosen].sum())
        return float(self.nats[:, chosen].sum()) / math.log(2) / total if total else None

    def rows(self) -> list[dict[str, float | int | None]]:
        """One row per bucket: positions, loss with its standard error, bits per byte, and the loss up to its end."""
        rows: list[dict[str, float | int | None]] = []
        for start, end in zip(self.edges, self.edges[1:], strict=False):
            mean, error = self.loss(start, end)
            rows.append(
                {
                    "start": start,
                    "end": end,
                    "loss": mean,
                    "standard_error": None if math.isnan(error) else error,
                    "bits_per_byte": self.bits_per_byte(start, end),
                    "cumulative_loss": self.loss(0, end)[0],
                    "cumulative_bits_per_byte": self.bits_per_byte(0, end),
                }
            )
        return rows

    def _buckets(self, start: int, end: int | None) -> tuple[list[int], int]:
        end = self.edges[-1] if end is None else end
        pairs = list(zip(self.edges, self.edges[1:], strict=False))
        chosen = [k for k, (first, last) in enumerate(pairs) if first >= start and last <= end]
        return chosen, sum(pairs[k][1] - pairs[k][0] for k in chosen)


def log_buckets(length: int, train_length: int, per_octave: int = 2) -> tuple[int, ...]:
    """Edges 0, ..., train_length, ..., length of log-spaced buckets of positions; the training length is an edge."""
    octaves = math.ceil(abs(math.log2(length / train_length))) + math.ceil(math.log2(train_length)) + 1
    steps = range(-octaves * per_octave, octaves * per_octave + 1)
    inner = {round(train_length * 2 ** (step / per_octave)) for step in steps}
    return tuple(sorted({0, length} | {edge for edge in inner if 0 < edge < length}))


def choose_stretches(
    tokens: Ids | ShardedIds,
    length: int,
    *,
    limit: int | None,
    within: Literal["stream", "files"],
    end_of_text: int | None,
) -> Tensor:
    """Stretches that share no predicted token, spread evenly over a stream; (S, length + 1) int64.

    Args:
        tokens: (n,), documents after end-of-text ids.
        limit: at most this many; None for all.
        within: "stream" cuts the stream as it is, so that positions are alike in content; "files" takes the first
            `length` tokens of every document that has as many.

    Raises:
        InputError: the text holds no stretch of this length.
    """
    if within == "stream":
        starts = np.arange(0, len(tokens) - length, length)
        found = f"the text has {len(tokens)} tokens"
    else:
        if end_of_text is None:
            raise InputError("within='files': the checkpoint has no tokenizer, so file boundaries are unknown")
        marks = np.flatnonzero(np.asarray(tokens) == end_of_text)
        sizes = np.diff(marks) - 1
        starts = marks[:-1][sizes >= length]
        longest = int(sizes.max()) if len(sizes) else 0
        found = f"the longest file has {longest} tokens"
    if not len(starts):
        raise InputError(
            f"a context of {length} tokens: longer than the data, {found}; it needs a smaller multiple, another "
            "split or more text"
        )
    if limit is not None and limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(np.int64)]
    return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))


@torch.inference_mode()
def stream_nats(
    decoder: Decoder, tokens: Tensor, *, chunk_tokens: int = 256, window: int | None = None
) -> Iterator[Tensor]:
    """Nats of tokens[:, 1:], a chunk of positions at a time; equal to the whole sequence at once up to rounding.

    Memory is that of the cache and of one chunk's logits; a decoder with a mixer that has no cache runs the whole
    sequence and streams the logits only. Full attention after a cache builds a (chunk, keys) mask: choose small chunks
    for millions of tokens.

    Args:
        tokens: (B, L + 1).
        window: cut the context to window / 2 to window tokens, recomputed for every window / 2 tokens: what the same
            weights do with a plain window, whatever their attention.

    Yields:
        (B, l) fp32, in order, L in total.
    """
    tokens = tokens.to(decoder.device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    length, start = inputs.size(1), 0
    if window is not None and window < length:
        while start < length:
            end = min(length, start + window // 2 if start else window)
            begin = max(0, end - window)
            hidden, _ = decoder.hidden_states(inputs[:, begin:end])
            yield from _nats(decoder, hidden[:, start - begin :], labels[:, start:end], chunk_tokens)
            start = end
        return
    cache = decoder.make_cache()
    step = length if cache is None else chunk_tokens
    for start in range(0, length, step):
        hidden, _ = decoder.hidden_states(inputs[:, start : start + step], cache)
        yield from _nats(decoder, hidden, labels[:, start : start + step], chunk_tokens)


def _nats(decoder: Decoder, hidden: Tensor, labels: Tensor, chunk_tokens: int) -> Iterator[Tensor]:
    for start in range(0, labels.size(1), chunk_tokens):
        logits = decoder.head(hidden[:, start : start + chunk_tokens])
        some = labels[:, start : start + chunk_tokens]
        yield F.cross_entropy(logits.float().flatten(0, 1), some.flatten(), reduction="none").view_as(some)


def loss_by_position(
    variants: Sequence[Variant],
    stretches: Tensor,
    edges: Sequence[int],
    *,
    token_bytes: Tensor | None = None,
    chunk_tokens: int = 256,
    batch_size: int = 8,
    results: ResultFile | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LossByPosition]:
    """Loss by position of every variant on the same stretches, and of others that are finished in `results`.

    Args:
        stretches: (S, L + 1), see `choose_stretches`.
        edges: of the buckets, 0 to L, see `log_buckets`.
        token_bytes: (V,) bytes of each token.
        batch_size: stretches that run together; the cache is that of so many.
        results: saved after every batch of stretches; what it has is not run again.
        advance: told how many tokens came on, and how many there are in all, for a progress bar.
    """
    bucket_of = torch.bucketize(torch.arange(stretches.size(1) - 1), torch.tensor(edges[1:]), right=True)
    num_bytes = None
    if token_bytes is not None:
        num_bytes = torch.zeros(len(stretches), len(edges) - 1, dtype=torch.int64)
        for row, labels in zip(num_bytes, stretches[:, 1:], strict=True):
            row.index_add_(0, bucket_of, token_bytes[labels].long())

    def is_whole(rows: Any) -> bool:
        count = len(rows) if isinstance(rows, list) else math.inf
        return count <= len(stretches) and all(is_numbers(row, len(edges) - 1) for row in rows)

    found = {}
    total = len(variants) * len(stretches) * len(bucket_of)
    # all of them before any work
    known: list[list[list[float]]] = [[] if results is None else results.rows(v.name, is_whole) for v in variants]
    for variant, rows in zip(variants, known, strict=True):
        advance(len(rows) * len(bucket_of), total)
        while len(rows) < len(stretches):
            batch = stretches[len(rows) : len(rows) + batch_size]
            sums = _bucket_sums(variant, batch, bucket_of, chunk_tokens, lambda n: advance(n, total))
            if not bool(sums.isfinite().all()):
                raise InputError(f"variants: {variant.name}: its loss is not finite")
            rows += sums.tolist()
            if results is not None:
                results.save()
        found[variant.name] = LossByPosition(tuple(edges), torch.tensor(rows, dtype=torch.float64), num_bytes)
    for name, rows in {} if results is None else results.done.items():
        if name not in found and is_whole(rows) and len(rows) == len(stretches):
            found[name] = LossByPosition(tuple(edges), torch.tensor(rows, dtype=torch.float64), num_bytes)
    return found


def _bucket_sums(
    variant: Variant, batch: Tensor, bucket_of: Tensor, chunk_tokens: int, advance: Callable[[int], None]
) -> Tensor:
    """(B, buckets) fp64 sums of nats of stretches (B, L + 1)."""
    at, sums = 0, torch.zeros(len(batch), int(bucket_of.max()) + 1, dtype=torch.float64)
    for nats in stream_nats(variant.decoder, batch, chunk_tokens=chunk_tokens, window=variant.window):
        sums.index_add_(1, bucket_of[at : at + nats.size(1)], nats.cpu().double())
        at += nats.size(1)
        advance(nats.numel())
    return sums
