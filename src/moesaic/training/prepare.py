"""From a config to everything that a run needs: what can be refused is refused here, before anything is written."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console

from moesaic.allocator import keep_freed_memory
from moesaic.checkpoints import load_checkpoint, require_same_model
from moesaic.config import from_mapping, to_mapping
from moesaic.data import Data, Tokenizer, load_data
from moesaic.devices import require_accelerator
from moesaic.distillation.config import teacher_mapping
from moesaic.distillation.opened import (
    OpenedTargets,
    open_targets,
    require_paths,
    require_same_teacher,
    students_tokenizer,
)
from moesaic.errors import InputError
from moesaic.evaluation.extension import Stretches, checkpoint_tokenizer, open_stretches, require_extendable, start_of
from moesaic.files import (
    lock,
    make_folder,
    remove_partials,
    require_disk_space,
    write_atomically,
    write_json,
    write_yaml,
)
from moesaic.models import Account, DecoderConfig, account
from moesaic.models.config import FORMAT
from moesaic.models.custom import source_hashes, sources
from moesaic.models.trial import try_custom_router
from moesaic.parallel.config import require_degrees, require_precision, require_vocabulary
from moesaic.parallel.shards import require_parts
from moesaic.training.batches import RunBatches, require_same_batches
from moesaic.training.building import build
from moesaic.training.components import make_callbacks, require_loggers
from moesaic.training.config import RunConfig, TrainerConfig
from moesaic.training.continuing import (
    require_all_batches,
    require_same_data,
    require_same_distillation,
    require_same_optimizer,
    require_steps_left,
    tokenizer_to_keep,
)
from moesaic.training.fp8 import lightning_precision, plan_fp8
from moesaic.training.fusion_batches import make_batches
from moesaic.training.fusion_start import fusion_tokenizer, fusion_vocabulary
from moesaic.training.launched import is_one_process, processes, rank, rank_run_dir, tell_ranks
from moesaic.training.lightning_options import require_options
from moesaic.training.meeting import require_meeting
from moesaic.training.memory import require_memory_of_run
from moesaic.training.module import LanguageModel
from moesaic.training.precision import choose_precision
from moesaic.training.records import create_run_dir, environment
from moesaic.training.starting import Found, Start, busy, clear_unstarted, read_start, require_free
from moesaic.training.strategies import is_sharded, strategy_options

__all__ = ["Prepared", "fit_vocabulary", "new_run_dir", "prepare", "trainer_options"]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run that nothing stands in the way of; its directory exists."""

    config: RunConfig
    model: DecoderConfig
    account: Account
    """Parameters and FLOPs of the model."""
    module: LanguageModel
    start: Start
    data: Data
    batches: RunBatches
    callbacks: list[Callback]
    targets: OpenedTargets | None
    """Targets of distillation.source frozen or cached; None otherwise."""
    stretches: Stretches | None
    """Text of the comparison that ends a run with extend_context."""
    run_dir: Path
    why_precision: str
    """Reason for what precision=auto chose, or what precision=fp8 means here; empty where there is nothing to say."""


