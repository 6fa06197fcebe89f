"""Two models side by side, and the width that makes them cost the same: moesaic compare a="..." b="..." """

import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from moesaic.cli.arguments import check_overrides, complete
from moesaic.cli.common import composed, launch, users_config_dir
from moesaic.config import from_mapping
from moesaic.data import load_data
from moesaic.devices import require_accelerator
from moesaic.errors import InputError, naming
from moesaic.models import DecoderConfig, account
from moesaic.models.comparison import Candidate, count_costs, default_width, solve_width, time_steps, with_width
from moesaic.studies.sweep import write_report
from moesaic.training.config import RunConfig
from moesaic.training.lightning_options import as_additions
from moesaic.training.optimizers import build_optimizer
from moesaic.training.records import create_run_dir
from moesaic.training.run import fit_vocabulary, run

__all__ = ["compare", "main"]

QUANTITIES = {"active_flops": "forward_flops", "parameters": "parameters", "seconds": "step_seconds"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command takes itself; everything else on its command line is an override of both runs."""

    a: str
    b: str
    solve: Literal["active_flops", "parameters", "seconds"] | None = None
    width: Literal["model.hidden_dim", "model.moe.hidden_dim"] | None = None
    rounds: int = dataclasses.field(default=7, metadata={"most": 10**5})
    launch: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds={self.rounds}: must be a number >= 0")
        if self.solve == "seconds" and self.rounds == 0:
            raise ValueError("rounds=0: solve=seconds needs measured steps; must be a number >= 1")
        if self.width is not None and self.solve is None:
            raise ValueError(f"width={self.width}: nothing to solve; give solve=active_flops, parameters or seconds")


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Options, and the overrides for both."""
    names = [field.name for field in dataclasses.fields(Options)]
    overrides = OverridesParser.create().parse_overrides(complete("compare", arguments))
    given = {o.key_or_group: o.value() for o in overrides if o.key_or_group in names}
    return from_mapping(Options, given), [str(o.input_line) for o in overrides if o.key_or_group not in names]


def words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{name}={text!r}: {error}; must be key=value, separated by spaces") from error


def compose_run(overrides: Sequence[str]) -> dict[str, Any]:
    """The config of a run under these overrides. Both sides must have one precision: auto is fp32."""
    overrides = as_additions(overrides)
    check_overrides("train", overrides, users_config_dir())
    config = composed("train", overrides)
    if config["trainer"]["precision"] == "auto":
        config["trainer"]["precision"] = "32-true"
    return config


def arm_of(config: dict[str, Any], needs_data: bool = False) -> Candidate:
    """What is compared; with `needs_data` a vocabulary that the data do not fit is refused."""
    run_config = from_mapping(RunConfig, config)
    given = run_config.model["vocab_size"]
    # before any data is read
    model = from_mapping(DecoderConfig, {**run_config.model, "vocab_size": given or 1}, "model")
    if needs_data or not given:
        model = fit_vocabulary(run_config, load_data(run_config.data))
    return Candidate(
        model=model,
        batch_size=run_config.training.batch_size,
        seq_len=run_config.training.seq_len,
        optimizer=run_config.optimizer.name,
        make_optimizer=functools.partial(build_optimizer, config=run_config.optimizer),
        checkpoint_activations=run_config.trainer.checkpoint_activations,
    )


def compare(arguments: Sequence[str], console: Console) -> dict[str, Any]:
    """What is printed, as a mapping: costs of a and b, and of the solved b."""
    options, common = parse(arguments)
    overrides = {name: [*common, *words(name, getattr(options, name))] for name in ("a", "b")}
    configs = {}
    for name, found in overrides.items():
        with naming(name):
            configs[name] = compose_run(found)
            require_accelerator("trainer.accelerator", configs[name]["trainer"]["accelerator"])
    trainer = configs["a"]["trainer"]
    for key in ("accelerator", "threads"):
        if configs["b"]["trainer"][key] != trainer[key]:
            raise InputError(
                f"b: trainer.{key}={configs['b']['trainer'][key]!r}: a has {trainer[key]!r}; they are timed side by "
                "side, so give one for both"
            )
    on_gpu = trainer["accelerator"] in ("auto", "gpu") and torch.cuda.is_available()
    time_arms = functools.partial(time_steps, rounds=options.rounds, device="cuda" if on_gpu else "cpu")
    if trainer["threads"]:
        torch.set_num_threads(trainer["threads"])
    arms = {}
    for name, config in configs.items():
        with naming(name):
            arms[name] = arm_of(config, needs_data=options.launch)
    result: dict[str, Any] = {}
    if options.solve is not None:
        key = options.width or default_width(arms["b"].model)
        width, solved = solve(arms["a"], arms["b"], options.solve, key, time_arms)
        result |= {"width": key, "found": width}
        overrides["solved"] = [*overrides["b"], f"{key}={width}"]
        arms["solved"] = solved
    seconds = dict(zip(arms, time_arms(list(arms.values())), strict=True)) if options.rounds else {}
    for name, arm in arms.items():
        result[name] = {**dataclasses.asdict(count_costs(arm)), "step_seconds": seconds.get(name, math.nan)}
    console.print(table(result, f"{'a':6} {options.a}\n{'b':6} {options.b}"))
    if options.solve is not None:
        row = QUANTITIES[options.solve]
        ratio = result["solved"][row] / result["a"][row]
        console.print(f"solve={options.solve}: {key}={width}, where b / a is {ratio:.4f}", highlight=False)
    launched = {name: overrides[name] for name in ("a", "solved" if options.solve else "b")}
    for found in launched.values():
        console.print(shlex.join(["moesaic", "train", *found]), soft_wrap=True, highlight=False)
    if options.launch:
        directory = create_run_dir(Path(configs["a"]["output_dir"]), "compare")
        for name, found in launched.items():
            run({**compose_run(found), "run_dir": str(directory / name)}, console)
        console.print(write_report(directory), markup=False, soft_wrap=True)
        console.print(f"written: {directory}/report.md, report.csv, report.png", soft_wrap=True, highlight=False)
        result["directory"] = str(directory)
    return result


def solve(a: Candidate, b: Candidate, quantity: str, key: str, time_arms: Any) -> tuple[int, Candidate]:
    """The width of b at `key` that makes `quantity` equal to a's, and b at that width."""
    start = b.model.hidden_dim
    if key == "model.moe.hidden_dim" and b.model.moe is not None:
        start = b.model.moe.hidden_dim

    def at(width: int) -> Candidate:
        return dataclasses.replace(b, model=with_width(b.model, key, width))

    def over_a(width: int) -> float:
        ours, theirs = time_arms([a, at(width)])
        return theirs / ours

    def counted(arm: Candidate) -> float:
        return float(getattr(account(arm.model, arm.seq_len), QUANTITIES[quantity]))

    with naming(f"solve={quantity}" + (" (steps of a)" if quantity == "seconds" else "")):
        if quantity == "seconds":  # as a ratio, so that both are measured at the same time
            width, _ = solve_width(over_a, 1.0, start=start, most=16 * start, tolerance=0.02)
        else:
            width, _ = solve_width(lambda width: counted(at(width)), counted(a), start=start, most=1024 * start)
    return width, at(width)


SHOWN = {
    "parameters": ("parameters", 1, ",.0f"),
    "active_parameters": ("active parameters", 1, ",.0f"),
    "forward_flops": ("MFLOP per token, forward", 1e6, ",.3f"),
    "training_flops": ("MFLOP per token, training", 1e6, ",.3f"),
    "weight_bytes": ("MB of weights", 1e6, ",.2f"),
    "optimizer_bytes": ("MB of optimiser state", 1e6, ",.2f"),
    "activation_bytes": ("MB of activations", 1e6, ",.2f"),
    "step_seconds": ("ms per step, median", 1e-3, ",.2f"),
}


def table(result: dict[str, Any], title: str) -> Table:
    names = [name for name in ("a", "b", "solved") if name in result]
    headings = {"a": "a", "b": "b", "solved": f"b, {result.get('width')}={result.get('found')}"}
    made = Table(title=title, title_justify="left")
    made.add_column("")
    for name in names:
        made.add_column(headings[name], justify="right")
    made.add_column(f"{'last' if 'solved' in names else 'b'} / a", justify="right")
    for key, (label, unit, how) in SHOWN.items():
        values = [result[name][key] for name in names]
        if not math.isnan(values[0]):
            made.add_row(label, *(format(value / unit, how) for value in values), f"{values[-1] / values[0]:.3f}")
    return made


def _task(config: DictConfig) -> None:
    compare(HydraConfig.get().overrides.task, Console(width=None if sys.stdout.isatty() else 120))


def main(arguments: Sequence[str]) -> None:
    launch("compare", arguments, _task)
