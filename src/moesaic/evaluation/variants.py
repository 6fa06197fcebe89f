"""Variants of one decoder for an A/B comparison: some switches turned, the weights shared."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.checkpoints import with_config
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError, naming
from moesaic.models import Decoder, DecoderConfig
from moesaic.overrides import apply_overrides, parse_overrides

__all__ = ["PRESETS", "Variant", "build_variants", "with_overrides"]

PRESETS = {
    "as_trained": "the checkpoint as it is",
    "temperature": "attention.temperature.attn_scale=0.4 attention.temperature.floor_scale=<training length>",
    "no_temperature": "attention.temperature=null",
    "scalable_softmax": "attention.temperature.scalable_softmax=<1 / log(training length)>",
    "window": "window=<training length>",
}
"""Variants that have a name; the training length is that of the checkpoint."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A decoder with some switches turned; `window` cuts its context to that many tokens."""

    name: str
    decoder: Decoder
    window: int | None = None


def with_overrides(config: DecoderConfig, overrides: Mapping[str, Any]) -> DecoderConfig:
    """Return `config` with values set by dotted key, such as {"attention.temperature.attn_scale": 0.4}.

    A section that is null is made: its other keys take their defaults. A value may be a mapping.

    Raises:
        InputError: a key that does not exist or a value that is not allowed, named as model.<key>.
    """
    mapping = apply_overrides(to_mapping(config), overrides, "model", "the model")
    if "pattern" in overrides and "format" not in overrides:
        del mapping["format"]  # a person typed the pattern, perhaps in the words of format 1
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
        raise InputError(f"variants: none given; must be one of {', '.join(PRESETS)}, or key=value")
    if len(set(names)) < len(names):
        raise InputError(f"variants: {', '.join(names)}: one of them stands twice")
    return [_build_variant(decoder, decoder.config, name, train_length) for name in names]


def _build_variant(decoder: Decoder, config: DecoderConfig, name: str, train_length: int) -> Variant:
    with naming(f"variants: {name}"):
        switches = _switches(name, train_length)
        window = switches.pop("window", None)
        if window is not None and (type(window) is not int or window < 2):
            raise InputError(f"window={window!r}: must be an integer >= 2")
        if not switches:
            return Variant(name, decoder, window)
        return Variant(name, with_config(decoder, with_overrides(config, switches)), window)


def _switches(name: str, train_length: int) -> dict[str, Any]:
    presets: dict[str, dict[str, Any]] = {
        "as_trained": {},
        "temperature": {"attention.temperature": {"attn_scale": 0.4, "floor_scale": train_length}},
        "no_temperature": {"attention.temperature": None},
        "scalable_softmax": {"attention.temperature": {"scalable_softmax": 1 / math.log(max(2, train_length))}},
        "window": {"window": max(2, train_length)},
    }
    words = name.split()
    known = f"must be {', '.join(presets)}, or key=value"
    if not words:
        raise InputError(known)
    for word in words:
        if "=" not in word and word not in presets:
            raise InputError(f"unknown variant {word}; {known}")
    switches = parse_overrides([word for word in words if "=" in word])
    for word in words:
        turned = presets.get(word, {})
        if repeated := turned.keys() & switches.keys():
            raise InputError(f"{min(repeated)} stands twice")
        switches |= turned
    return switches
