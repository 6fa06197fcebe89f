"""Long-context evaluations of a checkpoint: what moesaic evaluate runs, and what studies ask for."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from moesaic.checkpoints import TrainedModel, load_model
from moesaic.config import from_mapping
from moesaic.data import DataConfig, load_data
from moesaic.data.shards import Tokens
from moesaic.errors import InputError, naming
from moesaic.evaluation.copying import CopyingConfig, copying_score, passages
from moesaic.evaluation.long_context import (
    LossByPosition,
    LossByPositionConfig,
    choose_stretches,
    log_buckets,
    loss_by_position,
)
from moesaic.evaluation.needle import NeedleCell, NeedleConfig, NeedleTask, score_needles, summarize_needles
from moesaic.evaluation.results import ResultFile, digest
from moesaic.evaluation.variants import Variant, build_variants
from moesaic.files import standing
from moesaic.parallel.manifest import MANIFEST
from moesaic.statistics import mean_and_error

__all__ = [
    "LongContextSource",
    "checkpoint_digest",
    "copying_evaluation",
    "loss_by_position_evaluation",
    "needle_evaluation",
    "open_source",
    "require_tokenizer",
    "run_loss_by_position",
    "run_needles",
    "summarize_loss_by_position",
    "summarize_needle_variants",
]

T = TypeVar("T")

Advance = Callable[[int, int], None]
"""Called with tokens that came on and tokens in total, for a progress bar."""


@dataclasses.dataclass(frozen=True)
class LongContextSource:
    """A checkpoint and the text to judge it on."""

    model: TrainedModel
    tokens: Tokens
    train_length: int
    checkpoint_digest: str


def open_source(checkpoint: str | Path, data: DataConfig, split: str, device: str = "cpu") -> LongContextSource:
    """Load both.

    Raises:
        InputError: as `load_model` and `load_data`; a split that does not exist; text for a checkpoint without
            tokenizer; token ids outside the checkpoint's vocabulary.
    """
    if split not in ("validation", "train"):
        raise InputError(f"split={split!r}: must be one of validation, train")
    model = load_model(checkpoint)
    require_tokenizer(model, data, checkpoint)
    loaded = load_data(data, model.tokenizer)
    if loaded.vocab_size > model.config.vocab_size:
        raise InputError(
            f"data: token ids up to {loaded.vocab_size - 1}, but the checkpoint has a vocabulary of "
            f"{model.config.vocab_size}"
        )
    model.decoder.to(device)
    train_length = model.run_config["training"]["seq_len"]
    return LongContextSource(model, getattr(loaded, split).tokens, train_length, checkpoint_digest(checkpoint))


def checkpoint_digest(checkpoint: str | Path) -> str:
    """What identifies its content for results that are to belong together."""
    path = standing(Path(checkpoint))
    with (path / MANIFEST if path.is_dir() else path).open("rb") as file:  # a manifest has the hash of everything else
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def require_tokenizer(model: TrainedModel, data: DataConfig, checkpoint: str | Path) -> None:
    """Refuse text for a checkpoint without tokenizer.

    Raises:
        InputError: it names the checkpoint.
    """
    if model.tokenizer is None and data.source != "memmap":
        raise InputError(
            f"checkpoint {checkpoint}: it has no tokenizer, so it cannot read data.source={data.source!r}; must be "
            "data.source=memmap, token ids"
        )


def run_loss_by_position(
    source: LongContextSource,
    config: LossByPositionConfig,
    variants: Sequence[str],
    *,
    batch_size: int = 8,
    window: int | None = None,
    output: Path | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, LossByPosition]:
    """`loss_by_position` of the variants, under `window` if they have no other.

    With `output`, loss_by_position.json is written there, from which a second call goes on.

    Raises:
        InputError: an unknown variant, a context longer than the data, results of another evaluation in `output`.
    """
    model, length = source.model, round(config.multiple * source.train_length)
    if length < 2:
        raise InputError(f"loss_by_position.multiple={config.multiple}: a context of {length} tokens; at least 2")
    chosen = _under_window(build_variants(model.decoder, variants, source.train_length), window)
    with naming(f"loss_by_position.multiple={config.multiple}"):
        stretches = choose_stretches(
            source.tokens,
            length,
            limit=config.stretches,
            within=config.within,
            end_of_text=None if model.tokenizer is None else model.tokenizer.end_of_text,
        )
    edges = log_buckets(length, source.train_length, config.buckets_per_octave)
    results = None
    if output is not None:
        identity = {
            "task": "loss_by_position",
            "checkpoint": source.checkpoint_digest,
            "text": digest(stretches.numpy()),
            "stretches": len(stretches),
            "train_length": source.train_length,
            "edges": list(edges),
            **({"window": window} if window else {}),
        }
        results = ResultFile(output / "loss_by_position.json", identity)
    found = loss_by_position(
        chosen,
        stretches,
        edges,
        token_bytes=model.token_bytes,
        chunk_tokens=config.chunk_tokens,
        batch_size=batch_size,
        results=results,
        advance=advance,
    )
    if results is not None:
        results.summary |= {name: result.rows() for name, result in found.items()}
        results.save()
    return found


def run_needles(
    source: LongContextSource,
    config: NeedleConfig,
    variants: Sequence[str],
    *,
    batch_size: int = 8,
    window: int | None = None,
    output: Path | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, list[NeedleCell]]:
    """`score_needles` of the variants, under `window` if they have no other.

    With `output`, needle.json is written there, from which a second call goes on.

    Raises:
        InputError: a checkpoint without tokenizer, an unknown variant, a context that is longer than the data or
            shorter than its needles, results of another evaluation in `output`.
    """
    model = source.model
    if model.tokenizer is None:
        raise InputError("task=needle: the checkpoint has no tokenizer to write needles with")
    chosen = _under_window(build_variants(model.decoder, variants, source.train_length), window)
    task = NeedleTask(model.tokenizer, source.tokens, config, source.train_length)
    results = None
    if output is not None:
        identity = {
            "task": "needle",
            "checkpoint": source.checkpoint_digest,
            "text": digest(source.tokens),
            "prompt": digest(task.prompt(0, 0)[0].numpy()),  # how needles are planted may change
            "train_length": source.train_length,
            **{key: value for key, value in dataclasses.asdict(config).items() if key != "chunk_tokens"},
            **({"window": window} if window else {}),
        }
        results = ResultFile(output / "needle.json", identity)
    found = score_needles(chosen, task, batch_size=batch_size, results=results, advance=advance)
    if results is not None:
        for name, cells in found.items():
            rows = [summarize_needles([cell], config.distractors) for cell in cells]
            results.summary[name] = [
                {"length": cell.length, "depth": cell.depth, **row} for cell, row in zip(cells, rows, strict=True)
            ]
        results.save()
    return found


def summarize_loss_by_position(found: dict[str, LossByPosition], train_length: int) -> dict[str, dict[str, float]]:
    """Per variant: loss within and beyond the training length, and paired differences to the first variant."""
    first = next(iter(found.values()))
    summary: dict[str, dict[str, float]] = {}
    for name, result in found.items():
        numbers: dict[str, float] = {}
        ranges = {"within": (0, min(train_length, result.edges[-1]))}
        if result.edges[-1] > train_length:
            ranges["beyond"] = (train_length, result.edges[-1])
            ranges["last_octave"] = (max(e for e in result.edges if e <= result.edges[-1] / 2), result.edges[-1])
        for place, (start, end) in ranges.items():
            numbers[f"{place}/loss"], numbers[f"{place}/loss_standard_error"] = result.loss(start, end)
            bits = result.bits_per_byte(start, end)
            if bits is not None:
                numbers[f"{place}/bits_per_byte"] = bits
            if result is not first:
                difference, error = result.difference(first, start, end)
                numbers[f"{place}/difference"], numbers[f"{place}/difference_standard_error"] = difference, error
        summary[name] = {key: value for key, value in numbers.items() if not math.isnan(value)}  # one stretch: no error
    return summary


def summarize_needle_variants(
    found: dict[str, list[NeedleCell]], distractors: int, train_length: int
) -> dict[str, dict[str, float]]:
    """Per variant: accuracy, rank score and exact match on contexts within and beyond the training length, and paired
    differences of accuracy to the first variant."""
    summary = {}
    first = next(iter(found.values()))
    for name, cells in found.items():
        within = summarize_needles([cell for cell in cells if cell.length <= train_length], distractors)
        beyond = summarize_needles(cells, distractors, start=train_length)
        summary[name] = {f"within/{key}": value for key, value in within.items()}
        summary[name] |= {f"beyond/{key}": value for key, value in beyond.items()}
        for place in ("within", "beyond"):
            pairs = [
                pair
                for pair in zip(cells, first, strict=True)
                if (pair[0].length > train_length) == (place == "beyond")
            ]
            if cells is first or not pairs:
                continue
            differences = torch.tensor([[a.accuracy, b.accuracy] for a, b in pairs])
            mean, error = mean_and_error((differences[:, 0] - differences[:, 1]).flatten())
            summary[name] |= {
                f"{place}/accuracy_difference": mean,
                f"{place}/accuracy_difference_standard_error": error,
            }
        summary[name] = {key: value for key, value in summary[name].items() if not math.isnan(value)}
    return summary


def loss_by_position_evaluation(
    checkpoint: Path, run_config: dict[str, Any], options: dict[str, Any]
) -> dict[str, float]:
    """Loss by position on the data of a run, as "loss_by_position/<variant>/beyond/loss" and the like.

    Args:
        run_config: of which the data are used.
        options: under "loss_by_position" the fields of `LossByPositionConfig`, and `variants` (default: as_trained),
            `split` (default: validation), `batch_size` (default: 8), `buckets` (default: false; true adds
            "loss_by_position/<variant>/loss/<start>-<end>" of every bucket), `window` (default: null; the context of
            every variant that has no window of its own is cut to so many tokens). Other sections are of others.

    Raises:
        InputError: see `run_loss_by_position`.
    """
    config, common = _options(LossByPositionConfig, options, "loss_by_position")
    source = _source(checkpoint, run_config, common)
    found = run_loss_by_position(source, config, common.variants, batch_size=common.batch_size, window=common.window)
    numbers = _flat("loss_by_position", summarize_loss_by_position(found, source.train_length))
    if common.buckets:
        for name, result in found.items():
            for start, end in itertools.pairwise(result.edges):
                numbers[f"loss_by_position/{name}/loss/{start}-{end}"] = result.loss(start, end)[0]
    return numbers


def needle_evaluation(checkpoint: Path, run_config: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Needle scores on the data of a run, as "needle/<variant>/beyond/accuracy" and the like.

    Args:
        options: under "needle" the fields of `NeedleConfig`, and `variants`, `split`, `batch_size`, `buckets` and
            `window` as in `loss_by_position_evaluation`; `buckets` adds "needle/<variant>/accuracy/<length>/<depth>".

    Raises:
        InputError: see `run_needles`.
    """
    config, common = _options(NeedleConfig, options, "needle")
    source = _source(checkpoint, run_config, common)
    found = run_needles(source, config, common.variants, batch_size=common.batch_size, window=common.window)
    numbers = _flat("needle", summarize_needle_variants(found, config.distractors, source.train_length))
    if common.buckets:
        for name, cells in found.items():
            for cell in cells:
                key = f"needle/{name}/accuracy/{cell.length}/{cell.depth:g}"
                numbers[key] = summarize_needles([cell], config.distractors)["accuracy"]
    return numbers


