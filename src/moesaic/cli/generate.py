"""Continue a prompt: moesaic generate CHECKPOINT [PROMPT] [key=value ...]"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from moesaic.checkpoints import TrainedModel, load_model, load_multimodal
from moesaic.cli.common import launch, plain
from moesaic.config import LARGEST_SEED, from_mapping
from moesaic.data import DataConfig, Tokenizer
from moesaic.data.images import Layout
from moesaic.data.images.faces import require_packages
from moesaic.data.images.folders import ImageFolder
from moesaic.data.images.picture_files import FittedPicture, open_picture
from moesaic.errors import InputError, naming
from moesaic.evaluation.sampling import SampleConfig, sample_of_picture, sample_text

__all__ = ["generate_text", "main", "tell_of_picture"]


def generate_text(checkpoint: str, sampling: SampleConfig, seed: int = 0) -> str:
    """The prompt and its continuation by the model of a checkpoint."""
    model = load_model(checkpoint)
    tokenizer = _tokenizer(model, checkpoint)
    return sample_text(model.multimodal or model.decoder, tokenizer, sampling, seed)


def tell_of_picture(checkpoint: str, image: Path, sampling: SampleConfig, seed: int = 0) -> str:
    """The prompt and its continuation behind a picture, by a model that sees pictures.

    The picture is fitted into tiles as those that the model was trained on: one, or at most `most_tiles` of its source.

    Raises:
        InputError: a checkpoint of a text model, or one whose ids of pictures are not known; a file that is no picture,
            is animated, huge or without pixels, or has other colors than gray and RGB.
    """
    require_packages()
    model = load_multimodal(checkpoint)
    tokenizer = _tokenizer(model, checkpoint)
    assert model.multimodal is not None and model.multimodal.config is not None  # as it was loaded
    vision, image_token = model.multimodal.config.vision, model.multimodal.image_token
    layout = Layout(tokenizer, vision.num_tokens())
    if layout.image != image_token or layout.vocab_size > model.config.vocab_size:
        raise InputError(
            f"checkpoint {checkpoint}: image_token={image_token}; must be {layout.image}, the first of the ids behind "
            "those of its tokenizer"
        )
    if vision.num_channels not in (1, 3):
        raise InputError(f"checkpoint {checkpoint}: vision.num_channels={vision.num_channels}; must be 1 or 3")
    with naming("image"):
        height, width = open_picture(image, vision.num_channels).shape[:2]
    most = _most_tiles(model.run_config)
    picture = FittedPicture(image, (height, width), vision.image_size, vision.num_channels, most)
    return sample_of_picture(model.multimodal, layout, picture, sampling, seed)


def _most_tiles(run_config: Mapping[str, Any]) -> int:
    """Tiles of a picture that a model was trained on at most."""
    fusion = run_config.get("fusion")
    pictures = fusion.get("pictures") if isinstance(fusion, Mapping) else None
    if not isinstance(pictures, Mapping):
        return 1
    source = {key: pictures[key] for key in ("source", "path", "task") if key in pictures}
    keys = from_mapping(DataConfig, {**source, "tokenizer": "bytes"}, "config.fusion.pictures").make_pictures()
    return keys.most_tiles if isinstance(keys, ImageFolder) else 1


def _tokenizer(model: TrainedModel, checkpoint: str) -> Tokenizer:
    if model.tokenizer is None:
        raise InputError(f"checkpoint {checkpoint}: it has no tokenizer, it was trained on token ids")
    return model.tokenizer


def _task(config: DictConfig) -> None:
    given = plain(config)
    checkpoint, seed, image = given.pop("checkpoint"), given.pop("seed"), given.pop("image")
    if not isinstance(checkpoint, str):
        raise InputError("checkpoint: missing; give moesaic generate RUN/checkpoints/last.ckpt")
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"seed={seed!r}: must be an integer from 0 to {LARGEST_SEED}")
    if image is not None and not isinstance(image, str):
        raise InputError(f"image={image!r}: must be a path; before a number write ./")
    if image is not None and given["prompt"] == SampleConfig.prompt:
        given["prompt"] = ""  # it begins Python code
    sampling = from_mapping(SampleConfig, given)
    if image is None:
        print(generate_text(checkpoint, sampling, seed))
    else:
        print(tell_of_picture(checkpoint, Path(image), sampling, seed))


def main(arguments: Sequence[str]) -> None:
    launch("generate", arguments, _task)