def prepare(found: Found, console: Console, at_the_end: contextlib.ExitStack) -> Prepared:
    """Read, check and open what a run needs, build its model, then create its directory.

    Args:
        at_the_end: takes what has to be closed, also where the run fails.

    Raises:
        InputError: bad configuration, data or checkpoint, or a directory in which another process trains.
    """
    with found.naming_config():
        run_config = from_mapping(RunConfig, found.config)
        _require_sound(run_config)
    # what is stored of a run says which words it is written in
    run_config = dataclasses.replace(run_config, model={**run_config.model, "format": FORMAT})
    if found.run_dir is not None:
        _lock(found.run_dir, at_the_end)
    elif run_config.run_dir is not None and not rank():
        require_free(Path(run_config.run_dir))
    with found.naming_config():
        callbacks = make_callbacks(run_config.callbacks)
        _require_processes(run_config, _checked_model(run_config), callbacks)
    start = read_start(run_config, found.resumed_dir)
    _settle(run_config)
    data = _read_data(run_config, start, console)
    model = fit_vocabulary(run_config, data)
    require_vocabulary(run_config.parallel, processes(to_mapping(run_config.trainer)), model)
    require_memory_of_run(run_config, model)
    stretches = _require_fitting(run_config, model, start, data)
    batches = make_batches(run_config, data)
    if start.run_dir is not None:
        batches.require_same(start.run_dir / "environment.json")
    batches.training(), batches.val_dataloader()  # they refuse data that are too short
    try_custom_router(model, run_config.training.seq_len)
    run_config, why = _choose_precision(run_config, model)
    targets = _open_targets(run_config, model, start, data)
    if targets is not None:
        at_the_end.callback(targets.close)  # also where the run fails: other runs may want to add to the cache
    accounts = _require_room(run_config, model)
    module = build(run_config, model, start, data, targets)
    number = processes(to_mapping(run_config.trainer))
    _require_tokens(module, run_config, number)
    if is_sharded(run_config.trainer.strategy, run_config.parallel, number):
        for decoder in filter(None, (module.decoder, module.teacher)):
            require_parts(decoder)
    run_dir = _claim_directory(found, run_config, at_the_end)
    if not rank():
        _begin_records(run_dir, run_config, model, start, batches, targets)
    return Prepared(
        run_config, model, accounts, module, start, data, batches, callbacks, targets, stretches, run_dir, why
    )


