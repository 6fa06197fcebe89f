"""The weights that a run on pictures begins with: of a text model, of an encoder."""

from typing import Any

import torch

from moesaic.checkpoints import decoder_weights, load_checkpoint, require_finite_weights, require_same_keys
from moesaic.config import require_same, to_mapping
from moesaic.data import Data, Tokenizer, token_bytes
from moesaic.data.images.layout import SPECIAL
from moesaic.errors import InputError, naming
from moesaic.models import DecoderConfig
from moesaic.training.config import RunConfig
from moesaic.training.continuing import tokenizer_to_keep
from moesaic.training.fusion import ContrastiveModel, FusionModel
from moesaic.training.starting import Start

__all__ = ["build_fusion", "fusion_tokenizer", "fusion_vocabulary", "stage_of"]

Module = ContrastiveModel | FusionModel


def stage_of(checkpoint: dict[str, Any]) -> str | None:
    """The stage of fusion that wrote a checkpoint; None of another run."""
    fusion = checkpoint["hyper_parameters"]["config"].get("fusion")
    return None if fusion is None else str(fusion["stage"])


def fusion_tokenizer(config: RunConfig, start: Start) -> Tokenizer | None:
    """The tokenizer that a run on pictures keeps: its own of before, or that of the text model it begins with."""
    if start.kind == "resumed":
        return tokenizer_to_keep(str(start.path), start.checkpoint, config.data)
    assert config.fusion is not None
    if config.fusion.text is None:
        return None
    with naming("fusion.text"):
        return tokenizer_to_keep(config.fusion.text, load_checkpoint(config.fusion.text), config.data)


def fusion_vocabulary(config: RunConfig, data: Data) -> int:
    """The ids that the data of a run have: on pictures six more than the tokenizer."""
    if config.fusion is None:
        return data.vocab_size
    return data.vocab_size + len(SPECIAL)


def build_fusion(config: RunConfig, model: DecoderConfig, start: Start, data: Data) -> Module:
    """The module of a run on pictures, with the weights of its checkpoints unless Lightning restores them.

    Raises:
        InputError: a checkpoint of another text model, vocabulary or encoder.
    """
    fusion, tokenizer = config.fusion, data.tokenizer
    assert fusion is not None and tokenizer is not None
    kind = ContrastiveModel if fusion.stage == "contrastive" else FusionModel
    module = kind(
        to_mapping(config),
        to_mapping(model),
        tokenizer.to_dict(),
        token_bytes(tokenizer),
        to_mapping(fusion.vision),
        tokenizer.vocab_size,
    )
    if start.kind == "fresh":
        if fusion.text is not None:
            with naming("fusion.text"):
                _take_text(module, fusion.text, model)
        if fusion.encoder is not None:
            with naming("fusion.encoder"):
                _take_encoder(module, fusion.encoder)
    return module


def _take_text(module: Module, path: str, model: DecoderConfig) -> None:
    checkpoint = load_checkpoint(path)
    if stage_of(checkpoint) == "contrastive":
        raise InputError(
            f"checkpoint {path}: of stage contrastive, whose decoder is a text tower; must be a text model"
        )
    require_same_keys("model", path, checkpoint["hyper_parameters"]["model"], to_mapping(model))
    weights = decoder_weights(checkpoint)
    with naming(f"checkpoint {path}"):
        require_finite_weights(weights)
    module.decoder.load_state_dict(weights)


def _take_encoder(module: Module, path: str) -> None:
    """The encoder of a checkpoint, and its projector where that leads to the same width from a text model."""
    checkpoint = load_checkpoint(path)
    stored = checkpoint["hyper_parameters"]
    fusion = module.config.fusion
    assert fusion is not None
    if (stage := stage_of(checkpoint)) is None or stored.get("vision") is None:
        raise InputError(f"checkpoint {path}: has no encoder; must be of experiment=fusion_encoder or fusion_frozen")
    require_same(f"checkpoint {path}: another fusion.vision", stored["vision"], to_mapping(fusion.vision))
    parts = {"vision": module.vision, **({} if stage == "contrastive" else {"projector": module.projector})}
    for name, part in parts.items():
        weights = {
            key.removeprefix(f"{name}."): tensor
            for key, tensor in checkpoint["state_dict"].items()
            if key.startswith(f"{name}.")
        }
        with naming(f"checkpoint {path}"):
            require_finite_weights(weights)
            _load(part, name, weights)


def _load(part: torch.nn.Module, name: str, weights: dict[str, torch.Tensor]) -> None:
    wanted = {key: tensor.shape for key, tensor in part.state_dict().items()}
    found = {key: tensor.shape for key, tensor in weights.items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise InputError(f"{name}.{key}: found {found.get(key)}; must be {wanted.get(key)}")
    part.load_state_dict(weights)
