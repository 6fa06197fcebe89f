"""Loss far beyond the training length: streamed with the cache, by position, with switches turned at inference only."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.models import Decoder, DecoderConfig, build_decoder
from moesaic.statistics import mean_and_error

__all__ = [
    "PRESETS",
    "LossByPosition",
    "LossByPositionConfig",
    "ResultFile",
    "Variant",
    "build_variants",
    "choose_stretches",
    "digest",
    "is_numbers",
    "log_buckets",
    "loss_by_position",
    "stream_nats",
    "with_overrides",
]

Ids = npt.NDArray[np.integer[Any]]

PRESETS = {
    "as_trained": "the checkpoint as it is",
    "temperature": "attention.temperature.attn_scale=0.4 attention.temperature.floor_scale=<training length>",
    "no_temperature": "attention.temperature=null",
    "scalable_softmax": "attention.temperature.scalable_softmax=<1 / log(training length)>",
    "window": "window=<training length>",
}
"""Variants that have a name; the training length is that of the checkpoint."""


@dataclasses.dataclass(frozen=True)
class LossByPositionConfig:
    """How far, on how much text, and how finely loss by position is measured."""

    multiple: float = 16.0  # the longest context over the training length
    stretches: int | None = 32  # at most; null: as many as the text has
    within: Literal["stream", "files"] = "stream"  # files one after the other, or each stretch from one file's start
    chunk_tokens: int = 256
    buckets_per_octave: int = 2

    def __post_init__(self) -> None:
        for name in ("multiple", "stretches", "chunk_tokens", "buckets_per_octave"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: allowed are numbers > 0")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A decoder with some switches turned; `window` cuts its context to that many tokens."""

    name: str
    decoder: Decoder
    window: int | None = None


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


class ResultFile:
    """Results as far as they have come, in one JSON file that is rewritten atomically.

    An evaluation that was stopped goes on from it; one of another identity is refused and the file left as it is.

    Within a long stretch the sums and the cache so far stand in a second file beside it, one for each variant, which
    goes when the stretch is done. The picture made from it has its name: where one stands alone, the folder is
    somebody else's.

    Args:
        path: the file; its folder is made.
        identity: what has to be equal for results to belong together.
        seconds: the state within a stretch is saved when so much time went by.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], seconds: float = 60.0) -> None:
        self.path = path
        self.seconds = seconds
        self._last_state = time.monotonic()
        self.identity = json.loads(json.dumps(identity))
        self.done: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                if (picture := path.with_suffix(".png")).exists():
                    raise InputError(
                        f"{picture}: would be overwritten, and {path.name} is not beside it; choose another output"
                    )
                self._write()  # whose folder this is has to be known before the first result
        except OSError as error:
            raise InputError(f"output={str(path.parent)!r}: cannot be written ({error.strerror})") from error
        self._read()

    def _read(self) -> None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            old, done, summary = flatten(stored["identity"]), dict(stored["done"]), dict(stored["summary"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path}: not a result file of this evaluation; choose another output") from error
        new = flatten(self.identity)
        differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        if differing:
            listed = "; ".join(f"{key}: {old.get(key)} there, {new.get(key)} now" for key in differing)
            raise InputError(f"{self.path}: results of another evaluation ({listed}); choose another output")
        self.done, self.summary = done, summary

    def rows(self, name: str, is_whole: Callable[[Any], bool]) -> list[Any]:
        """What there is of a variant, to be appended to.

        Raises:
            InputError: it is not what this evaluation writes.
        """
        rows = self.done.get(name, [])
        if not is_whole(rows):
            raise InputError(f"{self.path}: done.{name}: damaged; choose another output, or delete the file")
        self.done[name] = rows
        return rows

    def save(self, name: str | None = None) -> None:
        """Write the file; with the name of a variant, one of its stretches is done."""
        self._write()
        if name is not None:
            self._state_path(name).unlink(missing_ok=True)

    def _state_path(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.state.pt")

    def _write(self) -> None:
        text = json.dumps({"identity": self.identity, "summary": self.summary, "done": self.done}, allow_nan=False)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)  # of a full disk

    def save_state(self, name: str, place: Sequence[Any], at: int, sums: Tensor, cache: Sequence[Any]) -> None:
        """Every `seconds`, keep a variant's sums and cache after `at` tokens of the batch of stretches `place`."""
        if time.monotonic() - self._last_state < self.seconds:
            return
        self._last_state = time.monotonic()
        if not all(hasattr(layer, "__dict__") for layer in cache):
            return  # a cache of a user's own mixer that cannot be taken apart: its stretch starts again
        state = {"identity": json.dumps([self.identity, name, place]), "at": at, "sums": sums}
        path = self._state_path(name)
        temporary = path.with_name(f".{path.name}")  # one name: what a kill leaves behind is written over
        torch.save({**state, "cache": [vars(layer) for layer in cache]}, temporary)
        temporary.replace(path)

    def load_state(
        self, name: str, place: Sequence[Any], cache: Sequence[Any], device: torch.device
    ) -> tuple[int, Tensor] | None:
        """Fill `cache` and return (at, sums), if a state of this batch of stretches is there."""
        try:
            state = torch.load(self._state_path(name), map_location=device, weights_only=True)
            if state["identity"] != json.dumps([self.identity, name, place]):
                return None
        except Exception:  # none, a damaged one, or objects of a user's own: its stretch starts again
            return None
        for layer, stored in zip(cache, state["cache"], strict=True):
            vars(layer).update(stored)
        return state["at"], state["sums"].cpu()


