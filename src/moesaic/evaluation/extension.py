"""Context extension: weights of a checkpoint trained on at a longer length, and what that did to loss by position."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from moesaic.checkpoints import decoder_weights, load_model, require_same_model, with_config, write_checkpoint
from moesaic.config import to_mapping
from moesaic.data import DataConfig, Tokenizer, TokenStream, tokenizer_from_dict
from moesaic.errors import InputError, naming
from moesaic.evaluation.long_context import (
    LossByPosition,
    LossByPositionConfig,
    choose_stretches,
    log_buckets,
    loss_by_position,
)
from moesaic.evaluation.variants import Variant
from moesaic.models import Decoder, DecoderConfig

__all__ = [
    "Stretches",
    "checkpoint_tokenizer",
    "compare_with_start",
    "extension_numbers",
    "extension_table",
    "keep_start",
    "open_stretches",
    "require_extendable",
    "start_of",
]

POSITIONS = ("rope_theta", "rope_scaling", "attention_chunk_size", "window", "temperature")
"""Keys of model.attention that no weight depends on, and that say how far and how sharply a layer looks."""


@dataclasses.dataclass(frozen=True)
class Stretches:
    """The text on which start and end are compared, chosen before the training."""

    tokens: Tensor
    """(S, L + 1) int64."""
    edges: tuple[int, ...]
    """Edges of the buckets of positions in tokens, both training lengths among them."""
    lengths: tuple[int, int]
    """Lengths in tokens of the training that made the checkpoint, and of this one."""


def require_extendable(path: str, checkpoint: Mapping[str, Any], model: DecoderConfig) -> None:
    """Raise InputError that names every key, other than those of `POSITIONS`, in which a checkpoint's model differs."""
    stored = checkpoint["hyper_parameters"]["model"]
    attention = to_mapping(model)["attention"]
    positions = {key: attention[key] for key in POSITIONS}
    mapped = {**stored, "attention": {**stored["attention"], **positions}}
    require_same_model(path, {**checkpoint, "hyper_parameters": {"model": mapped}}, model)


def checkpoint_tokenizer(path: str, checkpoint: Mapping[str, Any], data: DataConfig) -> Tokenizer | None:
    """The tokenizer that a checkpoint's embedding was trained with: the run goes on with it, on whatever text.

    Raises:
        InputError: it has none and the data are text; or they are a recall task.
    """
    stored = checkpoint["hyper_parameters"]["tokenizer"]
    if data.make_task() is not None:
        raise InputError(f"extend_context: data.source={data.source!r} has no loss by position; must be text")
    if stored is None and data.source != "memmap":
        raise InputError(
            f"checkpoint {path}: it has no tokenizer, so it cannot read data.source={data.source!r}; must be "
            "data.source=memmap, token ids"
        )
    return None if stored is None else tokenizer_from_dict(stored)


def open_stretches(
    config: LossByPositionConfig, validation: TokenStream, tokenizer: Tokenizer | None, lengths: tuple[int, int]
) -> Stretches:
    """Choose the text of the comparison.

    Raises:
        InputError: training.seq_len is not longer than the checkpoint's, or the validation split is too short.
    """
    before, after = lengths
    if after <= before:
        raise InputError(f"training.seq_len={after}: the checkpoint was trained at {before}; it must be longer")
    length = round(config.multiple * after)
    if length < after:
        raise InputError(f"extend_context.multiple={config.multiple}: must be a number >= 1, times training.seq_len")
    with naming(f"extend_context.multiple={config.multiple}"):
        tokens = choose_stretches(
            validation.tokens,
            length,
            limit=config.stretches,
            within=config.within,
            end_of_text=None if tokenizer is None else tokenizer.end_of_text,
        )
    edges = sorted({*log_buckets(length, before, config.buckets_per_octave), after})
    return Stretches(tokens, tuple(edges), lengths)


def compare_with_start(
    start: Path,
    trained: Decoder,
    stretches: Stretches,
    config: LossByPositionConfig,
    token_bytes: Tensor | None,
) -> dict[str, LossByPosition]:
    """Loss by position of the start as it was, of its weights under the new switches, and of the end.

    The second tells what the training did from what the switches alone do. All on the same text.
    """
    assert trained.config is not None  # built from a config by the module
    first = load_model(start).decoder
    switched = with_config(first, trained.config)
    device = trained.device
    was_training = trained.training
    variants = {"before": first, "before, new settings": switched, "after": trained}
    try:
        return loss_by_position(
            [Variant(name, decoder.to(device).eval()) for name, decoder in variants.items()],
            stretches.tokens,
            stretches.edges,
            token_bytes=token_bytes,
            chunk_tokens=config.chunk_tokens,
        )
    finally:
        trained.train(was_training)


def start_of(run_dir: Path) -> Path:
    """Where `keep_start` writes."""
    return run_dir / "checkpoints" / "start.ckpt"


def keep_start(run_dir: Path, checkpoint: Mapping[str, Any]) -> None:
    """Keep the weights of a checkpoint with the run that starts from them.

    So the run can be resumed, and compared with its start, after the checkpoint is gone.
    """
    path = start_of(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {key: value for key, value in checkpoint["hyper_parameters"].items() if key not in ("vision", "image_token")}
    weights = {f"decoder.{name}": value for name, value in decoder_weights(dict(checkpoint)).items()}
    write_checkpoint(path, {"state_dict": weights, "hyper_parameters": text, "moesaic": checkpoint["moesaic"]})


def _ranges(stretches: Stretches) -> dict[str, tuple[int, int]]:
    before, after = stretches.lengths
    end = stretches.edges[-1]
    places = {f"0-{before}": (0, before), f"{before}-{after}": (before, after)}
    return places | ({f"{after}-{end}": (after, end)} if end > after else {})


def extension_numbers(found: Mapping[str, LossByPosition], stretches: Stretches) -> dict[str, float]:
    """For metrics.json: "extend_context/<before, ...>/<positions>/loss", and "difference", to the start."""
    numbers: dict[str, float] = {}
    start = next(iter(found.values()))
    for name, result in found.items():
        for place, (first, last) in _ranges(stretches).items():
            key = f"extend_context/{name}/{place}"
            numbers[f"{key}/loss"], numbers[f"{key}/loss_standard_error"] = result.loss(first, last)
            if result is not start:
                difference = result.difference(start, first, last)
                numbers[f"{key}/difference"], numbers[f"{key}/difference_standard_error"] = difference
    return {key: value for key, value in numbers.items() if not math.isnan(value)}  # one stretch: no error


def extension_table(found: Mapping[str, LossByPosition], stretches: Stretches) -> Table:
    """Nats per token: a row per range of positions, a column per state of the model."""
    before, after = stretches.lengths
    numbers = extension_numbers(found, stretches)
    table = Table(
        "positions",
        *found,
        "after - before",
        title=f"Loss by position, nats per token: trained at {before}, then at {after}",
        caption=f"{len(stretches.tokens)} stretches of the validation text; ± standard error, paired by stretch",
    )
    for place in _ranges(stretches):
        cells = [f"{numbers[f'extend_context/{name}/{place}/loss']:.4f}" for name in found]
        key = f"extend_context/{list(found)[-1]}/{place}/difference"
        error = numbers.get(f"{key}_standard_error")
        table.add_row(place, *cells, f"{numbers[key]:+.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return table
