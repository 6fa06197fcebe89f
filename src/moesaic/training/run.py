"""One run from config to verdict: prepare, fit, finish."""

import contextlib
import math
import shlex
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moesaic.config import to_mapping
from moesaic.data import Data
from moesaic.errors import CannotWrite, InputError, LostProcess
from moesaic.evaluation.extension import keep_start
from moesaic.evaluation.plots import read_columns
from moesaic.files import standing, write_json
from moesaic.imports import names_in, trust_argument, trusting
from moesaic.interrupts import ignoring_warnings
from moesaic.overrides import command_line, for_shell, override
from moesaic.reading import read_json
from moesaic.training.config import RunConfig
from moesaic.training.finish import FINISHERS, PRESENTING
from moesaic.training.fit import Fitted, fit, shown_loggers
from moesaic.training.fusion_finish import finishers_of, score_any
from moesaic.training.fusion_stages import run_stages
from moesaic.training.launched import is_lost, processes, rank, settle_rank
from moesaic.training.module import LanguageModel
from moesaic.training.optimizers import describe_groups
from moesaic.training.peak_memory import forget_peak_memory, peak_memory
from moesaic.training.prepare import Prepared, fit_vocabulary, prepare
from moesaic.training.spent import routed_numbers
from moesaic.training.starting import COMPONENTS, Found, find_run, has_score, is_finished
from moesaic.training.summary import activation_bytes, describe_teacher, print_summary, print_verdict

__all__ = ["find_run", "fit_vocabulary", "next_commands", "run", "run_found"]


