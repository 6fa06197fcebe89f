"""The loaders of a run on pictures: pairs, or text and pictures in the ratio that the config says."""

from pathlib import Path
from typing import Any

from moesaic.data import Data, DataConfig, EvaluationLoader, PictureData, TrainingLoader, load_pictures
from moesaic.data.images.pairs import PairEvaluationLoader, PairTrainingLoader
from moesaic.data.mixing import MixedEvaluationLoader, MixedTrainingLoader
from moesaic.errors import InputError, naming
from moesaic.reading import read_json, reading
from moesaic.training.batches import RunBatches, evaluation_sizes
from moesaic.training.config import RunConfig
from moesaic.training.fusion_config import FusionConfig

__all__ = ["FusionBatches", "make_batches"]


def make_batches(config: RunConfig, data: Data) -> RunBatches:
    """The loaders of a run, whatever it trains on.

    Raises:
        InputError: pictures that cannot be used.
    """
    return RunBatches(config, data) if config.fusion is None else FusionBatches(config, data, config.fusion)


def _content(source: DataConfig) -> str:
    return str(load_pictures(source).facts["content_hash"])


class FusionBatches(RunBatches):
    """Batches of a run with `fusion`."""

    def __init__(self, config: RunConfig, data: Data, fusion: FusionConfig) -> None:
        super().__init__(config, data)
        self.fusion = fusion
        if data.tokenizer is None:
            raise InputError(f"data.source={config.data.source!r}: no tokenizer; must be text that has one")
        given, captions = fusion.pictures.data(config.data), config.data.caption_source()
        with naming("fusion.pictures"):
            self.pictures: PictureData = load_pictures(given, data.tokenizer)
        if captions not in (None, given) and _content(captions) != self.pictures.facts["content_hash"]:
            raise InputError(
                "data.captions: its pictures are not those of fusion.pictures, so held-out texts could be read; "
                "must be the same, or null"
            )

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "pictures": self.pictures.facts}

    def require_same(self, environment: Path) -> None:
        if environment.is_file():
            with reading(environment):
                before = read_json(environment)["data"]["pictures"]["content_hash"]
            if before != (now := self.pictures.facts["content_hash"]):
                raise InputError(
                    f"fusion.pictures: they have changed since this run began (their hash was {before}, it is {now}); "
                    "put them back, or start a new run"
                )

    def training(self, rank: int = 0, world_size: int = 1) -> Any:
        training, samples, layout = self.config.training, self.pictures.samples, self.pictures.layout
        number = training.steps * training.accumulate
        shared: dict[str, Any] = {"seq_len": training.seq_len, "batch_size": training.batch_size // world_size}
        shared |= {"num_batches": number, "seed": self.config.seed}
        if self.fusion.stage == "contrastive":
            ranks = {"rank": rank, "world_size": world_size}
            return PairTrainingLoader(samples, layout, **shared, **ranks, cap=self.fusion.concept_cap)
        text = super().training(rank, world_size)
        assert isinstance(text, TrainingLoader)
        pictures = self.pictures.training_loader(**shared)
        # each optimizer step has one share, whatever its micro-batches
        share, accumulate = self.fusion.share.at(training.steps), training.accumulate
        return MixedTrainingLoader(text, pictures, lambda i: share(i // accumulate), num_batches=number)

    def val_dataloader(self) -> Any:
        training = self.config.training
        if self.fusion.stage != "contrastive":
            return super().val_dataloader()
        return PairEvaluationLoader(  # all of it on every rank: a pair is scored among those of its batch
            self.pictures.samples,
            self.pictures.layout,
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            max_batches=training.validation_batches,
        )

    def evaluation(self) -> Any:
        training = self.config.training
        most = training.validation_batches
        sizes = evaluation_sizes(training)
        pictures = self.pictures.evaluation_loader(
            seq_len=sizes["seq_len"], batch_size=4 * sizes["batch_size"], max_batches=most
        )
        return MixedEvaluationLoader(self.text_batches(), pictures)

    def text_batches(self) -> EvaluationLoader:
        """Batches of the checks during the run that are text alone."""
        text = super().evaluation()
        assert isinstance(text, EvaluationLoader)
        return text
