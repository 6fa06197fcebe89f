"""One run from config to verdict."""

import contextlib
import dataclasses
import functools
import logging
import resource
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.image import imread
from rich.console import Console

from moesaic.allocator import keep_freed_memory
from moesaic.checkpoints import decoder_weights, load_checkpoint, require_same_model, save_model
from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.data import (
    Data,
    EvaluationLoader,
    Task,
    TaskEvaluationLoader,
    TaskTrainingLoader,
    TrainingLoader,
    load_data,
    token_bytes,
    token_strings,
)
from moesaic.devices import require_accelerator
from moesaic.distillation.config import teacher_mapping
from moesaic.distillation.opened import open_targets, require_paths, require_same_teacher, students_tokenizer
from moesaic.errors import InputError
from moesaic.evaluation.extension import (
    checkpoint_tokenizer,
    compare_with_start,
    extension_numbers,
    extension_table,
    keep_start,
    open_stretches,
    require_extendable,
    start_of,
)
from moesaic.evaluation.language_modelling import LanguageModelScore, evaluate_language_model
from moesaic.evaluation.long_context_plots import plot_variants_by_position
from moesaic.evaluation.plots import (
    plot_distillation,
    plot_drift,
    plot_expert_load,
    plot_loss,
    plot_loss_by_position,
    read_columns,
)
from moesaic.evaluation.recall import plot_recall, recall_numbers, score_recall
from moesaic.evaluation.routing import load_health
from moesaic.evaluation.sampling import sample_text
from moesaic.evaluation.specialisation import Specialisation, file_kinds, plot_specialisation
from moesaic.files import require_disk_space, write_atomically, write_json, write_yaml
from moesaic.formats import translate_run
from moesaic.models import Decoder, DecoderConfig, account
from moesaic.training.callbacks import LastCheckpoint, PlainProgress, ProgressBar, RunMonitor
from moesaic.training.config import RunConfig, TrainingConfig
from moesaic.training.continuing import require_same_distillation
from moesaic.training.module import Diverged, LanguageModel
from moesaic.training.precision import choose_precision
from moesaic.training.records import RunLogger, create_run_dir, environment
from moesaic.training.summary import activation_bytes, describe_teacher, print_summary, print_verdict

__all__ = ["fit_vocabulary", "resolve_resume", "run"]