def run(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Train as `config` (a plain mapping, see `RunConfig`) says; see `run_found`."""
    return run_found(find_run(config), console)


def run_found(found: Found, console: Console | None = None) -> dict[str, Any]:
    """Train what `find_run` found; returns what metrics.json holds.

    Everything that can be refused is refused before the run directory exists. Where Lightning starts more processes,
    the one of rank 0 evaluates and writes; the others return their status alone.

    Raises:
        InputError: bad configuration, data or checkpoint.
        CannotWrite: a full or read-only disk.
        Interrupted: a signal. The state is saved if it came during training.
    """
    trainer = found.config.get("trainer")
    settle_rank(trainer if isinstance(trainer, Mapping) else {})
    console = console or Console(emoji=False, width=None if sys.stdout.isatty() else 120, quiet=rank() > 0)
    if found.kind == "finished":
        return _tell_finished(found, console)
    if found.config.get("fusion"):
        found, ended = run_stages(found, console, run_found)
        if ended:
            return ended
    with trusting(names_in(found.config)), contextlib.ExitStack() as at_the_end, ignoring_warnings():
        forget_peak_memory()
        prepared = prepare(found, console, at_the_end)
        at_the_end.enter_context(_recorded(prepared.run_dir, prepared.config, console))
        if prepared.start.kind == "extended" and not rank():
            keep_start(prepared.run_dir, prepared.start.checkpoint)
        _show_plan(prepared, prepared.module, console)
        fitted = fit(prepared, prepared.module, console)
        return _finish(fitted, console)


def _tell_finished(found: Found, console: Console) -> dict[str, Any]:
    assert found.run_dir is not None  # a finished run is somewhere
    metrics: dict[str, Any] = read_json(found.run_dir / "metrics.json")
    checkpoint = found.run_dir / "checkpoints" / "last.ckpt"
    console.print(
        f"run_dir={str(found.run_dir)!r}: this run is finished, at step {metrics.get('steps')}; to train on, start a "
        f"new one with {for_shell(override('ckpt_path', checkpoint))} and more training.steps",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return metrics


@contextlib.contextmanager
def _recorded(run_dir: Path, config: RunConfig, console: Console) -> Iterator[None]:
    """Write in metrics.json what ended a run before its end, and say how it goes on. A finished run stays finished."""
    try:
        yield
    except BaseException as error:
        told = LostProcess(f"another process of this run has ended ({_first_line(error)})") if is_lost(error) else error
        if not rank() and not is_finished(run_dir):
            _record(run_dir, config, told, console)
        if told is not error:
            raise told from error
        raise


def _record(run_dir: Path, config: RunConfig, error: BaseException, console: Console) -> None:
    was_interrupted = isinstance(error, KeyboardInterrupt)
    status = {"status": "interrupted" if was_interrupted else "failed", "error": f"{type(error).__name__}: {error}"}
    # what is refused leaves what is there; resume=true makes what is pending
    is_refused = isinstance(error, InputError) and (run_dir / "metrics.json").exists()
    if not is_refused and not has_score(run_dir):
        with contextlib.suppress(CannotWrite):
            write_json(run_dir / "metrics.json", status)
    saved = standing(run_dir / "checkpoints" / "last.ckpt").exists()
    how = "continue from the last checkpoint" if saved else "begin again, as there is no checkpoint yet"
    if was_interrupted or isinstance(error, (CannotWrite, LostProcess)):
        console.print(f"{status['status']}; to {how}:", highlight=False)
        command = resume_command(run_dir, config)
        console.print(f"  {command}", markup=False, soft_wrap=True, highlight=False)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _finish(fitted: Fitted, console: Console) -> dict[str, Any]:
    """Evaluate, draw, write metrics.json and print the verdict. Once the score is there, nothing may cost it."""
    prepared, trainer, run_dir = fitted.prepared, fitted.trainer, fitted.prepared.run_dir
    if fitted.status["status"] == "finished":  # one that was stopped saved the state from which it can go on
        trainer.save_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    if fitted.has_verdict:
        fitted.module.make_whole()
    if not trainer.is_global_zero:
        return fitted.status
    metrics = _cost(fitted) | _suggested_rates(fitted, console)
    if fitted.has_verdict:
        finished = score_any(fitted, console)
        presents, finishers = prepared.config.finish == "all", finishers_of(prepared.config, FINISHERS)
        for i, finisher in enumerate(each for each in finishers if presents or each not in PRESENTING):
            with _surviving(finisher.__name__, metrics):
                metrics |= finisher(finished)
            if i == 0:  # the score is there
                metrics |= _divergence(metrics)
                write_json(run_dir / "metrics.json", {**metrics, "pending": "pictures and text"})
    metrics["peak_memory_bytes"] = peak_memory()
    write_json(run_dir / "metrics.json", metrics)
    text = run_dir / "sample.txt"
    with _surviving("print_verdict", metrics):
        print_verdict(
            console,
            run_dir,
            metrics,
            prepared.data.facts.get("baselines", {}),
            text.read_text(encoding="utf-8") if fitted.has_verdict and text.is_file() else None,
            next_commands(run_dir, prepared.config, metrics),
        )
    return metrics


def _divergence(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What to say of a run whose score is no finite number, though every gradient was one."""
    loss = metrics.get("validation/loss", 0.0)
    return {} if math.isfinite(loss) else {"status": "diverged", "error": f"validation/loss is {loss}"}


@contextlib.contextmanager
def _surviving(what: str, metrics: dict[str, Any]) -> Iterator[None]:
    """Turn a failure within into a warning, which is kept among those of the run."""
    try:
        yield
    except Exception as error:
        message = f"after training, {what} failed: {type(error).__name__}: {error}"
        metrics["warnings"] = [*metrics["warnings"], message]
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _show_plan(prepared: Prepared, module: LanguageModel, console: Console) -> None:
    config, training = prepared.config, prepared.config.training
    accounted = prepared.account
    ranks = processes(to_mapping(config.trainer))
    print_summary(
        console,
        config,
        prepared.model,
        accounted,
        prepared.data.facts,
        _num_tokens(config, prepared.data),
        activation_bytes(module.decoder, training.batch_size // ranks, training.seq_len),
        prepared.run_dir,
        None if config.distillation is None else describe_teacher(prepared.targets, module.teacher_account),
    )
    if module.beside is not None:
        console.print(f"[bold]encoder[/] {module.beside}", highlight=False, soft_wrap=True)
    assumed = [part for layer in accounted.layers for part in layer.assumed]
    if assumed:
        said = f"FLOPs of {', '.join(dict.fromkeys(assumed))}: two per element of every matrix, as it could not be run"
        console.print(f"[bold]assumed[/] {escape(said)}", highlight=False, soft_wrap=True)
    for line in describe_groups(module.trained, config.optimizer_at_scale()).splitlines():
        console.print(f"[bold]steps[/]   {escape(line)}", highlight=False, soft_wrap=True)
    if prepared.why_precision:
        console.print(f"[bold]trainer[/] {config.trainer.precision}: {prepared.why_precision}", highlight=False)


def _num_tokens(config: RunConfig, data: Data) -> dict[str, int]:
    """Tokens of both splits; a task draws every training sequence once, unless it has facts that come again."""
    if data.task is None:
        return {"train": len(data.train.tokens), "validation": len(data.validation.tokens)}
    training = config.training
    seq_len = training.validation_seq_len or training.seq_len
    facts = data.task.answer_bits is not None
    return {
        "train": data.task.test_size(training.seq_len) * training.seq_len
        if facts
        else training.steps * training.tokens_per_step,
        "validation": data.task.test_size(seq_len) * seq_len,
    }


def _cost(fitted: Fitted) -> dict[str, Any]:
    """How the run ended, how long it was, and what it took."""
    prepared, module, trainer = fitted.prepared, fitted.module, fitted.trainer
    accounted, step = prepared.account, trainer.global_step
    return {
        **fitted.status,
        "steps": step,
        "tokens": module.progress.tokens(step),
        "seconds": module.log_book.seconds,
        "tokens_per_second": module.log_book.tokens_per_second,
        "active_flops": module.active_flops,
        **routed_numbers(
            module.decoder,
            prepared.run_dir / "metrics.csv",
            module.progress.tokens(step),
            prepared.config.training.seq_len,
            module.active_flops,
        ),
        "parameters/total": accounted.parameters,
        "parameters/active": accounted.active_parameters,
        **_teacher_cost(module),
        **_last_distillation(prepared.run_dir / "metrics.csv"),
        "warnings": fitted.warnings,
    }


def _teacher_cost(module: LanguageModel) -> dict[str, float]:
    """What to add to the student's numbers; a teacher that is nowhere near (a complete cache) has no parameters."""
    if module.codistillation is None:
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


def _suggested_rates(fitted: Fitted, console: Console) -> dict[str, float]:
    """What a range test found, shown as the overrides to type."""
    if fitted.finder is None:
        return {}
    factor = fitted.finder.suggestion()
    if factor is None:
        console.print("[bold]rates[/]   the loss never fell in the range test: there is no suggestion")
        return {}
    optimizer = fitted.prepared.config.optimizer
    names = ["learning_rate", *(["muon_learning_rate"] if optimizer.name == "muon" else [])]
    rates = {f"optimizer.{name}": getattr(optimizer, name) * factor for name in names}
    overrides = " ".join(f"{key}={rate:.3g}" for key, rate in rates.items())
    console.print(f"[bold]rates[/]   the loss falls fastest at {factor:.3g}x: {overrides}", highlight=False)
    return {f"learning_rate_finder/{key}": rate for key, rate in {"factor": factor, **rates}.items()}


def resume_command(run_dir: Path, config: RunConfig) -> str:
    """The line that continues a run, with the trust that its own code needs."""
    names = names_in(to_mapping(config)) - set(COMPONENTS)
    return command_line("train", override("resume", True), override("run_dir", run_dir)) + trust_of(names)


def trust_of(names: Collection[str]) -> str:
    """The end of a line that reads a file with these dotted paths: " trust=[...]", quoted for a shell, or nothing."""
    argument = trust_argument(names).strip()
    return f" {shlex.quote(argument)}" if argument else ""


def next_commands(run_dir: Path, config: RunConfig, metrics: Mapping[str, Any]) -> list[str]:
    """Lines to paste after a run has ended like this."""
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    has_board = any(each["_target_"].endswith(".TensorBoardLogger") for each in shown_loggers(config).values())
    logdir = config.output_dir if run_dir.resolve().is_relative_to(Path(config.output_dir).resolve()) else str(run_dir)
    board = [shlex.join(["tensorboard", "--logdir", logdir])] if has_board else []
    if metrics["status"] == "stopped":
        return [resume_command(run_dir, config), *board]
    found = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith("learning_rate_finder/")}
    if factor := found.pop("factor", None):
        rates = (override(key, float(f"{rate:.3g}")) for key, rate in found.items())
        return [f"{command_line('train', *rates)}   # and your other keys: {factor:.3g}x the rates of this run", *board]
    if (made := config.data.make_task()) is not None and made.answer_bits is not None:
        twins = command_line("train", "-m", "experiment=biographies", "model.dense_twin=false,true", "seed=0,1,2")
        return [f"{twins}   # do experts that a token does not visit store facts?", *board]
    if made is not None:
        mixers = ("model.nope_layer_interval=0,1,2", "model.attention.attention_chunk_size=null")
        task = f"data={config.data.source}"
        sweep = command_line("train", "-m", "experiment=recall", task, "seed=0,1,2", *mixers)
        return [f"{sweep}   # positions in all layers, in none, in every second", *board]
    twins = command_line("train", "-m", "model.dense_twin=false,true", "seed=0,1,2")
    asked = ["import os"] if config.fusion is None else [override("image", "picture.png")]
    generate = command_line("generate", checkpoint, *asked) + trust_of(names_in(config.model))
    speaks = config.fusion is None or config.fusion.stage != "contrastive"  # there the decoder only reads names
    there = speaks and (metrics["status"] != "diverged" or checkpoint.exists())
    is_default = (config.name, config.data.source) == ("default", "stdlib")  # that line would run another experiment
    return [*([generate] if there else []), *board, *([f"{twins}   # is the mixture worth it?"] if is_default else [])]
