"""The state of training in a checkpoint, checked before a run directory exists: Lightning would fail on it in a run."""

import random
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
import torch
from packaging.version import Version

from moesaic.checkpoints import require_finite_weights
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.reading import reading, require_finite
from moesaic.training.config import TrainingConfig
from moesaic.training.lightning_options import quiet_lightning
from moesaic.training.progress import Progress

__all__ = ["optimizer_steps", "require_training_state"]

ROUNDED = 64
"""Sequences by which a place in the data may differ: it is rounded where the length of sequences changes."""

BEST = {
    **dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"), str),
    **dict.fromkeys(("best_model_score", "current_score"), torch.Tensor | None),
    **{"best_k_models": dict, "kth_value": torch.Tensor},
}
"""Keys of the state of ModelCheckpoint."""


def require_training_state(checkpoint: Mapping[str, Any], where: object) -> None:
    """Refuse a checkpoint from which optimizer, schedule, loops and random generators cannot be restored.

    Args:
        checkpoint: as `load_checkpoint` gives it.
        where: the file, for messages.

    Raises:
        InputError: it names what is missing or of another form.
    """
    with reading(where):
        Version(_of(checkpoint, "pytorch-lightning_version", str))
        require_finite_weights(checkpoint["state_dict"])
        _require_own(checkpoint["moesaic"], checkpoint)
        _require_loops(checkpoint)
        [optimizer] = _of(checkpoint, "optimizer_states", list)
        _require_optimizer(optimizer, checkpoint, "optimizer_states[0]")
        [schedule] = _of(checkpoint, "lr_schedulers", list)
        _require_schedule(schedule, checkpoint["global_step"], len(optimizer["param_groups"]))
        _require_callbacks(_of(checkpoint, "callbacks", dict))


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
    fit_loop = loops["fit_loop"]
    progress = fit_loop["epoch_loop.automatic_optimization.optim_progress"]
    for name in ("global_step", "epoch"):
        _of(checkpoint, name, int)
    step = checkpoint["global_step"]
    if (steps := progress["optimizer"]["step"]["total"]["completed"]) != step:
        raise InputError(f"global_step={step}: the loops have made {steps} steps")
    if (epoch := fit_loop["epoch_progress"]["current"]["processed"]) != checkpoint["epoch"]:
        raise InputError(f"epoch={checkpoint['epoch']}: the loops are in epoch {epoch}")
    _require_positions(checkpoint, fit_loop)


def _require_positions(checkpoint: Mapping[str, Any], fit_loop: Mapping[str, Any]) -> None:
    """Refuse another number of micro-batches, or another place in the data, than the steps have had."""
    config, step = checkpoint["hyper_parameters"]["config"], checkpoint["global_step"]
    training = to_mapping(from_mapping(TrainingConfig, config["training"], "config.training"))
    accumulate = training["accumulate"]
    batches = fit_loop["epoch_loop.batch_progress"]["total"]
    _require_near(step, batches, "ready", step * accumulate, accumulate, "epoch_loop.batch_progress.total.")
    place = "loops.fit_loop.state_dict.combined_loader"
    [loader] = _of(fit_loop["state_dict"], "combined_loader", list, "loops.fit_loop.state_dict.")
    if same := (config.get("trainer") or {}).get("overfit_batches"):  # they begin again and again
        if not 0 <= _of(loader, "next_batch", int, f"{place}.") <= same:
            raise InputError(f"{place}.next_batch={loader['next_batch']}: must be 0 to {same}")
        return
    _require_near(step, loader, "next_batch", step * accumulate, accumulate, f"{place}.")
    if "offset" not in loader or "progress" not in checkpoint["moesaic"]:
        return
    progress = Progress(**checkpoint["moesaic"]["progress"])
    sequences = step * progress.tokens_per_step // training["seq_len"] + _of(loader, "offset", int, f"{place}.")
    if abs(sequences * training["seq_len"] - progress.tokens(step)) > ROUNDED * training["seq_len"]:
        raise InputError(
            f"{place}.offset={loader['offset']}: {sequences} sequences of {training['seq_len']} were read, but "
            f"{progress.tokens(step)} tokens trained"
        )


def _require_near(step: int, state: Any, key: str, least: int, more: int, place: str) -> None:
    """Refuse a counter that does not belong to the step; within a step it may be further."""
    if not least <= (found := _of(state, key, int, place)) <= least + more:
        raise InputError(f"{place}{key}={found}: must be {least} at global_step={step}")


def _require_like(made: Any, found: Any, key: str) -> None:
    """Refuse what lacks a key of `made`, or has a value of another kind there."""
    if isinstance(made, dict):
        for name, value in made.items():
            _require_like(value, _of(found, name, type(value), f"{key}."), f"{key}.{name}")
    elif isinstance(made, int) and found < 0:
        raise InputError(f"{key}={found}: must be a number >= 0")


def _require_schedule(state: Any, step: int, num_groups: int) -> None:
    for name, kind in (("last_epoch", int), ("_step_count", int), ("base_lrs", list), ("_last_lr", list)):
        _of(state, name, kind, "lr_schedulers[0].")
    require_finite(state, "lr_schedulers[0]")
    _require_near(step, state, "last_epoch", step, 0, "lr_schedulers[0].")
    for name in ("base_lrs", "_last_lr"):
        if len(state[name]) != num_groups or not all(isinstance(rate, float) and rate >= 0 for rate in state[name]):
            raise InputError(f"lr_schedulers[0].{name}: must be {num_groups} rates >= 0, one of each group")


