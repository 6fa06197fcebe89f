"""What follows training: a list of finishers, each of which adds numbers to metrics.json and may draw or print."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor

from moesaic.arms import gather_custom
from moesaic.checkpoints import save_model
from moesaic.config import flatten, to_mapping
from moesaic.data import token_bytes, token_strings
from moesaic.evaluation.capacity import capacity_numbers
from moesaic.evaluation.extension import compare_with_start, extension_numbers, extension_table, start_of
from moesaic.evaluation.language_modeling import LanguageModelScore, evaluate_split, on_windows
from moesaic.evaluation.long_context_plots import plot_variants_by_position
from moesaic.evaluation.plots import (
    draw_drift,
    draw_fullest,
    draw_loss_by_position,
    plot_distillation,
    plot_drift,
    plot_expert_load,
    plot_loss,
    plot_loss_by_position,
    read_drift,
    read_fullest,
)
from moesaic.evaluation.plotting import new_card, pixels
from moesaic.evaluation.recall import plot_recall, recall_numbers, score_recall
from moesaic.evaluation.routing import load_health
from moesaic.evaluation.sampling import sample_text
from moesaic.evaluation.specialization import Specialization, file_kinds
from moesaic.evaluation.specialization_plots import plot_explained, plot_specialization
from moesaic.files import write_atomically
from moesaic.training.batches import evaluation_sizes
from moesaic.training.config import RunConfig
from moesaic.training.fit import Fitted
from moesaic.training.tensorboard import TensorBoardLogger

__all__ = ["FINISHERS", "PRESENTING", "Finished", "Finisher", "score_run"]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that ended well, with the score of its student on the validation split."""

    fitted: Fitted
    score: LanguageModelScore
    specialization: Specialization
    console: Console

    @property
    def draws(self) -> bool:
        """Whether pictures are asked for."""
        return self.fitted.prepared.config.finish == "all"

    @property
    def plots(self) -> Path:
        return self.fitted.prepared.run_dir / "plots"

    @property
    def metrics_csv(self) -> Path:
        return self.fitted.prepared.run_dir / "metrics.csv"

    @property
    def token_bytes(self) -> Tensor | None:
        """(V,) bytes of each token, if they are known."""
        return _token_bytes(self.fitted)


Finisher = Callable[[Finished], dict[str, float]]


def score_run(fitted: Fitted, console: Console) -> Finished:
    """Score the student on the validation split, and count in the same pass what each expert takes."""
    prepared = fitted.prepared
    data = prepared.data
    specialization = Specialization(
        prepared.model.vocab_size, token_strings(data.tokenizer), file_kinds(data.validation, data.tokenizer)
    )
    score = evaluate_split(
        fitted.module.decoder,
        data,
        **evaluation_sizes(prepared.config.training),
        windows=prepared.config.training.score_windows,
        token_bytes=_token_bytes(fitted),
        watch=specialization.update,
    )
    return Finished(fitted, score, specialization, console)


def _token_bytes(fitted: Fitted) -> Tensor | None:
    tokenizer = fitted.prepared.data.tokenizer
    return None if tokenizer is None else torch.tensor(token_bytes(tokenizer))


def loss_and_load(run: Finished) -> dict[str, float]:
    """Loss, bits per byte, and how evenly the experts of each layer are used."""
    score, data = run.score, run.fitted.prepared.data
    numbers = score.numbers()
    for name, counts in score.tokens_per_expert.items():
        max_violation, dead_share = load_health(counts)
        numbers[f"router/{name}/max_violation"] = max_violation
        numbers[f"router/{name}/dead_share"] = dead_share
    seq_len = evaluation_sizes(run.fitted.prepared.config.training)["seq_len"]
    if data.task is None:
        seq_len = min(seq_len, len(data.validation.tokens) - 1)
    return {**numbers, **run.specialization.numbers(), "validation/seq_len": seq_len}


