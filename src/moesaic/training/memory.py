"""Whether a run has room in memory, counted from its config before anything is read or built."""

import dataclasses

import torch

from moesaic.config import from_mapping, to_mapping
from moesaic.devices import gigabytes, on_gpu, require_memory
from moesaic.distillation.config import teacher_mapping
from moesaic.models import DecoderConfig
from moesaic.models.memory import MemoryEstimate, estimate_memory
from moesaic.training.config import RunConfig
from moesaic.training.launched import processes

__all__ = ["require_memory_of_run"]

WEIGHT_DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Dtype of the weights by precision; with others it is fp32."""


def require_memory_of_run(config: RunConfig, model: DecoderConfig, workers: int = 1) -> None:
    """Refuse a run whose weights, gradients, optimizer state and activations of one micro-batch do not fit.

    Each process of a run builds the whole model, and then keeps its shards. Processes on CPUs share the memory of the
    machine; on GPUs they share it while they build. What is gathered for a while is not counted, nor are custom
    modules, which the message names.

    Args:
        workers: runs of this size at a time, as a study has them.

    Raises:
        InputError: with what is needed and what there is.
    """
    trainer, training = config.trainer, config.training
    ranks = processes(to_mapping(trainer))
    here = ranks // trainer.num_nodes
    student = _estimate(config, model, ranks)
    kept = student.weights + student.gradients + student.optimizer
    building, parts = student.weights, f"weights {gigabytes(student.weights)}"
    parts += f", gradients {gigabytes(student.gradients)}, optimizer {gigabytes(student.optimizer)}"
    of_teacher = 0
    if config.distillation is not None and config.distillation.source == "joint":
        overridden = teacher_mapping(to_mapping(model), config.distillation.teacher_model)
        teacher = _estimate(config, from_mapping(DecoderConfig, overridden, "distillation.teacher_model"), ranks)
        building += teacher.weights
        of_teacher = teacher.weights + teacher.gradients + teacher.optimizer
    if ranks > 1 and trainer.strategy == "auto" and config.parallel.shard:
        shards = (kept + of_teacher) // ranks
        running = shards + _passes(config, model, student, ranks)
        parts = f"weights {gigabytes(building)} while it builds, then shards {gigabytes(shards)} of these, gradients "
        parts += f"and optimizer, activations {gigabytes(student.activations)}"
    else:
        running = _needed(config, model, student, ranks) + of_teacher
        parts += f", activations {gigabytes(student.activations)}"
        if of_teacher:
            parts += f", its teacher {gigabytes(of_teacher)}"
    if student.uncounted:
        parts += f"; without {', '.join(student.uncounted)}, which only building can count"
    what = f"model, training.batch_size={training.batch_size}, training.seq_len={training.seq_len}: "
    smaller = "must be a smaller model, batch_size or seq_len"
    if ranks == 1:
        what += f"a run ({parts})" if workers == 1 else f"workers={workers} runs at a time, each ({parts}),"
    else:
        what += f"workers={workers} runs at a time, each of " if workers > 1 else ""
        what += f"{here} processes on this machine, each ({parts}),"
        smaller += ", or fewer trainer.devices"
    advice = f"{smaller}{', or fewer workers' if workers > 1 else ''} (moesaic memory counts)"
    if ranks > 1 and on_gpu(trainer.accelerator):
        require_memory(what, workers * here * building, "cpu", advice)
        require_memory(what, workers * max(building, running), trainer.accelerator, advice)
    else:
        require_memory(what, workers * here * max(building, running), trainer.accelerator, advice)


def _passes(config: RunConfig, model: DecoderConfig, found: MemoryEstimate, ranks: int) -> int:
    """Activations and loss of a rank's rows."""
    if config.trainer.precision in ("auto", "bf16-mixed"):
        found = _estimate(config, model, ranks, torch.bfloat16)
    return found.activations + found.loss


def _estimate(config: RunConfig, model: DecoderConfig, ranks: int, dtype: torch.dtype | None = None) -> MemoryEstimate:
    """The whole model, and a rank's rows of a micro-batch."""
    if config.trainer.precision == "fp8" and model.moe is not None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, backend="fp8_emulated"))
    return estimate_memory(
        model,
        batch_size=-(-config.training.batch_size // ranks),
        seq_len=config.training.seq_len,
        dtype=dtype or WEIGHT_DTYPES.get(config.trainer.precision, torch.float32),
        optimizer=config.optimizer.name,
        checkpoint_activations=config.trainer.checkpoint_activations,
    )


def _needed(config: RunConfig, model: DecoderConfig, found: MemoryEstimate, ranks: int) -> int:
    """The peak; under autocast, or where precision is still open, activations are taken to have half the size."""
    if config.trainer.precision not in ("auto", "bf16-mixed"):
        return found.total
    passes = _passes(config, model, found, ranks)
    return found.weights + found.optimizer + max(found.optimizer_step, passes)