def _require_tokens(module: LanguageModel, config: RunConfig, processes: int) -> None:
    """Refuse a micro-batch that is too small for a router that says how many tokens it needs."""
    tokens = max(1, config.training.batch_size // processes) * config.training.seq_len
    for name, part in module.decoder.named_modules():
        if (require := getattr(part, "require_tokens", None)) is not None:
            try:
                require(tokens)
            except ValueError as error:
                raise InputError(f"{name}: {error}, or training.batch_size larger") from error


def trainer_options(config: RunConfig) -> dict[str, Any]:
    """Keyword arguments of Lightning's Trainer that `trainer.*` and `parallel` give."""
    trainer = config.trainer
    devices = list(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices
    options = {"devices": devices, "num_nodes": trainer.num_nodes, **trainer.lightning}
    precision = lightning_precision(trainer)
    chosen = strategy_options(trainer.strategy, config.parallel, precision, processes(to_mapping(trainer)))
    plugins = [*_listed(options.get("plugins")), *chosen.pop("plugins", [])]
    if is_one_process(to_mapping(trainer)):  # whatever the variables of a scheduler say
        plugins.append(LightningEnvironment())
    return {**options, **chosen, "plugins": plugins}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def fit_vocabulary(config: RunConfig, data: Data) -> DecoderConfig:
    """The model of a run with the vocabulary of its data, where it says none.

    Raises:
        InputError: it says one that is too small for them.
    """
    wanted, needed = config.model.get("vocab_size"), fusion_vocabulary(config, data)
    if wanted is None:
        wanted = needed
    elif isinstance(wanted, int) and wanted < needed:
        raise InputError(
            f"model.vocab_size={wanted}: the data have token ids up to {needed - 1}; must be null or "
            f"a number >= {needed}"
        )
    return from_mapping(DecoderConfig, {**config.model, "vocab_size": wanted}, "model")


def _require_sound(config: RunConfig) -> None:
    """Refuse what is wrong whatever the data are."""
    model = _checked_model(config)
    require_memory_of_run(config, model)
    if (distillation := config.distillation) is not None:
        overridden = teacher_mapping(to_mapping(model), distillation.teacher_model)
        from_mapping(DecoderConfig, overridden, "distillation.teacher_model")
        require_paths(distillation)
    require_accelerator("trainer.accelerator", config.trainer.accelerator)
    _require_fp8(config)
    require_loggers(config.logger)
    if to_mapping(config.trainer) != to_mapping(TrainerConfig()):
        options = {**trainer_options(config), "accelerator": config.trainer.accelerator}
        require_options({name: value for name, value in options.items() if (name, value) != ("precision", "auto")})
    require_same_batches(config)


def _checked_model(config: RunConfig) -> DecoderConfig:
    """The model, with a vocabulary of 1 until the data say: shapes are checked before any data is read."""
    model = {**config.model}
    if model.get("vocab_size") is None:
        model["vocab_size"] = 1
    return from_mapping(DecoderConfig, model, "model")


def _require_processes(config: RunConfig, model: DecoderConfig, callbacks: list[Callback]) -> None:
    """Refuse a number of processes that cannot share the model or the batch."""
    number = processes(to_mapping(config.trainer))
    if config.fusion is not None and is_sharded(config.trainer.strategy, config.parallel, number):
        raise InputError(
            f"parallel.shard={config.parallel.shard}: must be false with fusion, as an encoder is not sharded; "
            f"each of the {number} processes then has a copy of the model"
        )
    if number > 1:
        require_meeting(is_first=rank() == 0)
    for name in ("expert", "tensor"):
        if (degree := getattr(config.parallel, name)) > 1 and config.trainer.strategy != "auto":
            raise InputError(
                f"trainer.strategy={config.trainer.strategy!r}: must be auto with parallel.{name}={degree}"
            )
    require_precision(config.parallel, config.trainer.precision)
    require_degrees(config.parallel, number, config.training.batch_size, model)
    if config.distillation is not None and config.distillation.source == "joint":
        teacher = from_mapping(DecoderConfig, teacher_mapping(to_mapping(model), config.distillation.teacher_model))
        parallel = config.parallel
        if all(layer.ffn != "moe" for layer in teacher.layers):  # it has no experts, though the student may
            parallel = dataclasses.replace(parallel, expert=1)
        require_degrees(parallel, number, config.training.batch_size, teacher, "distillation.teacher_model")
    sharded = is_sharded(config.trainer.strategy, config.parallel, number)
    if sharded and any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise InputError(
            f"callbacks: an average of the weights, with {number} processes; must be left out, or parallel.shard=false"
        )


def _require_fp8(config: RunConfig) -> None:
    """Refuse FP8 that cannot run here; of an accelerator that is there."""
    moe, accelerator = config.model.get("moe"), config.trainer.accelerator
    if config.trainer.precision == "fp8":
        if isinstance(moe, dict) and moe.get("experts") == "clamped_swiglu":
            raise InputError(
                "trainer.precision='fp8': must be another with model.moe.experts=clamped_swiglu, for whose biases FP8 "
                "products have no place"
            )
        plan_fp8(config.trainer)
    elif isinstance(moe, dict) and moe.get("backend") == "fp8" and accelerator in ("cpu", "mps"):
        raise InputError(
            f"model.moe.backend='fp8': trainer.accelerator={accelerator!r} has no FP8; must be fp8_emulated, or "
            "another accelerator"
        )


def _settle(config: RunConfig) -> None:
    """Set what holds for the whole process: memory, threads, random generators."""
    if config.trainer.keep_freed_memory:
        keep_freed_memory()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
        if not is_one_process(to_mapping(config.trainer)):  # else Lightning gives each rank its share of the cores
            os.environ["OMP_NUM_THREADS"] = str(config.trainer.threads)
    pl.seed_everything(config.seed, verbose=False)


def _read_data(config: RunConfig, start: Start, console: Console) -> Data:
    if config.data.make_task() is None:
        console.print(
            f"reading {config.data.source} data (the first time they are tokenized and cached)", highlight=False
        )
    tokenizer: Tokenizer | None = None
    if config.fusion is not None:
        tokenizer = fusion_tokenizer(config, start)
    elif start.kind != "fresh" and config.extend_context is not None:
        tokenizer = checkpoint_tokenizer(str(start.path), start.checkpoint, config.data)
    elif start.kind in ("continued", "weights", "upcycled"):
        tokenizer = tokenizer_to_keep(str(start.path), start.checkpoint, config.data)
    elif config.distillation is not None:
        tokenizer = students_tokenizer(config.distillation, config.data)
    data = load_data(config.data, tokenizer)
    if start.run_dir is not None:
        require_same_data(start.run_dir / "environment.json", data)
    return data


def _require_fitting(config: RunConfig, model: DecoderConfig, start: Start, data: Data) -> Stretches | None:
    """Refuse a checkpoint of another model; of a run that extends the context, choose the text of the comparison."""
    if start.kind in ("fresh", "upcycled"):  # what is upcycled is compared when it is made
        return None
    path, checkpoint, extends = str(start.path), start.checkpoint, config.extend_context
    if extends is None:
        require_same_model(path, checkpoint, model)
        require_same_distillation(path, checkpoint, config, model)
        require_same_optimizer(path, checkpoint, config)
        if start.kind == "continued":
            require_steps_left(path, checkpoint, config)
            require_all_batches(path, checkpoint, config)
        return None
    require_extendable(path, checkpoint, model)
    first = checkpoint if start.run_dir is None else load_checkpoint(start_of(start.run_dir))
    before = first["hyper_parameters"]["config"]["training"]["seq_len"]
    return open_stretches(extends, data.validation, data.tokenizer, (before, config.training.seq_len))


def _choose_precision(config: RunConfig, model: DecoderConfig) -> tuple[RunConfig, str]:
    if config.trainer.precision == "fp8":
        return config, plan_fp8(config.trainer).why
    if config.trainer.precision != "auto":
        return config, ""
    precision, why = choose_precision(model, config.training, config.trainer.accelerator)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=precision)), why