def teacher_score(run: Finished) -> dict[str, float]:
    """Loss of the teacher, where there is one at hand, on the same split."""
    prepared, targets = run.fitted.prepared, run.fitted.prepared.targets
    teacher = run.fitted.module.teacher or (None if targets is None else targets.decoder)
    if teacher is None:
        return {}
    training = prepared.config.training
    sizes, windows = evaluation_sizes(training), training.score_windows
    theirs = evaluate_split(teacher, prepared.data, **sizes, windows=windows, token_bytes=run.token_bytes)
    numbers = {"validation/teacher_loss": theirs.loss}
    if theirs.bits_per_byte is not None:
        numbers["validation/teacher_bits_per_byte"] = theirs.bits_per_byte
    return numbers


def keep_teacher(run: Finished) -> dict[str, float]:
    """Write a teacher that trained along as a checkpoint of its own: last.ckpt is the student to whoever loads it."""
    prepared, teacher = run.fitted.prepared, run.fitted.module.teacher
    if teacher is not None:
        alone = prepared.run_dir / "checkpoints" / "teacher.ckpt"
        alone.unlink(missing_ok=True)
        save_model(alone, teacher, prepared.data.tokenizer, prepared.config.training.seq_len)
    return {}


def baselines(run: Finished) -> dict[str, float]:
    """Bits per byte of simple compressors on the same text."""
    return {f"baselines/{name}": value for name, value in run.fitted.prepared.data.facts.get("baselines", {}).items()}


def curves(run: Finished) -> dict[str, float]:
    """Pictures of loss, expert load, soft targets, and loss by position."""
    prepared, plots = run.fitted.prepared, run.plots
    config = prepared.config
    if run.metrics_csv.exists():
        plot_loss(
            run.metrics_csv,
            plots / "loss.png",
            prepared.data.facts.get("baselines", {}),
            run.score.bits_per_byte,
            on_windows(run.score.numbers()) or "all of it",
        )
    if (prepared.run_dir / "routing.csv").exists():
        plot_expert_load(prepared.run_dir / "routing.csv", plots / "expert_load.png")
    if config.distillation is not None and run.metrics_csv.exists():
        plot_distillation(run.metrics_csv, plots / "distillation.png")
    if prepared.data.task is None:  # most positions of a recall task's sequences have no loss
        chunk = prepared.model.attention.attention_chunk_size
        by_position = run.score.loss_by_position
        plot_loss_by_position(by_position, plots / "loss_by_position.png", config.training.seq_len, chunk)
    return {}


def context_extension(run: Finished) -> dict[str, float]:
    """Loss by position before and after training at a longer context."""
    prepared = run.fitted.prepared
    stretches, extends = prepared.stretches, prepared.config.extend_context
    if stretches is None or extends is None:
        return {}
    start = start_of(prepared.run_dir)
    found = compare_with_start(start, run.fitted.module.decoder, stretches, extends, run.token_bytes)
    if run.draws:
        plot_variants_by_position(found, run.plots / "extend_context.png", prepared.config.training.seq_len)
    run.console.print(extension_table(found, stretches))
    return extension_numbers(found, stretches)


def expert_pictures(run: Finished) -> dict[str, float]:
    """Pictures of what each expert takes and of how that changed."""
    plot_specialization(run.specialization, run.plots / "specialization.png")
    if run.metrics_csv.exists():
        plot_drift(run.metrics_csv, run.plots / "drift.png")
    return {}


def board_pictures(run: Finished) -> dict[str, float]:
    """The same for TensorBoard, each of them readable at the size of its cards whatever the number of layers."""
    prepared, run_dir = run.fitted.prepared, run.fitted.prepared.run_dir
    for logger in _tensorboards(run):
        cards: dict[str, Callable[[Axes], None]] = {}
        if (run_dir / "routing.csv").exists() and (fullest := read_fullest(run_dir / "routing.csv")):
            cards["views/fullest_expert"] = functools.partial(draw_fullest, found=fullest)
        if run.metrics_csv.exists() and (drifts := read_drift(run.metrics_csv)):
            cards["views/drift"] = functools.partial(draw_drift, drifts=drifts)
        if numbers := run.specialization.numbers():
            cards["views/specialization"] = functools.partial(plot_explained, numbers=numbers)
        if prepared.data.task is None:
            cards["views/loss_by_position"] = functools.partial(
                draw_loss_by_position,
                nats=run.score.loss_by_position,
                train_length=prepared.config.training.seq_len,
                chunk=prepared.model.attention.attention_chunk_size,
            )
        for name, draw in cards.items():
            figure, axis = new_card()
            draw(axis)
            logger.experiment.add_image(name, pixels(figure), run.fitted.trainer.global_step, dataformats="HWC")
    return {}


