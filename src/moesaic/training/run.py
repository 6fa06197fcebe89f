"""One run from config to verdict: prepare, fit, finish."""

import contextlib
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moesaic.data import Data
from moesaic.evaluation.plots import read_columns
from moesaic.files import write_json
from moesaic.imports import names_in, trust_argument, trusting
from moesaic.training.config import RunConfig
from moesaic.training.finish import FINISHERS, score_run
from moesaic.training.fit import Fitted, build, fit
from moesaic.training.launched import rank
from moesaic.training.module import LanguageModel
from moesaic.training.optimizers import describe_groups
from moesaic.training.prepare import Prepared, fit_vocabulary, prepare
from moesaic.training.starting import resolve_resume
from moesaic.training.summary import activation_bytes, describe_teacher, print_summary, print_verdict

__all__ = ["fit_vocabulary", "resolve_resume", "run"]


def run(config: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Train as `config` (a plain mapping, see `RunConfig`) says; returns what metrics.json holds.

    Everything that can be refused is refused before the run directory exists. Where Lightning starts more processes,
    the one of rank 0 evaluates and writes; the others return their status alone.

    Raises:
        InputError: bad configuration, data or checkpoint.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 120, quiet=rank() > 0)
    with trusting(names_in(config)), contextlib.ExitStack() as at_the_end:
        prepared = prepare(config, console, at_the_end)
        module = build(prepared)
        _show_plan(prepared, module, console)
        fitted = fit(prepared, module, console)
        return _finish(fitted, console)


def _finish(fitted: Fitted, console: Console) -> dict[str, Any]:
    """Evaluate, draw, write metrics.json and print the verdict."""
    prepared, trainer = fitted.prepared, fitted.trainer
    if fitted.status["status"] == "finished":  # one that was stopped saved the state from which it can go on
        trainer.save_checkpoint(prepared.run_dir / "checkpoints" / "last.ckpt")
    if not trainer.is_global_zero:
        return fitted.status
    metrics = _cost(fitted)
    if fitted.has_verdict:
        finished = score_run(fitted, console)
        for finisher in FINISHERS:
            metrics |= finisher(finished)
    metrics |= _suggested_rates(fitted, console)
    metrics["peak_memory_bytes"] = _peak_memory()
    write_json(prepared.run_dir / "metrics.json", metrics)
    text = prepared.run_dir / "sample.txt"
    print_verdict(
        console,
        prepared.run_dir,
        metrics,
        prepared.data.facts.get("baselines", {}),
        text.read_text(encoding="utf-8") if fitted.has_verdict and text.exists() else None,
        _next_commands(prepared.run_dir, prepared.config, metrics),
    )
    return metrics


def _show_plan(prepared: Prepared, module: LanguageModel, console: Console) -> None:
    config, training = prepared.config, prepared.config.training
    print_summary(
        console,
        config,
        prepared.model,
        module.account,
        prepared.data.facts,
        _num_tokens(config, prepared.data),
        activation_bytes(module.decoder, training.batch_size, training.seq_len),
        prepared.run_dir,
        None if config.distillation is None else describe_teacher(prepared.targets, module.teacher_account),
    )
    assumed = [part for layer in module.account.layers for part in layer.assumed]
    if assumed:
        said = f"FLOPs of {', '.join(dict.fromkeys(assumed))}: two per element of every matrix, as it could not be run"
        console.print(f"[bold]assumed[/] {said}", highlight=False, soft_wrap=True)
    for line in describe_groups(module.decoder, config.optimizer).splitlines():
        console.print(f"[bold]steps[/]   {line}", highlight=False, soft_wrap=True)
    if prepared.why_precision:
        console.print(f"[bold]trainer[/] {config.trainer.precision}: {prepared.why_precision}", highlight=False)


def _num_tokens(config: RunConfig, data: Data) -> dict[str, int]:
    """Tokens of both splits; a recall task draws every training sequence once."""
    if data.task is None:
        return {"train": len(data.train.tokens), "validation": len(data.validation.tokens)}
    training = config.training
    return {
        "train": training.steps * training.accumulate * training.batch_size * training.seq_len,
        "validation": data.task.test_sequences * (training.validation_seq_len or training.seq_len),
    }


def _cost(fitted: Fitted) -> dict[str, Any]:
    """How the run ended, how long it was, and what it took."""
    prepared, module, trainer = fitted.prepared, fitted.module, fitted.trainer
    training = prepared.config.training
    tokens = trainer.global_step * training.batch_size * training.seq_len * training.accumulate * trainer.world_size
    return {
        **fitted.status,
        "steps": trainer.global_step,
        "tokens": tokens,
        "seconds": module.log_book.seconds,
        "tokens_per_second": module.log_book.tokens_per_second,
        "active_flops": tokens * module.account.training_flops,
        "parameters/total": module.account.parameters,
        "parameters/active": module.account.active_parameters,
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


def _next_commands(run_dir: Path, config: RunConfig, metrics: Mapping[str, Any]) -> list[str]:
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    trust = trust_argument(names_in(config.model))
    board = f"tensorboard --logdir {config.output_dir}"
    if metrics["status"] == "stopped":
        return [f"moesaic train resume=true run_dir={run_dir}{trust}", board]
    if config.data.make_task() is not None:
        sweep = f"moesaic train -m experiment=recall data={config.data.source} seed=0,1,2"
        mixers = "model.nope_layer_interval=0,1,2 model.attention.attention_chunk_size=null"
        return [f"{sweep} {mixers}   # positions in all layers, in none, in every second", board]
    return [
        f"moesaic generate {checkpoint} 'import os'{trust}",
        board,
        "moesaic train -m model.dense_twin=false,true seed=0,1,2   # is the mixture worth it?",
    ]


def _peak_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
