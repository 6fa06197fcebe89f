"""What the commands share: Hydra around a command, plain mappings, and bad input reported without a traceback."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moesaic.checkout import CONFIG_DIR
from moesaic.cli.arguments import (
    as_additions,
    check_overrides,
    complete,
    compose_with,
    read_flags,
    require_single_values,
)
from moesaic.cli.config_files import config_groups
from moesaic.errors import DISK_ERRORS, CannotWrite, InputError
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
    "typed",
    "users_config_dir",
]

OmegaConf.register_new_resolver("pid", os.getpid, replace=True)


class Prepared(list[str]):
    """A checked command line as Hydra takes it: flags, then key=value.

    Args:
        typed: what the user gave.
    """

    def __init__(self, arguments: Sequence[str], typed: Sequence[str]) -> None:
        super().__init__(arguments)
        self.typed = list(typed)


def prepare(name: str, arguments: Sequence[str]) -> Prepared:
    """Complete and check the arguments of a command, without torch; a bad one ends the process with one sentence."""

    def checked() -> Prepared:
        found, flags = read_flags(name, arguments)
        overrides = complete(name, found.overrides)
        if name in ("train", "study"):
            overrides = as_additions(overrides)
        if not (found.shell_completion or found.hydra_help or found.experimental_rerun):
            check_overrides(name.replace("-", "_"), overrides, found.config_dir)
            if not found.multirun:
                require_single_values(overrides)
        return Prepared([*flags, *overrides], arguments)

    prepared: Prepared = exit_on_bad_input(checked)
    return prepared


def launch(name: str, arguments: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """Run a command: prepare its arguments, let Hydra compose conf/<name>.yaml, call `task` with it."""
    prepared = arguments if isinstance(arguments, Prepared) else prepare(name, arguments)
    before, sys.argv = sys.argv, [f"moesaic {name}", *prepared]

    @functools.wraps(task)
    def guarded(config: DictConfig) -> None:
        sys.argv = before  # Hydra has read the other; Lightning repeats this command in the processes it starts

        def trusted_task() -> None:
            with trusting(config.get("trust")):
                task(config)

        exit_on_bad_input(trusted_task)

    config_name = name.replace("-", "_")
    try:
        command = hydra.main(config_path=str(CONFIG_DIR), config_name=config_name, version_base="1.3")(guarded)
        exit_on_bad_input(command)  # Hydra makes the folder of a sweep itself
    finally:
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
    try:
        return plain(compose_with(users_config_dir(), config_name, overrides))
    except HydraException as error:
        raise InputError(str(error).splitlines()[0]) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config without Hydra's or OmegaConf's types, and without `trust`, which `launch` has heard."""
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key != "trust"}


def exit_on_bad_input(action: Callable[[], Any]) -> Any:
    """Run `action`; what a person can mend ends the process with one line.

    The exit status is 2 for InputError, 1 for what cannot be written, and 128 + its number for a signal.
    """
    try:
        return action()
    except CannotWrite as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        print(f"error: {CannotWrite(error.filename or 'a file', error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print(f"interrupted ({error})" if str(error) else "interrupted", file=sys.stderr)
        sys.exit(exit_status(error))
