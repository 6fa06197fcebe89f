"""Run a ladder and report it: moesaic ladder experiment=ladder_NAME [workers=2] [key=value ...]

See conf/ladder.yaml. Runs that have a row in the results directory are not repeated. The same command continues what
was stopped.
"""

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from moesaic.cli.common import launch, options_of, plain, typed
from moesaic.cli.study import Place, console_of_command, require_names, tell_failed
from moesaic.config import from_mapping, to_mapping
from moesaic.data import DataConfig, load_data
from moesaic.errors import InputError
from moesaic.files import write_yaml
from moesaic.ladder.config import LadderConfig
from moesaic.ladder.cost import cost_of
from moesaic.ladder.dropping import dropped, kept, up_to_drop
from moesaic.ladder.points import require_corpus
from moesaic.ladder.prediction import LADDER, require_on_record, with_recorded
from moesaic.ladder.report import PICTURES, write_ladder_report
from moesaic.ladder.rungs import Rungs, require_fresh_tokens
from moesaic.overrides import command_line
from moesaic.studies.runner import read_rows

__all__ = ["ladder", "main"]


def ladder(config: dict[str, Any], command: str, console: Console | None = None) -> int:
    """Run what is missing of a composed config with a `ladder` block, then report; returns an exit status.

    Raises:
        InputError: bad configuration, data that are too small, or results of another ladder in the directory.
        KeyboardInterrupt: a signal; what has finished is kept.
    """
    console = console or console_of_command()
    require_names(config)
    if not isinstance(config["ladder"], dict) or config["ladder"].get("arms") is None:
        known = [name for name in options_of("experiment") if name.startswith("ladder_")]
        raise InputError(f"experiment: give a ladder; must be one of {', '.join(known)}")
    ladder_config = from_mapping(LadderConfig, config.pop("ladder"), "ladder")
    place = Place.of(config, "ladder")
    data = load_data(from_mapping(DataConfig, config["data"], "data"))
    ladder_config = with_recorded(ladder_config, place.results)
    rungs = Rungs(ladder_config, config, data.vocab_size)
    require_fresh_tokens(rungs.all, len(data.train.tokens), config["training"]["seq_len"])
    study, base = rungs.study()
    rows = read_rows(place.results, study, base)
    require_corpus(rows, data.facts, str(place.results / "rows.jsonl"))
    require_on_record(place.results, ladder_config)
    out = dropped(ladder_config, study, rows)
    timed: dict[tuple[str, int], float] = {}
    console.print("counting what is left to run; a few steps are timed of models that have not run yet")
    cost = cost_of(rungs, kept(study, out), base, rows, timed)
    most = "" if ladder_config.drop is None or out else ", less what the dropped arms would take"
    console.print(cost.told(place.workers) + most, markup=False, highlight=False, soft_wrap=True)
    failed = {}
    if ladder_config.drop is not None:
        first = up_to_drop(ladder_config, study)
        estimate = cost_of(rungs, first, base, rows, timed).seconds(place.workers)
        failed = place.run(first, base, command, console, estimate)
        rows = read_rows(place.results, study, base)
        out = dropped(ladder_config, study, rows)
        for arm, why in out.items():
            console.print(f"{arm}: {why}", markup=False, highlight=False, soft_wrap=True)
    if not failed:
        rest = kept(study, out)
        estimate = cost_of(rungs, rest, base, rows, timed).seconds(place.workers)
        failed = place.run(rest, base, command, console, estimate)
    if rows := read_rows(place.results, study, base):
        write_yaml(place.results / LADDER, {"ladder": to_mapping(ladder_config), "vocab_size": data.vocab_size})
        arguments = (ladder_config, study, rungs.all, rows, place.results, config["name"], command, console)
        write_ladder_report(*arguments, leaks=rungs.leaks)
        made = ("rows.jsonl", "table.md", "summary.json", *PICTURES)
        console.print(f"written: {place.results}/{', '.join(made)}", markup=False, highlight=False, soft_wrap=True)
    return tell_failed(failed, console)


def main(arguments: Sequence[str]) -> None:
    def task(config: DictConfig) -> None:
        sys.exit(ladder(plain(config), command_line("ladder", *typed(arguments))))

    launch("ladder", arguments, task)