def copying_evaluation(checkpoint: Path, run_config: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Copying in context, as "copying/text/second" and the like: see `copying_score`, on real and on random passages.

    Args:
        options: under "copying" the fields of `CopyingConfig`. Real passages are of the validation split.
    """
    config = from_mapping(CopyingConfig, options.get("copying") or {}, "evaluation_options.copying")
    source = _source(checkpoint, run_config, _CommonOptions())
    vocab_size = source.model.config.vocab_size
    numbers: dict[str, float] = {}
    for kind, tokens in (("text", source.tokens), ("random", None)):
        score = copying_score(source.model.decoder, passages(config, tokens, vocab_size))
        numbers |= {f"copying/{kind}/{name}": value for name, value in score.items()}
    return numbers


def _under_window(variants: Sequence[Variant], window: int | None) -> list[Variant]:
    return [dataclasses.replace(variant, window=variant.window or window) for variant in variants]


@dataclasses.dataclass(frozen=True)
class _CommonOptions:
    variants: tuple[str, ...] = ("as_trained",)
    split: str = "validation"
    batch_size: int = dataclasses.field(default=8, metadata={"most": 2**20})
    buckets: bool = False
    window: int | None = dataclasses.field(default=None, metadata={"most": 2**24})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be an integer >= 1")
        if self.window is not None and self.window < 2:
            raise ValueError(f"window={self.window}: must be an integer >= 2, or null")


def _options(cls: type[T], options: dict[str, Any], section: str) -> tuple[T, _CommonOptions]:
    mine = options.get(section) or {}
    if not isinstance(mine, dict):
        raise InputError(f"evaluation_options.{section}={mine!r}: must be a mapping")
    common = {field.name for field in dataclasses.fields(_CommonOptions)} & mine.keys()
    where = f"evaluation_options.{section}"
    config = from_mapping(cls, {key: value for key, value in mine.items() if key not in common}, where)
    return config, from_mapping(_CommonOptions, {key: mine[key] for key in common}, where)


def _source(checkpoint: Path, run_config: dict[str, Any], common: _CommonOptions) -> LongContextSource:
    data = from_mapping(DataConfig, run_config["data"], "data")
    return open_source(checkpoint, data, common.split)


def _flat(task: str, summary: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{task}/{name}/{key}": value for name, numbers in summary.items() for key, value in numbers.items()}