def _require_optimizer(state: Any, checkpoint: Mapping[str, Any], key: str) -> None:
    weights, step = checkpoint["state_dict"], checkpoint["global_step"]
    groups, shapes = _of(state, "param_groups", list, f"{key}."), {tensor.shape for tensor in weights.values()}
    indices: list[int] = []
    for i, group in enumerate(groups):
        indices += _of(group, "params", list, f"{key}.param_groups[{i}].")
        _of(group, "lr", float, f"{key}.param_groups[{i}].")
        require_finite(group, f"{key}.param_groups[{i}]")
    if sorted(indices) != list(range(len(indices))) or len(indices) > len(weights):
        raise InputError(f"{key}.param_groups: must number each parameter once")
    by_muon = {i for group in groups if group.get("muon") for i in group["params"]}
    for i, values in _of(state, "state", dict, f"{key}.").items():
        moments = ("momentum_buffer",) if i in by_muon else ("exp_avg", "exp_avg_sq")
        for name in ("step", *moments):
            value = _of(values, name, torch.Tensor, f"{key}.state.{i}.")
            shape = torch.Size() if name == "step" else values[moments[0]].shape
            if i not in indices or value.shape != shape or (name != "step" and value.shape not in shapes):
                raise InputError(f"{key}.state.{i}.{name}: must be a tensor of the shape of its weight")
            if value.is_meta:  # in a part of another file, which is looked at when it is read
                continue
            if not bool(value.isfinite().all()) or (name in ("step", "exp_avg_sq") and bool((value < 0).any())):
                raise InputError(f"{key}.state.{i}.{name}: must hold finite numbers, and no negative ones if squares")
        if not 1 <= int(values["step"]) <= step:
            raise InputError(f"{key}.state.{i}.step={values['step']:g}: must be 1 to global_step={step}")
    wanted, found = checkpoint["moesaic"].get("optimizer_steps"), optimizer_steps(state)
    if wanted is not None and found != wanted:  # checkpoints of earlier versions do not say it
        i = next(i for i in {**wanted, **found} if wanted.get(i) != found.get(i))
        raise InputError(f"{key}.state.{i}: found {found.get(i, 0)} steps; must be {wanted.get(i, 0)}")


def optimizer_steps(state: Mapping[str, Any]) -> dict[int, int]:
    """How often an optimizer, by its state dict, has stepped each parameter: one without a gradient has no state."""
    return {i: int(values["step"]) for i, values in state["state"].items()}


def _require_callbacks(callbacks: Mapping[str, Any]) -> None:
    for name, state in callbacks.items():
        if not name.startswith("ModelCheckpoint"):
            continue
        for key, kind in BEST.items():
            _of(state, key, kind, f"callbacks.{name}.")
            if isinstance(score := state[key], torch.Tensor) and bool(score.isnan().any()):  # nothing is better
                raise InputError(f"callbacks.{name}.{key}: found nan; must be a number")
        paths = [value for key, value in state.items() if key.endswith("path") and isinstance(value, str)]
        for path in [*paths, *state["best_k_models"]]:  # such a file is removed once there is a better one
            inside = PurePath(path).parent == PurePath(state["dirpath"]) or path in ("", state["dirpath"])
            if ".." in PurePath(path).parts or "://" in path or not inside:
                raise InputError(f"callbacks.{name}: names {path}; must be a file in the folder of the checkpoints")


def _require_own(state: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    for key, kind in (("seconds", float), ("nats", torch.Tensor), ("micro_batches", int), ("logged_load", dict)):
        _of(state, key, kind, "moesaic.")
    for key in ("seconds", "micro_batches"):
        require_finite(state[key], f"moesaic.{key}")
        if state[key] < 0:
            raise InputError(f"moesaic.{key}={state[key]}: must be a number >= 0")
    if state["nats"].dim() or not state["nats"].is_floating_point() or not bool(state["nats"].isfinite()):
        raise InputError("moesaic.nats: must be one finite number")
    drift = _of({"drift": state.get("drift", {})}, "drift", dict, "moesaic.")
    for key, counts, dims in (("logged_load", state["logged_load"], 1), ("drift.choices", drift.get("choices", {}), 2)):
        for name, tensor in counts.items():
            _of(counts, name, torch.Tensor, f"moesaic.{key}.")
            layer = f"decoder.{name}."
            if tensor.dim() != dims or not any(weight.startswith(layer) for weight in checkpoint["state_dict"]):
                raise InputError(f"moesaic.{key}.{name}: must be a layer, and numbers in {dims} dimensions")
    if "progress" in state:
        progress = from_mapping(Progress, state["progress"], "moesaic.progress")
        step = _of(checkpoint, "global_step", int)
        if progress.tokens_per_step < 1 or not 0 <= progress.step <= step or progress.tokens_before < 0:
            raise InputError(f"moesaic.progress: found {progress}; must be counts up to global_step={step}")
    torch.Generator().set_state(_of(state, "torch_rng", torch.Tensor, "moesaic.").cpu())
    version, internal, gauss = state["python_rng"]
    random.Random().setstate((version, tuple(internal), gauss))