def _open_targets(config: RunConfig, model: DecoderConfig, start: Start, data: Data) -> OpenedTargets | None:
    if config.distillation is None or config.distillation.source == "joint":
        return None
    opened = open_targets(config.distillation, data, vocab_size=model.vocab_size, seq_len=config.training.seq_len)
    if start.run_dir is not None:
        require_same_teacher(opened, start.run_dir / "environment.json")
    return opened


def _require_room(config: RunConfig, model: DecoderConfig) -> Account:
    """Refuse a disk without room for the checkpoints, before anything is written on it."""
    accounted = account(model, config.training.seq_len)
    parameters = accounted.parameters
    if config.distillation is not None and config.distillation.source == "joint":
        teacher = teacher_mapping(to_mapping(model), config.distillation.teacher_model)
        parameters += account(from_mapping(DecoderConfig, teacher), config.training.seq_len).parameters
    bytes_of_one = 3 * 4 * parameters  # weights and two moments
    require_disk_space(Path(config.run_dir or config.output_dir), 3 * bytes_of_one + 20_000_000)  # one is being written
    return accounted


def _claim_directory(found: Found, config: RunConfig, at_the_end: contextlib.ExitStack) -> Path:
    """The run directory, made if it is not there, and locked for this run."""
    if rank():
        # where somebody else started the ranks, none but the first knows the directory, or writes in it
        return found.run_dir or rank_run_dir() or Path(config.run_dir or config.output_dir)
    run_dir = found.run_dir or new_run_dir(config)
    if found.run_dir is None:
        _lock(run_dir, at_the_end)
        require_free(run_dir)  # somebody may have been faster
    if found.kind == "begun":
        clear_unstarted(run_dir)
    tell_ranks(run_dir)
    return run_dir


def _lock(run_dir: Path, at_the_end: contextlib.ExitStack) -> None:
    """Keep other runs out of a directory, and clear away what a killed one was writing."""
    if not rank():
        at_the_end.enter_context(lock(run_dir, busy(run_dir)))
        remove_partials(run_dir)


def _begin_records(
    run_dir: Path,
    config: RunConfig,
    model: DecoderConfig,
    start: Start,
    batches: RunBatches,
    targets: OpenedTargets | None,
) -> None:
    """Write what is known before training."""
    if start.run_dir is None:
        write_yaml(run_dir / "config.yaml", to_mapping(config))
    name = "environment.json" if start.run_dir is None else "environment-resumed.json"
    teacher = {} if targets is None else {"teacher": {"hash": targets.teacher_hash, "source": targets.description}}
    written = sources(model)
    hashes = {"sources": source_hashes(model)} if written else {}
    write_json(run_dir / name, {**environment(), "data": batches.facts, **teacher, **hashes})
    for source in written.values():
        (run_dir / "sources").mkdir(exist_ok=True)
        for module, file in source.files.items():
            write_atomically(run_dir / "sources" / f"{module}.py", file.read_text(encoding="utf-8"))


def new_run_dir(config: RunConfig) -> Path:
    """Make the directory that a config names, or a new one below its output_dir."""
    if config.run_dir is None:
        return create_run_dir(Path(config.output_dir), config.name)
    run_dir = Path(config.run_dir)
    make_folder(run_dir, "run_dir")
    return run_dir
