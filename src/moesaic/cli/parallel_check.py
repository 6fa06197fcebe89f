"""Compare trainings on several processes with one process: moesaic parallel-check [markdown=true].

Exits with 1 if a number deviates by more than rounding explains.
"""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from moesaic.cli.arguments import require_switches
from moesaic.cli.common import launch, plain
from moesaic.errors import InputError
from moesaic.parallel.workers import Workers
from moesaic.training.parallel_check import COLUMNS, LEFT_OUT, Compared, compare_all
from moesaic.training.parallel_trace import Trace, compare_traces

__all__ = ["main"]

MOST_STEPS = 10_000
HEADER = ("layout", "case", "precision", *COLUMNS)


def cells(compared: Compared) -> list[str]:
    """The row of a comparison."""
    largest = [max(compared.deviations[name] for name in names) for names in COLUMNS.values()]
    precision = compared.precision.removesuffix("-true")
    return [compared.layout, compared.case, f"fp{precision}", *(f"{each:.0e}" if each else "0" for each in largest)]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _task(config: DictConfig) -> None:
    given = plain(config)
    require_switches(given, "markdown")
    if type(given["trace"]) is not int or not 0 <= given["trace"] <= MOST_STEPS:
        raise InputError(f"trace={given['trace']!r}: must be a number of steps from 0 to {MOST_STEPS}")
    console = Console(emoji=False, stderr=True)
    found: list[Compared] = []
    traces: list[Trace] = []
    workers = Workers()
    try:
        for precision in ("64-true", "32-true") if given["trace"] else ():
            traces.append(compare_traces(workers, precision, given["trace"]))
            console.print(str(traces[-1]), markup=False, soft_wrap=True, style=None if traces[-1].holds else "red")
        for compared in compare_all(workers):
            found.append(compared)
            wrong = "".join(f" [red]{name} {each:.1e}[/]" for name, each in compared.exceeding.items())
            console.print(f"{compared.precision}  {compared.case}  {compared.layout}{wrong}", highlight=False)
    finally:
        workers.close()
    if given["markdown"]:
        print(markdown([cells(each) for each in found]))
    else:
        table = Table(*HEADER, title="largest differences from one process", title_justify="left")
        for each in found:
            table.add_row(*cells(each), style="bold red" if each.exceeding else None)
        Console(emoji=False, width=None if sys.stdout.isatty() else 140).print(table)
    pairs = "".join(f"; {case} with {layout}, as {why}" for (layout, case), why in LEFT_OUT.items())
    print(f"left out: pipeline and context parallelism, which runs do not have; GPUs{pairs}")
    sys.exit(any(each.exceeding for each in found) or not all(each.holds for each in traces))


def main(arguments: Sequence[str]) -> None:
    launch("parallel-check", arguments, _task)
