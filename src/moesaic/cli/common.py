"""What the commands share: Hydra around a command, plain mappings, and bad input reported without a traceback."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moesaic.checkout import CONFIG_DIR
from moesaic.cli.arguments import (
    as_additions,
    check_overrides,
    complete,
    compose_with,
    composing,
    in_one_line,
    read_flags,
    require_candidate,
    require_single_values,
    require_text,
)
from moesaic.cli.config_files import config_groups
from moesaic.errors import DISK_ERRORS, CannotWrite, InputError, LostProcess, reason
from moesaic.imports import trusting
from moesaic.interrupts import exit_status

__all__ = [
    "Prepared",
    "composed",
    "exit_on_bad_input",
    "launch",
    "options_of",
    "plain",
    "prepare",
    "printable",
    "typed",
    "users_config_dir",
]

FULL_ERROR = "HYDRA_FULL_ERROR"
"""Environment variable that lets Hydra raise what it finds wrong."""


class Prepared(list[str]):
    """A checked command line as Hydra takes it: flags, then key=value.

    Args:
        typed: what the user gave.
        only_shows: a flag such as --cfg asks Hydra for a page instead of the command.
    """

    def __init__(self, arguments: Sequence[str], typed: Sequence[str], only_shows: bool = False) -> None:
        super().__init__(arguments)
        self.typed = list(typed)
        self.only_shows = only_shows


def prepare(name: str, arguments: Sequence[str]) -> Prepared:
    """Complete and check the arguments of a command, without torch; a bad one ends the process with one sentence."""

    def checked() -> Prepared:
        require_text(arguments)
        found, flags = read_flags(name, arguments)
        overrides = complete(name, found.overrides)
        if name in ("train", "study", "ladder"):
            overrides = as_additions(overrides)
        if name == "compare" and not found.cfg:
            require_candidate(overrides, found.multirun)
        if not (found.shell_completion or found.hydra_help or found.experimental_rerun):
            check_overrides(name.replace("-", "_"), overrides, found.config_dir)
            if not found.multirun:
                require_single_values(overrides)
        only_shows = bool(found.cfg or found.info or found.hydra_help or found.shell_completion)
        return Prepared([*flags, *overrides], arguments, only_shows)

    prepared: Prepared = exit_on_bad_input(checked)
    return prepared


def launch(name: str, arguments: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """Run a command: prepare its arguments, let Hydra compose conf/<name>.yaml, call `task` with it.

    Hydra's sweepers get what `task` returns, its launchers may call it in other processes.
    """
    prepared = arguments if isinstance(arguments, Prepared) else prepare(name, arguments)
    before, sys.argv = sys.argv, [f"moesaic {name}", *prepared]

    @functools.wraps(task)
    def guarded(config: DictConfig) -> Any:
        sys.argv = before  # Hydra has read the other; Lightning repeats this command in the processes it starts

        def trusted_task() -> Any:
            with composing():
                found = config.get("trust")
                names = list(found) if isinstance(found, ListConfig) else found
            with trusting(names):
                return task(config)

        return exit_on_bad_input(trusted_task)

    config_name = name.replace("-", "_")
    command = hydra.main(config_path=str(CONFIG_DIR), config_name=config_name, version_base="1.3")(guarded)

    def composed_task() -> None:
        with composing():
            command()

    said = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # else Hydra prints what is wrong over many lines, and ends the process with 1
    try:
        exit_on_bad_input(composed_task)  # Hydra makes the folder of a sweep itself
    finally:
        os.environ.pop(FULL_ERROR) if said is None else os.environ.update({FULL_ERROR: said})
        sys.argv = before
        HydraConfig.instance().cfg = None


def typed(arguments: Sequence[str]) -> list[str]:
    """What the user gave to a command, also where it is prepared already."""
    return arguments.typed if isinstance(arguments, Prepared) else list(arguments)


def users_config_dir() -> Path | None:
    """The folder that the running command was given as --config-dir."""
    if not HydraConfig.initialized():
        return None
    sources = HydraConfig.get().runtime.config_sources
    return next((Path(source.path) for source in sources if source.provider == "command-line"), None)


def options_of(group: str) -> list[str]:
    """The options of a config group, the user's own among them."""
    return config_groups(*filter(None, [CONFIG_DIR, users_config_dir()]))[group]


def composed(config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A config under overrides as a plain mapping, with the user's own --config-dir.

    Raises:
        InputError: Hydra cannot compose it.
    """
    return plain(compose_with(users_config_dir(), config_name, overrides))


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config without Hydra's or OmegaConf's types, and without `trust`, which `launch` has heard."""
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(in_one_line(error)) from error
    except RecursionError as error:
        raise InputError("a value is an interpolation of itself, which must not be") from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key != "trust"}


def printable(message: object) -> str:
    """A message in one line, whose names of files and keys of strangers tell the terminal nothing."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(message))


def exit_on_bad_input(action: Callable[[], Any]) -> Any:
    """Run `action`; what a person can mend ends the process with one line.

    The exit status is 2 for InputError, 1 for what cannot be written and for a run of which a process was lost, and
    128 + its number for a signal.
    """
    try:
        return action()
    except (CannotWrite, LostProcess) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(1)
    except InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        whole = error.errno in DISK_ERRORS  # else it may have been read
        text = CannotWrite(error.filename or "a file", error) if whole else f"{error.filename}: {reason(error)}"
        print(f"error: {printable(text)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"interrupted ({error})" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(exit_status(error))
