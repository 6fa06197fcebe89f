"""Pictures with text, ready to train on: what `data.source` names, and its loaders."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moesaic.data.images import PICTURES, Layout, PictureEvaluationLoader, PictureTrainingLoader, Place, Samples
from moesaic.data.streams import DataConfig
from moesaic.data.tokenizers import ByteTokenizer, Tokenizer
from moesaic.errors import InputError

__all__ = ["PictureData", "load_pictures"]


@dataclasses.dataclass(frozen=True)
class PictureData:
    """Samples of pictures and text, and how they become token ids."""

    samples: Samples
    layout: Layout

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the samples, for rows and metrics."""
        return self.samples.facts

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, and behind them those of pictures."""
        return self.layout.vocab_size

    def training_loader(
        self,
        *,
        seq_len: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        packed: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> PictureTrainingLoader:
        """Batches to train on; InputError if a sample is longer than seq_len."""
        return PictureTrainingLoader(
            self.samples,
            self.layout,
            seq_len=seq_len,
            batch_size=batch_size,
            num_batches=num_batches,
            seed=seed,
            packed=packed,
            rank=rank,
            world_size=world_size,
        )

    def evaluation_loader(
        self,
        *,
        seq_len: int,
        batch_size: int,
        splits: Sequence[str] | None = None,
        max_batches: int | None = None,
        shuffled: bool = False,
    ) -> PictureEvaluationLoader:
        """Samples of test splits one by one; InputError for a split that there is not."""
        return PictureEvaluationLoader(
            self.samples,
            self.layout,
            seq_len=seq_len,
            batch_size=batch_size,
            splits=splits,
            max_batches=max_batches,
            shuffled=shuffled,
        )


def load_pictures(config: DataConfig, tokenizer: Tokenizer | None = None) -> PictureData:
    """The samples that `config` names.

    Args:
        tokenizer: of the text, such as a checkpoint's; None: bytes.

    Raises:
        InputError: a source of text, a face, picture or captions that cannot be used, or a package that is missing.
    """
    keys = config.make_pictures()
    if keys is None:
        raise InputError(f"data.source={config.source!r}: it has no pictures; must be one of {', '.join(PICTURES)}")
    place = Place(config.cache_dir, config.path, config.validation_fraction)
    return PictureData(keys.load(place), Layout(tokenizer or ByteTokenizer(), keys.tile_tokens))
