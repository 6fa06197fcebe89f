"""The state of training in a checkpoint, checked before a run directory exists: Lightning would fail on it in a run."""

import random
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
import torch
from packaging.version import Version

from moesaic.errors import InputError
from moesaic.reading import reading, require_finite
from moesaic.training.lightning_options import quiet_lightning

__all__ = ["require_training_state"]

BEST = {
    **dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"), str),
    **dict.fromkeys(("best_model_score", "current_score"), torch.Tensor | None),
    **{"best_k_models": dict, "kth_value": torch.Tensor},
}
"""Keys of the state of ModelCheckpoint."""


def require_training_state(checkpoint: Mapping[str, Any], where: object) -> None:
    """Refuse a checkpoint from which optimiser, schedule, loops and random generators cannot be restored.

    Args:
        checkpoint: as `load_checkpoint` gives it.
        where: the file, for messages.

    Raises:
        InputError: it names what is missing or of another form.
    """
    with reading(where):
        Version(_of(checkpoint, "pytorch-lightning_version", str))
        _require_loops(checkpoint)
        for i, state in enumerate(_of(checkpoint, "optimizer_states", list)):
            _require_optimizer(state, checkpoint["state_dict"], f"optimizer_states[{i}]")
        for i, state in enumerate(_of(checkpoint, "lr_schedulers", list)):
            for name, kind in (("last_epoch", int), ("_step_count", int), ("base_lrs", list), ("_last_lr", list)):
                _of(state, name, kind, f"lr_schedulers[{i}].")
            require_finite(state, f"lr_schedulers[{i}]")
        _require_callbacks(_of(checkpoint, "callbacks", dict))
        _require_own(checkpoint["moesaic"])


def _of(content: Mapping[str, Any], key: str, kind: Any, place: str = "") -> Any:
    if key not in content:
        raise InputError(f"{place}{key}: missing")
    value = content[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{place}{key}: found a {type(value).__name__}; must be a {getattr(kind, '__name__', kind)}")
    return value


def _require_loops(checkpoint: Mapping[str, Any]) -> None:
    quiet_lightning()
    made = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    loops = _of(checkpoint, "loops", dict)
    _require_like(made.fit_loop.state_dict(), _of(loops, "fit_loop", dict, "loops."), "loops.fit_loop")
    loader = loops["fit_loop"]["state_dict"].get("combined_loader", [])
    for state in loader:
        if _of(state, "next_batch", int, "loops.fit_loop.state_dict.combined_loader.") < 0:
            raise InputError("loops.fit_loop.state_dict.combined_loader.next_batch: must be a number >= 0")
    progress = loops["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
    for name in ("global_step", "epoch"):
        _of(checkpoint, name, int)
    if (steps := progress["optimizer"]["step"]["total"]["completed"]) != checkpoint["global_step"]:
        raise InputError(f"global_step={checkpoint['global_step']}: the loops have made {steps} steps")


def _require_like(made: Any, found: Any, key: str) -> None:
    """Refuse what lacks a key of `made`, or has a value of another kind there."""
    if isinstance(made, dict):
        for name, value in made.items():
            _require_like(value, _of(found, name, type(value), f"{key}."), f"{key}.{name}")
    elif isinstance(made, int) and found < 0:
        raise InputError(f"{key}={found}: must be a number >= 0")


def _require_optimizer(state: Any, weights: Mapping[str, torch.Tensor], key: str) -> None:
    groups, shapes = _of(state, "param_groups", list, f"{key}."), {tensor.shape for tensor in weights.values()}
    indices: list[int] = []
    for i, group in enumerate(groups):
        indices += _of(group, "params", list, f"{key}.param_groups[{i}].")
        _of(group, "lr", float, f"{key}.param_groups[{i}].")
        require_finite(group, f"{key}.param_groups[{i}]")
    if sorted(indices) != list(range(len(indices))) or len(indices) > len(weights):
        raise InputError(f"{key}.param_groups: must number each parameter once")
    for i, values in _of(state, "state", dict, f"{key}.").items():
        for name, value in values.items():
            is_sound = isinstance(value, torch.Tensor) and (value.dim() == 0 or value.shape in shapes)
            if i not in indices or not is_sound:
                raise InputError(f"{key}.state.{i}.{name}: must be a tensor of the shape of its weight")


def _require_callbacks(callbacks: Mapping[str, Any]) -> None:
    for name, state in callbacks.items():
        if not name.startswith("ModelCheckpoint"):
            continue
        for key, kind in BEST.items():
            _of(state, key, kind, f"callbacks.{name}.")
        paths = [value for key, value in state.items() if key.endswith("path") and isinstance(value, str)]
        for path in [*paths, *state["best_k_models"]]:  # such a file is removed once there is a better one
            inside = PurePath(path).parent == PurePath(state["dirpath"]) or path in ("", state["dirpath"])
            if ".." in PurePath(path).parts or "://" in path or not inside:
                raise InputError(f"callbacks.{name}: names {path}; must be a file in the folder of the checkpoints")


def _require_own(state: Mapping[str, Any]) -> None:
    for key, kind in (("seconds", float), ("nats", torch.Tensor), ("micro_batches", int), ("logged_load", dict)):
        _of(state, key, kind, "moesaic.")
    for name, counts in state["logged_load"].items():
        _of({name: counts}, name, torch.Tensor, "moesaic.logged_load.")
    if state["nats"].dim() or not state["nats"].is_floating_point():
        raise InputError("moesaic.nats: must be one number")
    require_finite(state["seconds"], "moesaic.seconds")
    _of({"drift": state.get("drift", {})}, "drift", dict, "moesaic.")
    torch.Generator().set_state(_of(state, "torch_rng", torch.Tensor, "moesaic.").cpu())
    version, internal, gauss = state["python_rng"]
    random.Random().setstate((version, tuple(internal), gauss))