def run(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Train as `config` (a plain mapping, see `RunConfig`) says; returns what metrics.json holds.

    Everything that can be refused is refused before the run directory exists.

    Raises:
        InputError: bad configuration, data or checkpoint.
    """
    with contextlib.ExitStack() as at_the_end:
        return _run(config, console or Console(width=None if sys.stdout.isatty() else 120), at_the_end)


def _run(config: Mapping[str, Any], console: Console, at_the_end: contextlib.ExitStack) -> dict[str, Any]:
    resume_dir = None
    if config.get("resume"):
        config, resume_dir = resolve_resume(config)
    run_config = from_mapping(RunConfig, config)
    model_mapping = {**run_config.model}
    if model_mapping.get("vocab_size") is None:
        model_mapping["vocab_size"] = 1  # until the data say; shapes are checked before any data is read
    from_mapping(DecoderConfig, model_mapping, "model")
    distillation = run_config.distillation
    if distillation is not None:
        overridden = teacher_mapping(model_mapping, distillation.teacher_model)
        from_mapping(DecoderConfig, overridden, "distillation.teacher_model")
        require_paths(distillation)
    if resume_dir is None and run_config.run_dir is not None:
        _require_free(Path(run_config.run_dir))
    require_accelerator("trainer.accelerator", run_config.trainer.accelerator)
    checkpoint = resume_dir / "checkpoints" / "last.ckpt" if resume_dir else run_config.ckpt_path
    loaded = load_checkpoint(checkpoint) if checkpoint else None

    if run_config.trainer.keep_freed_memory:
        keep_freed_memory()
    if run_config.trainer.threads:
        torch.set_num_threads(run_config.trainer.threads)
    pl.seed_everything(run_config.seed, verbose=False)
    if run_config.data.make_task() is None:
        console.print(
            f"reading {run_config.data.source} data (the first time they are tokenised and cached)", highlight=False
        )
    extends = run_config.extend_context
    tokenizer = None
    if loaded is not None and extends is not None:
        tokenizer = checkpoint_tokenizer(str(checkpoint), loaded, run_config.data)
    elif distillation is not None:
        tokenizer = students_tokenizer(distillation, run_config.data)
    data = load_data(run_config.data, tokenizer)
    model_config = fit_vocabulary(run_config, data)
    stretches = None
    if loaded is not None and extends is not None:
        require_extendable(str(checkpoint), loaded, model_config)
        start = loaded if resume_dir is None else load_checkpoint(start_of(resume_dir))
        before = start["hyper_parameters"]["config"]["training"]["seq_len"]
        stretches = open_stretches(extends, data.validation, data.tokenizer, (before, run_config.training.seq_len))
    elif loaded is not None:
        require_same_model(str(checkpoint), loaded, model_config)
        require_same_distillation(str(checkpoint), loaded, run_config, model_config)
    training_loader, validation_loader, test_loader = _loaders(run_config, data)

    why_precision = ""
    if run_config.trainer.precision == "auto":
        precision, why_precision = choose_precision(model_config, run_config.training, run_config.trainer.accelerator)
        run_config = dataclasses.replace(
            run_config, trainer=dataclasses.replace(run_config.trainer, precision=precision)
        )
    accounted = account(model_config, run_config.training.seq_len)
    opened = None
    if distillation is not None and distillation.source != "joint":
        opened = open_targets(
            distillation, data, vocab_size=model_config.vocab_size, seq_len=run_config.training.seq_len
        )
        at_the_end.callback(opened.close)  # also where the run fails: other runs may want to add to the cache
        if resume_dir is not None:
            require_same_teacher(opened, resume_dir / "environment.json")
    if resume_dir is None:
        run_dir = _new_run_dir(run_config)
        write_yaml(run_dir / "config.yaml", to_mapping(run_config))
    else:
        run_dir = resume_dir
    name = "environment.json" if resume_dir is None else "environment-resumed.json"
    teacher_facts = {} if opened is None else {"teacher": {"hash": opened.teacher_hash, "source": opened.description}}
    write_json(run_dir / name, {**environment(), "data": data.facts, **teacher_facts})

    lengths_in_bytes = None if data.tokenizer is None else token_bytes(data.tokenizer)
    module = LanguageModel(
        to_mapping(run_config),
        to_mapping(model_config),
        None if data.tokenizer is None else data.tokenizer.to_dict(),
        lengths_in_bytes,
        None if opened is None else opened.source,
    )
    weight_bytes = sum(p.numel() * p.itemsize for p in module.parameters())
    require_disk_space(run_dir, 3 * 3 * weight_bytes + 20_000_000)  # last, best and one being written
    if loaded is not None and extends is not None and resume_dir is None:
        keep_start(run_dir, loaded)
    # weights only: made by scripts/convert.py, a teacher.ckpt, or another length, which needs a schedule of its own
    if loaded is not None and ("optimizer_states" not in loaded or (extends is not None and resume_dir is None)):
        module.decoder.load_state_dict(decoder_weights(loaded))
        checkpoint = None
    training = run_config.training
    print_summary(
        console,
        run_config,
        model_config,
        accounted,
        data.facts,
        _num_tokens(run_config, data),
        activation_bytes(module.decoder, training.batch_size, training.seq_len),
        run_dir,
        None if distillation is None else describe_teacher(opened, module.teacher_account),
    )
    if why_precision:
        console.print(f"[bold]trainer[/] {run_config.trainer.precision}: {why_precision}", highlight=False)

    logger = RunLogger(run_dir)
    monitor = RunMonitor(run_dir)
    if loaded is not None and resume_dir is not None:
        for table in (logger.table, monitor.table):
            table.keep_until(loaded["global_step"])
    tensorboard = TensorBoardLogger(run_dir, name="tensorboard", version="", default_hp_metric=False)
    trainer = _trainer(run_config, run_dir, [logger, tensorboard], monitor)
    status = _fit(trainer, module, training_loader, validation_loader, checkpoint, monitor, run_dir, console)
    tokens = trainer.global_step * training.batch_size * training.seq_len * training.accumulate * trainer.world_size
    metrics = {
        **status,
        "steps": trainer.global_step,
        "tokens": tokens,
        "seconds": module.seconds,
        "tokens_per_second": module.tokens_per_second,
        "active_flops": tokens * accounted.training_flops,
        "parameters/total": accounted.parameters,
        "parameters/active": accounted.active_parameters,
        **_teacher_cost(module),
        **_last_distillation(run_dir / "metrics.csv"),
        "warnings": monitor.warnings,
    }
    baselines = data.facts.get("baselines", {})
    sample = None
    if status["status"] == "finished":
        trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt")
        lengths = None if lengths_in_bytes is None else torch.tensor(lengths_in_bytes)
        specialisation = Specialisation(
            model_config.vocab_size, token_strings(data.tokenizer), file_kinds(data.validation, data.tokenizer)
        )
        score = evaluate_language_model(module.decoder, test_loader, lengths, specialisation.update)
        score.num_bytes = score.num_bytes or data.validation.num_bytes or 0  # of a memory map without tokeniser
        metrics |= {**_final_numbers(score), **specialisation.numbers(), "validation/seq_len": test_loader.seq_len}
        if (teacher := module.teacher or (None if opened is None else opened.decoder)) is not None:
            theirs = evaluate_language_model(teacher, test_loader, lengths)
            theirs.num_bytes = score.num_bytes
            metrics["validation/teacher_loss"] = theirs.loss
            if theirs.bits_per_byte is not None:
                metrics["validation/teacher_bits_per_byte"] = theirs.bits_per_byte
        if module.teacher is not None:
            # last.ckpt holds both, and is the student to whoever loads it
            alone = run_dir / "checkpoints" / "teacher.ckpt"
            alone.unlink(missing_ok=True)
            save_model(alone, module.teacher, data.tokenizer, training.seq_len)
        metrics |= {f"baselines/{name}": value for name, value in baselines.items()}
        _plots(run_dir, run_config, model_config, baselines, score)
        if stretches is not None and extends is not None:
            found = compare_with_start(start_of(run_dir), module.decoder, stretches, extends, lengths)
            plot_variants_by_position(found, run_dir / "plots" / "extend_context.png", training.seq_len)
            console.print(extension_table(found, stretches))
            metrics |= extension_numbers(found, stretches)
        plots = run_dir / "plots"
        for picture, is_there in (
            ("specialisation", plot_specialisation(specialisation, plots / "specialisation.png")),
            ("drift", plot_drift(run_dir / "metrics.csv", plots / "drift.png")),
        ):
            if is_there:
                image = imread(plots / f"{picture}.png")
                tensorboard.experiment.add_image(picture, image, metrics["steps"], dataformats="HWC")
        if data.task is not None:
            metrics |= _recall(module.decoder, data.task, training, run_dir / "plots" / "recall.png", console)
        if data.tokenizer is not None:
            sample = sample_text(module.decoder, data.tokenizer, run_config.sample, run_config.seed)
            write_atomically(run_dir / "sample.txt", sample)
        hyper_parameters = {key: str(value) for key, value in flatten(to_mapping(run_config)).items()}
        tensorboard.log_hyperparams(hyper_parameters, {"validation/loss": score.loss})
        tensorboard.finalize("success")
    metrics["peak_memory_bytes"] = _peak_memory()
    write_json(run_dir / "metrics.json", metrics)
    print_verdict(console, run_dir, metrics, baselines, sample, _next_commands(run_dir, run_config))
    return metrics


def _fit(
    trainer: pl.Trainer,
    module: LanguageModel,
    training_loader: TrainingLoader | TaskTrainingLoader,
    validation_loader: EvaluationLoader | TaskEvaluationLoader,
    checkpoint: str | Path | None,
    monitor: RunMonitor,
    run_dir: Path,
    console: Console,
) -> dict[str, Any]:
    """Train; returns {"status": "finished"} or {"status": "diverged", "error": ...}. Other ends raise, on record."""
    ckpt_path = None if checkpoint is None else str(checkpoint)
    try:
        with warnings.catch_warnings():
            _ignore_lightning_advice()
            trainer.fit(module, training_loader, validation_loader, ckpt_path=ckpt_path, weights_only=True)
    except Diverged as error:
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        monitor.warnings.append(str(error))
        return {"status": "diverged", "error": str(error)}
    except SystemExit:  # Lightning's answer to Ctrl-C
        write_json(run_dir / "metrics.json", {"status": "interrupted", "steps": trainer.global_step})
        if (run_dir / "checkpoints" / "last.ckpt").exists():
            console.print(f"interrupted at step {trainer.global_step}; to continue from the last checkpoint:")
            console.print(f"  python scripts/train.py resume=true run_dir={run_dir}", soft_wrap=True, highlight=False)
        else:
            console.print(f"interrupted at step {trainer.global_step}, before the first checkpoint")
        raise
    except Exception as error:
        write_json(run_dir / "metrics.json", {"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    return {"status": "finished"}


def resolve_resume(config: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The stored config and directory of the run to resume: run_dir, or the newest unfinished one of this name.

    Raises:
        InputError: no such directory, not a run directory, or nothing to resume in it.
    """
    if config.get("run_dir"):
        run_dir = Path(config["run_dir"])
        if not (run_dir / "config.yaml").is_file():
            raise InputError(f"run_dir={str(run_dir)!r}: not a run directory (it has no config.yaml)")
        checkpoint = run_dir / "checkpoints" / "last.ckpt"
        if not checkpoint.is_file():
            raise InputError(f"run_dir={str(run_dir)!r}: nothing to resume, it has no checkpoints/last.ckpt")
        if _status(run_dir) == "finished":
            raise InputError(
                f"run_dir={str(run_dir)!r}: this run is finished; to train on, start a new one with "
                f"ckpt_path={checkpoint} and more training.steps"
            )
    else:
        root = Path(str(config.get("output_dir", "outputs"))) / str(config.get("name"))
        candidates = [path.parent.parent for path in root.glob("**/checkpoints/last.ckpt")]
        unfinished = [path for path in candidates if _status(path) != "finished"]
        if not unfinished:
            raise InputError(
                f"resume=true: no unfinished run with a checkpoint under {root}; give run_dir=<directory of a run>"
            )
        run_dir = max(unfinished, key=lambda path: (path / "checkpoints" / "last.ckpt").stat().st_mtime)
    stored = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    if not isinstance(stored, dict):
        raise InputError(f"{run_dir / 'config.yaml'}: damaged, it does not hold a mapping")
    return {**translate_run(stored), "run_dir": str(run_dir), "resume": True, "ckpt_path": None}, run_dir


def _status(run_dir: Path) -> str | None:
    try:
        return yaml.safe_load((run_dir / "metrics.json").read_text(encoding="utf-8")).get("status")
    except (OSError, AttributeError, yaml.YAMLError):
        return None


def fit_vocabulary(config: RunConfig, data: Data) -> DecoderConfig:
    """The model of a run with the vocabulary of its data, where it says none.

    Raises:
        InputError: it says one that is too small for them.
    """
    wanted = config.model.get("vocab_size")
    if wanted is None:
        wanted = data.vocab_size
    elif isinstance(wanted, int) and wanted < data.vocab_size:
        raise InputError(
            f"model.vocab_size={wanted}: the data have token ids up to {data.vocab_size - 1}; allowed are null or "
            f"numbers >= {data.vocab_size}"
        )
    return from_mapping(DecoderConfig, {**config.model, "vocab_size": wanted}, "model")


def _loaders(
    config: RunConfig, data: Data
) -> tuple[
    TrainingLoader | TaskTrainingLoader,
    EvaluationLoader | TaskEvaluationLoader,
    EvaluationLoader | TaskEvaluationLoader,
]:
    """(training, validation during the run, the whole validation split at the end)."""
    training = config.training
    if data.task is not None:
        return _task_loaders(data.task, training, config.seed)
    train = TrainingLoader(
        data.train.tokens,
        seq_len=training.seq_len,
        batch_size=training.batch_size,
        num_batches=training.steps * training.accumulate,
        seed=config.seed,
        # as targets are kept for; without a cache, windows begin elsewhere in every epoch
        fixed_windows=training.fixed_windows
        or (config.distillation is not None and config.distillation.source == "cached"),
    )
    seq_len = training.validation_seq_len or training.seq_len
    batch_size = max(1, training.batch_size * training.seq_len // seq_len)
    validation = EvaluationLoader(
        data.validation.tokens, seq_len=seq_len, batch_size=batch_size, max_batches=training.validation_batches
    )
    return train, validation, EvaluationLoader(data.validation.tokens, seq_len=seq_len, batch_size=batch_size)


def _task_loaders(
    task: Task, training: TrainingConfig, seed: int
) -> tuple[TaskTrainingLoader, TaskEvaluationLoader, TaskEvaluationLoader]:
    train = TaskTrainingLoader(
        task,
        seq_len=training.seq_len,
        batch_size=training.batch_size,
        num_batches=training.steps * training.accumulate,
        seed=seed,
    )
    seq_len = training.validation_seq_len or training.seq_len
    evaluation = functools.partial(
        TaskEvaluationLoader,
        task,
        seq_len=seq_len,
        batch_size=max(1, training.batch_size * training.seq_len // seq_len),
    )
    return train, evaluation(max_batches=training.validation_batches), evaluation()


def _recall(decoder: Decoder, task: Task, training: TrainingConfig, plot: Path, console: Console) -> dict[str, float]:
    """Numbers of the test sets at all lengths; they are plotted and shown too."""
    scores = score_recall(decoder, task, training.seq_len, training.batch_size)
    plot_recall(scores, plot, training.seq_len, task.chance)
    shown = ", ".join(f"{score.accuracy:.1%} at {multiple}x" for multiple, score in sorted(scores.items()))
    console.print(f"[bold]recall[/]  accuracy {shown} the training length; chance {task.chance:.1%}", highlight=False)
    return {**recall_numbers(scores), "recall/chance": task.chance}


def _num_tokens(config: RunConfig, data: Data) -> dict[str, int]:
    """Of both splits; a recall task draws every training sequence once."""
    if data.task is None:
        return {"train": len(data.train.tokens), "validation": len(data.validation.tokens)}
    training = config.training
    return {
        "train": training.steps * training.accumulate * training.batch_size * training.seq_len,
        "validation": data.task.test_sequences * (training.validation_seq_len or training.seq_len),
    }


def _new_run_dir(config: RunConfig) -> Path:
    if config.run_dir is None:
        return create_run_dir(Path(config.output_dir), config.name)
    run_dir = Path(config.run_dir)
    _require_free(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir={config.run_dir!r}: cannot be written ({error.strerror})") from error
    return run_dir


def _require_free(run_dir: Path) -> None:
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise InputError(f"run_dir={str(run_dir)!r}: exists and is not empty; resume=true continues a run in it")


def _trainer(config: RunConfig, run_dir: Path, loggers: list[Logger], monitor: RunMonitor) -> pl.Trainer:
    training, trainer = config.training, config.trainer
    interactive = sys.stdout.isatty()
    checkpoints = run_dir / "checkpoints"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator=trainer.accelerator,
        devices=1,
        precision=trainer.precision,  # type: ignore[arg-type]  # "auto" has been resolved
        max_steps=training.steps,
        max_epochs=-1,
        accumulate_grad_batches=training.accumulate,
        val_check_interval=training.validate_every * training.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # LanguageModel decides which steps are logged
        use_distributed_sampler=False,  # the loaders shard by themselves
        enable_model_summary=False,
        enable_progress_bar=interactive,
        default_root_dir=run_dir,
        logger=loggers,
        callbacks=[
            monitor,  # before the checkpoints, so that what they hold has been logged
            ProgressBar() if interactive else PlainProgress(),
            ModelCheckpoint(checkpoints, "best", monitor="validation/loss", mode="min", enable_version_counter=False),
            LastCheckpoint(checkpoints / "last.ckpt", training.checkpoint_every, training.validate_every),
        ],
    )


def _ignore_lightning_advice() -> None:
    """Warnings about what is done on purpose (no loader workers, continued runs), and Lightning's own debts."""
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*The dirpath has changed from.*",
        ".*LeafSpec.* is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def _final_numbers(score: LanguageModelScore) -> dict[str, float]:
    numbers = {"validation/loss": score.loss}
    if score.bits_per_byte is not None:
        numbers["validation/bits_per_byte"] = score.bits_per_byte
    for name, counts in score.tokens_per_expert.items():
        max_violation, dead_share = load_health(counts)
        numbers[f"router/{name}/max_violation"] = max_violation
        numbers[f"router/{name}/dead_share"] = dead_share
    return numbers


def _teacher_cost(module: LanguageModel) -> dict[str, float]:
    """What to add to the student's numbers; a teacher that is nowhere near (a complete cache) has no parameters."""
    if module.soft_weight is None:
        return {}
    cost: dict[str, float] = {"teacher_flops": module.teacher_flops}
    if module.teacher_account is not None:
        cost["parameters/teacher_total"] = module.teacher_account.parameters
        cost["parameters/teacher_active"] = module.teacher_account.active_parameters
    return cost


def _last_distillation(metrics_csv: Path) -> dict[str, float]:
    """What the teacher did in the last logged step, where there was one."""
    names = [f"distillation/{name}" for name in ("soft_weight", "agreement", "hard", "soft", "loss_gap")]
    columns = read_columns(metrics_csv, *names) if metrics_csv.exists() else ()
    return {name: float(column[-1]) for name, column in zip(names, columns, strict=False) if len(column)}


def _plots(
    run_dir: Path, config: RunConfig, model: DecoderConfig, baselines: Mapping[str, float], score: LanguageModelScore
) -> None:
    plots = run_dir / "plots"
    plot_loss(run_dir / "metrics.csv", plots / "loss.png", baselines, score.bits_per_byte)
    if (run_dir / "routing.csv").exists():
        plot_expert_load(run_dir / "routing.csv", plots / "expert_load.png")
    if config.distillation is not None:
        plot_distillation(run_dir / "metrics.csv", plots / "distillation.png")
    if config.data.make_task() is not None:
        return  # most positions of its sequences have no loss
    plot_loss_by_position(
        score.loss_by_position,
        plots / "loss_by_position.png",
        config.training.seq_len,
        model.attention.attention_chunk_size,
    )


def _next_commands(run_dir: Path, config: RunConfig) -> list[str]:
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    if config.data.make_task() is not None:
        sweep = f"python scripts/train.py -m experiment=recall data={config.data.source} seed=0,1,2"
        mixers = "model.nope_layer_interval=0,1,2 model.attention.attention_chunk_size=null"
        return [
            f"{sweep} {mixers}   # positions in all layers, in none, in every second",
            f"tensorboard --logdir {config.output_dir}",
        ]
    return [
        f"python scripts/generate.py {checkpoint} 'import os'",
        f"tensorboard --logdir {config.output_dir}",
        "python scripts/train.py -m model.dense_twin=false,true seed=0,1,2   # is the mixture worth it?",
    ]


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
