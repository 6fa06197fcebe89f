"""What the commands share: Hydra around a command, plain mappings, and bad input reported without a traceback."""

import errno
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
from moesaic.cli.arguments import check_overrides, complete, compose_with, read_flags
from moesaic.cli.config_files import config_groups
from moesaic.errors import InputError
from moesaic.imports import trusting

__all__ = ["composed", "exit_on_bad_input", "launch", "options_of", "plain", "users_config_dir"]

OmegaConf.register_new_resolver("pid", os.getpid, replace=True)


def launch(name: str, arguments: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """Run a command: complete and check its arguments, let Hydra compose conf/<name>.yaml, call `task` with it."""

    def prepare() -> list[str]:
        words = complete(name, arguments)
        flags = read_flags(words)
        if not (flags.shell_completion or flags.hydra_help or flags.experimental_rerun):
            check_overrides(config_name, flags.overrides, flags.config_dir)
        return words

    config_name = name.replace("-", "_")
    before, sys.argv = sys.argv, [f"moesaic {name}", *exit_on_bad_input(prepare)]

    @functools.wraps(task)
    def guarded(config: DictConfig) -> None:
        sys.argv = before  # Hydra has read the other; Lightning repeats this command in the processes it starts

        def trusted_task() -> None:
            with trusting(config.get("trust")):
                task(config)

        exit_on_bad_input(trusted_task)

    try:
        hydra.main(config_path=str(CONFIG_DIR), config_name=config_name, version_base="1.3")(guarded)()
    finally:
        sys.argv = before
        HydraConfig.instance().cfg = None


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
    """Run `action`; InputError ends the process with its message and status 2, a full disk with 1, Ctrl-C with 130."""
    try:
        return action()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