def with_overrides(config: DecoderConfig, overrides: Mapping[str, Any]) -> DecoderConfig:
    """`config` with values set by dotted key, such as {"attention.temperature.attn_scale": 0.4}.

    A section that is null is made: its other keys take their defaults. A value may be a mapping.

    Raises:
        InputError: a key that does not exist or a value that is not allowed, named as model.<key>.
    """
    mapping = to_mapping(config)
    for key, value in overrides.items():
        *sections, name = key.split(".")
        place = mapping
        for i, section in enumerate(sections):
            if place.get(section) is None and section in place:
                place[section] = {}
            inner = place.get(section)
            if not isinstance(inner, dict):
                raise InputError(
                    f"model.{'.'.join(sections[: i + 1])}: "
                    + ("has no keys below it" if section in place else f"unknown key; allowed: {', '.join(place)}")
                )
            place = inner
        place[name] = value
    return from_mapping(DecoderConfig, mapping, "model")


def build_variants(decoder: Decoder, names: Sequence[str], train_length: int) -> list[Variant]:
    """The decoders of an A/B comparison; all share the weights of `decoder`.

    Args:
        decoder: one that `build_decoder` made.
        names: each a name in `PRESETS`, or switches separated by spaces: dotted keys of the model's config,
            "attention.attention_chunk_size=64 attention.temperature=null", and window=<tokens>.

    Raises:
        InputError: an unknown or repeated name, an unknown key, or a switch that needs other weights.
    """
    if decoder.config is None:
        raise InputError("variants: this decoder has no config: only decoders of build_decoder can be varied")
    if not names:
        raise InputError(f"variants: none given; allowed are {', '.join(PRESETS)}, or key=value")
    if len(set(names)) < len(names):
        raise InputError(f"variants: {', '.join(names)}: one of them stands twice")
    return [_build_variant(decoder, decoder.config, name, train_length) for name in names]


def _build_variant(decoder: Decoder, config: DecoderConfig, name: str, train_length: int) -> Variant:
    switches = _switches(name, train_length)
    window = switches.pop("window", None)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 2):
        raise InputError(f"variants: {name}: window={window!r}: allowed are integers >= 2")
    if not switches:
        return Variant(name, decoder, window)
    try:
        changed = with_overrides(config, switches)
    except InputError as error:
        raise InputError(f"variants: {name}: {error}") from error
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        varied = build_decoder(changed, dtype=decoder.dtype)
    try:
        varied.load_state_dict(decoder.state_dict(), assign=True)
    except RuntimeError as error:
        raise InputError(f"variants: {name}: it needs weights of another shape than the checkpoint's") from error
    return Variant(name, varied.to(decoder.device).eval(), window)


def _switches(name: str, train_length: int) -> dict[str, Any]:
    presets: dict[str, dict[str, Any]] = {
        "as_trained": {},
        "temperature": {"attention.temperature": {"attn_scale": 0.4, "floor_scale": train_length}},
        "no_temperature": {"attention.temperature": None},
        "scalable_softmax": {"attention.temperature": {"scalable_softmax": 1 / math.log(max(2, train_length))}},
        "window": {"window": max(2, train_length)},
    }
    switches: dict[str, Any] = {}
    for word in name.split():
        key, separator, value = word.partition("=")
        if not separator and word not in presets:
            raise InputError(
                f"variants: {name!r}: unknown variant {word}; allowed are {', '.join(PRESETS)}, or key=value"
            )
        turned = {key: _value(name, value)} if separator else presets[word]
        if repeated := turned.keys() & switches.keys():
            raise InputError(f"variants: {name!r}: {min(repeated)} stands twice")
        switches |= turned
    if not name.split():
        raise InputError(f"variants: {name!r}: allowed are {', '.join(PRESETS)}, or key=value")
    return switches


def _value(name: str, text: str) -> Any:
    if text in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[text]
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        if not math.isfinite(value):
            raise InputError(f"variants: {name!r}: {text}: allowed are finite numbers")
        return value
    return text


def log_buckets(length: int, train_length: int, per_octave: int = 2) -> tuple[int, ...]:
    """Edges 0, ..., train_length, ..., length of log-spaced buckets of positions; the training length is an edge."""
    octaves = math.ceil(abs(math.log2(length / train_length))) + math.ceil(math.log2(train_length)) + 1
    steps = range(-octaves * per_octave, octaves * per_octave + 1)
    inner = {round(train_length * 2 ** (step / per_octave)) for step in steps}
    return tuple(sorted({0, length} | {edge for edge in inner if 0 < edge < length}))


