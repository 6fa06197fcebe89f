"""What a run may continue from."""

from typing import Any

from moesaic.checkpoints import require_same_keys
from moesaic.config import to_mapping
from moesaic.distillation.config import teacher_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.training.config import RunConfig

__all__ = ["require_same_distillation"]


def require_same_distillation(path: str, checkpoint: dict[str, Any], config: RunConfig, model: DecoderConfig) -> None:
    """Raise InputError if a checkpoint's optimiser has a teacher or a weight policy where `config` has none, or others.

    A checkpoint of weights only starts any run.
    """
    if "optimizer_states" not in checkpoint:
        return
    stored = checkpoint["hyper_parameters"]["config"].get("distillation")
    wanted = config.distillation
    found = "none" if stored is None else stored["source"]
    asked = "none" if wanted is None else wanted.source
    on_disk = ("frozen", "cached")  # these two may follow each other: the state of a run is the same
    if found != asked and not (found in on_disk and asked in on_disk):
        raise InputError(
            f"checkpoint {path}: of a run with distillation source {found}, the config has {asked}; to start from its "
            "weights alone, write them with moesaic.checkpoints.save_model"
        )
    if stored is not None and wanted is not None and asked == "joint":
        theirs = teacher_mapping(checkpoint["hyper_parameters"]["model"], stored["teacher_model"])
        require_same_keys("teacher_model", path, theirs, teacher_mapping(to_mapping(model), wanted.teacher_model))
