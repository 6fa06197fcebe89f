"""Whether a run has room in memory, counted from its config before anything is read or built."""

import dataclasses

import torch

from moesaic.config import from_mapping, to_mapping
from moesaic.devices import gigabytes, require_memory
from moesaic.distillation.config import teacher_mapping
from moesaic.models import DecoderConfig
from moesaic.models.memory import MemoryEstimate, estimate_memory
from moesaic.training.config import RunConfig
from moesaic.training.launched import is_one_process

__all__ = ["require_memory_of_run"]

WEIGHT_DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Dtype of the weights by precision; with others it is fp32."""


def require_memory_of_run(config: RunConfig, model: DecoderConfig, workers: int = 1) -> None:
    """Refuse a run whose weights, gradients, optimizer state and activations of one micro-batch do not fit.

    Custom modules are left out, and named in the message. Runs of several processes are not counted.

    Args:
        workers: runs of this size at a time, as a study has them.

    Raises:
        InputError: with what is needed and what there is.
    """
    trainer, training = config.trainer, config.training
    if not is_one_process(to_mapping(trainer)):
        return
    student = _estimate(config, model)
    needed, parts = _needed(config, model, student), f"weights {gigabytes(student.weights)}"
    parts += f", gradients {gigabytes(student.gradients)}, optimizer {gigabytes(student.optimizer)}"
    parts += f", activations {gigabytes(student.activations)}"
    if config.distillation is not None and config.distillation.source == "joint":
        overridden = teacher_mapping(to_mapping(model), config.distillation.teacher_model)
        teacher = _estimate(config, from_mapping(DecoderConfig, overridden, "distillation.teacher_model"))
        needed += teacher.weights + teacher.gradients + teacher.optimizer
        parts += f", its teacher {gigabytes(teacher.weights + teacher.gradients + teacher.optimizer)}"
    if student.uncounted:
        parts += f"; without {', '.join(student.uncounted)}, which only building can count"
    require_memory(
        f"model, training.batch_size={training.batch_size}, training.seq_len={training.seq_len}: "
        + (f"a run ({parts})" if workers == 1 else f"workers={workers} runs at a time, each ({parts}),"),
        workers * needed,
        trainer.accelerator,
        f"must be a smaller model, batch_size or seq_len{', or fewer workers' if workers > 1 else ''} (moesaic memory "
        "counts)",
    )


def _estimate(config: RunConfig, model: DecoderConfig, dtype: torch.dtype | None = None) -> MemoryEstimate:
    if config.trainer.precision == "fp8" and model.moe is not None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, backend="fp8_emulated"))
    return estimate_memory(
        model,
        batch_size=config.training.batch_size,
        seq_len=config.training.seq_len,
        dtype=dtype or WEIGHT_DTYPES.get(config.trainer.precision, torch.float32),
        optimizer=config.optimizer.name,
        checkpoint_activations=config.trainer.checkpoint_activations,
    )


def _needed(config: RunConfig, model: DecoderConfig, found: MemoryEstimate) -> int:
    """The peak; under autocast, or where precision is still open, activations are taken to have half the size."""
    if config.trainer.precision not in ("auto", "bf16-mixed"):
        return found.total
    halved = _estimate(config, model, torch.bfloat16)
    return found.weights + found.optimizer + max(found.optimizer_step, halved.activations + halved.loss)
