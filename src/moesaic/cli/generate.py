"""Continue a prompt: moesaic generate CHECKPOINT [PROMPT] [key=value ...]"""

from collections.abc import Sequence

from omegaconf import DictConfig

from moesaic.checkpoints import load_model
from moesaic.cli.common import launch, plain
from moesaic.config import LARGEST_SEED, from_mapping
from moesaic.errors import InputError
from moesaic.evaluation.sampling import SampleConfig, sample_text

__all__ = ["generate_text", "main"]


def generate_text(checkpoint: str, sampling: SampleConfig, seed: int = 0) -> str:
    """The prompt and its continuation by the model of a checkpoint."""
    model = load_model(checkpoint)
    if model.tokenizer is None:
        raise InputError(f"checkpoint {checkpoint}: it has no tokenizer, it was trained on token ids")
    return sample_text(model.decoder, model.tokenizer, sampling, seed)


def _task(config: DictConfig) -> None:
    given = plain(config)
    checkpoint, seed = given.pop("checkpoint"), given.pop("seed")
    if not isinstance(checkpoint, str):
        raise InputError("checkpoint: missing; give moesaic generate RUN/checkpoints/last.ckpt")
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed={seed!r}: must be an integer from 0 to {LARGEST_SEED}")
    print(generate_text(checkpoint, from_mapping(SampleConfig, given), seed))


def main(arguments: Sequence[str]) -> None:
    launch("generate", arguments, _task)
