"""The configuration of a run that trains on pictures: its stage, its encoder, its pictures, its curriculum."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from moesaic.config import require
from moesaic.data import DataConfig
from moesaic.data.images import PictureKeys
from moesaic.errors import InputError
from moesaic.models import VisionConfig

__all__ = ["FusionConfig", "PicturesConfig", "ShareConfig"]


@dataclasses.dataclass(frozen=True)
class ShareConfig:
    """The share of rows that are pictures with text, and not text alone: linear from `start` to `end`, then constant.

    Rows have equally many tokens, so it is that of image-text tokens too.
    """

    start: float = 0.5
    end: float = 0.5
    over: float = 1.0  # the part of the steps in which it moves

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            require(self, name, 0 <= getattr(self, name) <= 1, "0 <= value <= 1")
        require(self, "over", 0 < self.over <= 1, "0 < value <= 1")

    def at(self, batches: int) -> Callable[[int], float]:
        """Batch number -> its share, in a run of so many."""
        last = max(1.0, self.over * batches - 1)
        return lambda i: self.start + (self.end - self.start) * min(1.0, i / last)


@dataclasses.dataclass(frozen=True)
class PicturesConfig:
    """A source of pictures: the keys of conf/data/glyphs.yaml and its siblings that the text's have no part in."""

    source: str = "glyphs"
    path: str | None = None
    task: dict[str, Any] | None = None

    def data(self, text: DataConfig) -> DataConfig:
        """The source in the words of `load_pictures`, cached where the text is."""
        return DataConfig(
            source=self.source,  # type: ignore[arg-type]
            path=self.path,
            tokenizer="bytes",  # it is not used: names are read with the text's tokenizer
            validation_fraction=text.validation_fraction,
            cache_dir=text.cache_dir,
            task=self.task,
        )

    def keys(self) -> PictureKeys:
        """What a tile is.

        Raises:
            ValueError: a source that has no pictures.
        """
        try:
            keys = self.data(DataConfig()).make_pictures()
        except InputError as error:
            raise ValueError(str(error).replace("data.task", "pictures.task")) from error
        if keys is None:
            raise ValueError(f"pictures.source={self.source!r}: must be a source of pictures, such as glyphs")
        return keys


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """What is trained on pictures.

    Stage contrastive trains the encoder against `model` as a text tower, by which pairs find each other. Stage frozen
    trains encoder and projector below a text model that stays as it is. Stage joint trains all.
    """

    vision: VisionConfig
    stage: Literal["contrastive", "frozen", "joint"] = "joint"
    pictures: PicturesConfig = dataclasses.field(default_factory=PicturesConfig)
    share: ShareConfig = dataclasses.field(default_factory=ShareConfig)  # of joint
    concept_cap: int | None = None  # of contrastive: about so many pairs of each word in an epoch; null: all
    text: str | None = None  # checkpoint of the text model; null: stages/text below the run, or new weights
    encoder: str | None = None  # checkpoint of stage contrastive or frozen; null: as `text`
    balance_per_modality: bool = False  # the load-balance loss over image tokens and over the others, each by itself
    stages: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """What the stages text, encoder and frozen have otherwise than this run; they are trained first, in this order."""

    def __post_init__(self) -> None:
        require(self, "concept_cap", self.concept_cap is None or self.concept_cap >= 1, "a number >= 1, or null")
        keys, vision = self.pictures.keys(), self.vision
        for said, ours, key, theirs in (
            (f"image_size={vision.image_size}", vision.image_size, "side", keys.side),
            (f"num_channels={vision.num_channels}", vision.num_channels, "channels", keys.channels),
            (f"tiles of {vision.num_tokens()} tokens", vision.num_tokens(), "tile_tokens", keys.tile_tokens),
        ):
            if ours != theirs:
                raise ValueError(f"vision: {said}; must be as pictures.task.{key}={theirs}")
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise ValueError(f"stages: found {unknown[0]!r}; must be among {', '.join(STAGES)}")
        if self.stage == "contrastive" and (self.text or self.encoder):
            raise ValueError(f"text={self.text!r}, encoder={self.encoder!r}: must be null in stage contrastive")
        if self.stage != "joint" and self.stages:
            raise ValueError(f"stages: must be empty in stage {self.stage}")
        if self.stage == "frozen" and self.text is None:
            raise ValueError("text=None: must be a checkpoint in stage frozen (fusion.text=RUN/checkpoints/last.ckpt)")


STAGES = ("text", "encoder", "frozen")