def choose_stretches(
    tokens: Ids, length: int, *, limit: int | None, within: Literal["stream", "files"], end_of_text: int | None
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
            raise InputError("within='files': the checkpoint has no tokeniser, so file boundaries are unknown")
        marks = np.flatnonzero(np.asarray(tokens) == end_of_text)
        sizes = np.diff(marks) - 1
        starts = marks[:-1][sizes >= length]
        longest = int(sizes.max()) if len(sizes) else 0
        found = f"the longest file has {longest} tokens"
    if not len(starts):
        raise InputError(
            f"a context of {length} tokens: longer than the data, {found}; allowed are a smaller multiple, another "
            "split or more text"
        )
    if limit is not None and limit < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(np.int64)]
    return torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in starts]).astype(np.int64))


@torch.inference_mode()
def stream_nats(
    decoder: Decoder,
    tokens: Tensor,
    *,
    chunk_tokens: int = 256,
    window: int | None = None,
    cache: list[Any] | None = None,
    start: int = 0,
) -> Iterator[Tensor]:
    """Nats of tokens[:, 1:], a chunk of positions at a time; equal to the whole sequence at once up to rounding.

    Memory is that of the cache and of one chunk's logits; a decoder with a mixer that has no cache runs the whole
    sequence and streams the logits only. Full attention after a cache builds a (chunk, keys) mask: choose small chunks
    for millions of tokens.

    Args:
        tokens: (B, L + 1).
        window: cut the context to window / 2 to window tokens, recomputed for every window / 2 tokens: what the same
            weights do with a plain window, whatever their attention.
        cache: of decoder.make_cache(), and there to be read after every chunk; None makes one.
        start: tokens that are done: `cache` has seen them already, and their nats are not made again.

    Yields:
        (B, l) fp32, in order, L - start in total.
    """
    tokens = tokens.to(decoder.device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    length = inputs.size(1)
    if window is not None and window < length:
        half = window // 2
        while start < length:  # the windows stand where they would from 0 on, wherever `start` is
            end = min(length, window + (half * ((start - window) // half + 1) if start >= window else 0))
            begin = max(0, end - window)
            hidden, _ = decoder.hidden_states(inputs[:, begin:end])
            yield from _nats(decoder, hidden[:, start - begin :], labels[:, start:end], chunk_tokens)
            start = end
        return
    cache = decoder.make_cache() if cache is None else cache
    step = length if cache is None else chunk_tokens
    for first in range(start, length, step):
        end = min(length, first + step)
        hidden, _ = decoder.hidden_states(inputs[:, first:end], cache)
        yield from _nats(decoder, hidden, labels[:, first:end], chunk_tokens)


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
        results: saved after every batch of stretches, and within one every minute; what it has is not run again.
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
            sums = _bucket_sums(
                variant, batch, bucket_of, chunk_tokens, results, len(rows), lambda n: advance(n, total)
            )
            if not bool(sums.isfinite().all()):
                raise InputError(f"variants: {variant.name}: its loss is not finite")
            rows += sums.tolist()
            if results is not None:
                results.save(variant.name)
        found[variant.name] = LossByPosition(tuple(edges), torch.tensor(rows, dtype=torch.float64), num_bytes)
    for name, rows in {} if results is None else results.done.items():
        if name not in found and is_whole(rows) and len(rows) == len(stretches):
            found[name] = LossByPosition(tuple(edges), torch.tensor(rows, dtype=torch.float64), num_bytes)
    return found


def _bucket_sums(
    variant: Variant,
    batch: Tensor,
    bucket_of: Tensor,
    chunk_tokens: int,
    results: ResultFile | None,
    row: int,
    advance: Callable[[int], None],
) -> Tensor:
    """(B, buckets) fp64 sums of nats of stretches (B, L + 1), the first of which is stretch number `row`."""
    decoder, place = variant.decoder, [row, len(batch)]
    windowed = variant.window is not None and variant.window < batch.size(1) - 1
    at, sums = 0, torch.zeros(len(batch), int(bucket_of.max()) + 1, dtype=torch.float64)
    cache = [] if windowed else decoder.make_cache()  # a window is computed anew, from the tokens alone
    if results is not None and cache is not None:
        at, sums = results.load_state(variant.name, place, cache, decoder.device) or (at, sums)
        advance(at * len(batch))
    for nats in stream_nats(decoder, batch, chunk_tokens=chunk_tokens, window=variant.window, cache=cache, start=at):
        sums.index_add_(1, bucket_of[at : at + nats.size(1)], nats.cpu().double())
        at += nats.size(1)
        advance(nats.numel())
        if results is not None and cache is not None:
            results.save_state(variant.name, place, at, sums, cache)
    return sums


def is_numbers(row: Any, count: int) -> bool:
    """Whether this, read from JSON, is a list of so many finite numbers."""
    return (
        isinstance(row, list) and len(row) == count and all(type(x) in (int, float) and math.isfinite(x) for x in row)
    )


def digest(tokens: Ids) -> str:
    """What identifies some text for `ResultFile`."""
    return hashlib.sha256(np.ascontiguousarray(tokens)).hexdigest()[:16]  # type: ignore[arg-type]