def recall(run: Finished) -> dict[str, float]:
    """Accuracy on the test sets of a task at all lengths, plotted and shown."""
    prepared = run.fitted.prepared
    task, training = prepared.data.task, prepared.config.training
    if task is None:
        return {}
    scores = score_recall(run.fitted.module.decoder, task, training.seq_len, training.batch_size)
    if run.draws:
        plot_recall(scores, run.plots / "recall.png", training.seq_len, task.chance)
    shown = ", ".join(f"{score.accuracy:.1%} at {multiple}x" for multiple, score in sorted(scores.items()))
    run.console.print(
        f"[bold]recall[/]  accuracy {shown} the training length; chance {task.chance:.1%}", highlight=False
    )
    return {**recall_numbers(scores), "recall/chance": task.chance}


def capacity(run: Finished) -> dict[str, float]:
    """How many bits the model has stored, where the data are facts to be known."""
    prepared = run.fitted.prepared
    numbers = capacity_numbers(run.score, prepared.data.task, prepared.account)
    if numbers:
        run.console.print(
            f"[bold]capacity[/] {numbers['capacity/known_bits']:,.0f} of {numbers['capacity/data_bits']:,.0f} bits "
            f"known, {numbers['capacity/bits_per_parameter']:.3f} bits per parameter and "
            f"{numbers['capacity/bits_per_active_parameter']:.3f} per active one",
            highlight=False,
        )
    return numbers


def sample(run: Finished) -> dict[str, float]:
    """Text that the model writes, in sample.txt and in TensorBoard."""
    prepared = run.fitted.prepared
    if (tokenizer := prepared.data.tokenizer) is not None:
        text = sample_text(run.fitted.module.decoder, tokenizer, prepared.config.sample, prepared.config.seed)
        write_atomically(prepared.run_dir / "sample.txt", text)
        for logger in _tensorboards(run):
            as_code = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown leaves it as it is
            logger.experiment.add_text("sample", as_code, run.fitted.trainer.global_step)
    return {}


PLACES = (
    *(
        "output_dir",
        "run_dir",
        "resume",
        "logger",
        "sample",
        "data.cache_dir",
        "model.format",
        "trainer.threads",
        "parallel",
    ),
    *("training.log_every", "training.checkpoint_every", "training.validate_every", "training.validation_batches"),
)
"""Keys and sections that say nothing of a result."""


def hyper_parameters(run: Finished) -> dict[str, float]:
    """What was set beside what came of it, for TensorBoard's table of runs."""
    prepared = run.fitted.prepared
    config, defaults = (flatten(to_mapping(each)) for each in (prepared.config, RunConfig()))
    config = {key: value for key, value in config.items() if not key.startswith(PLACES)}
    numbers = {
        "loss": run.score.loss,
        "seconds": run.fitted.module.log_book.seconds,
        "parameters": prepared.account.parameters,
        "active_parameters": prepared.account.active_parameters,
    }
    if run.score.bits_per_byte is not None:
        numbers["bits_per_byte"] = run.score.bits_per_byte
    for logger in _tensorboards(run):
        logger.log_end(gather_custom(config), gather_custom(defaults), numbers, run.fitted.trainer.global_step)
        logger.finalize("success")
    return {}


def _tensorboards(run: Finished) -> list[TensorBoardLogger]:
    return [logger for logger in run.fitted.trainer.loggers if isinstance(logger, TensorBoardLogger)]


FINISHERS: tuple[Finisher, ...] = (
    loss_and_load,
    teacher_score,
    keep_teacher,
    baselines,
    curves,
    context_extension,
    expert_pictures,
    board_pictures,
    recall,
    capacity,
    sample,
    hyper_parameters,
)
"""In this order."""

PRESENTING: tuple[Finisher, ...] = (curves, expert_pictures, board_pictures, sample, hyper_parameters)
"""Finishers that add no number, left out where finish=score."""
