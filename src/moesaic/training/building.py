"""The module of a run: its model with the weights it starts from, and an optimizer that its checkpoint fits."""

import torch

from moesaic.checkpoints import decoder_weights, load_model
from moesaic.config import to_mapping
from moesaic.data import Data, token_bytes
from moesaic.distillation.opened import OpenedTargets
from moesaic.errors import InputError, naming
from moesaic.models import Decoder, DecoderConfig
from moesaic.models.upcycling import upcycled_weights
from moesaic.training.config import RunConfig
from moesaic.training.fusion_start import build_fusion
from moesaic.training.module import LanguageModel
from moesaic.training.starting import Start

__all__ = ["build"]


def build(
    config: RunConfig, model: DecoderConfig, start: Start, data: Data, targets: OpenedTargets | None
) -> LanguageModel:
    """Build the module of a run, with the weights it starts from unless Lightning restores them. Nothing is written.

    Raises:
        InputError: a checkpoint with the state of another optimizer, or one that cannot be upcycled to this model.
    """
    tokenizer = data.tokenizer
    module: LanguageModel
    if config.fusion is not None:
        module = build_fusion(config, model, start, data)
    else:
        module = LanguageModel(
            to_mapping(config),
            to_mapping(model),
            None if tokenizer is None else tokenizer.to_dict(),
            None if tokenizer is None else token_bytes(tokenizer),
            None if targets is None else targets.source,
        )
    if start.fit_path is not None:
        _require_same_groups(module, start)
    if start.kind in ("weights", "extended"):
        module.decoder.load_state_dict(decoder_weights(start.checkpoint))
    if start.kind == "upcycled":
        _upcycle(module.decoder, config, start)
    return module


def _upcycle(decoder: Decoder, config: RunConfig, start: Start) -> None:
    """Give a mixture of experts the weights of a dense checkpoint; the same on every rank."""
    assert config.upcycle is not None and start.path is not None
    dense = load_model(start.path)
    generator = torch.Generator().manual_seed(config.seed)
    with naming(f"upcycle.from={start.path}"):
        weights = upcycled_weights(dense.decoder.state_dict(), dense.config, decoder, config.upcycle.noise, generator)
    decoder.load_state_dict(weights)


def _require_same_groups(module: LanguageModel, start: Start) -> None:
    """Refuse an optimizer state of other parameters than the run's, or, of the same run, with other rates to begin."""
    [stored], [schedule] = start.checkpoint["optimizer_states"], start.checkpoint["lr_schedulers"]
    now = module.configure_optimizers()["optimizer"].param_groups
    found, wanted = (
        {group["name"]: len(group["params"]) for group in groups} for groups in (stored["param_groups"], now)
    )
    where = f"checkpoint {start.path}"
    if found != wanted:
        raise InputError(
            f"{where}: its optimizer has groups of {found} parameters; must be {wanted}, as those of this model"
        )
    for there, here, base in zip(stored["param_groups"], now, schedule["base_lrs"], strict=True):
        if start.kind == "resumed" and not there.get("initial_lr") == base == here["initial_lr"]:
            raise InputError(f"{where}: base_lrs of {here['name']}: found {base}; must be {here['initial_lr']}")
        for i, parameter in zip(there["params"], here["params"], strict=True):
            for name, value in stored["state"].get(i, {}).items():
                if name != "step" and value.shape != parameter.shape:
                    raise InputError(
                        f"{where}: optimizer_states[0].state.{i}.{name}: found shape {list(value.shape)}; must be "
                        f"{list(parameter.shape)}"
                    )
