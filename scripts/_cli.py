"""What the scripts share: plain mappings from Hydra, and bad input reported without a traceback."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moesaic.errors import InputError

CONFIG_PATH = str(Path(__file__).resolve().parent.parent / "conf")

OmegaConf.register_new_resolver("pid", os.getpid, replace=True)
sys.path.insert(0, str(Path.cwd()))  # own parts named by dotted path are found where you stand


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config without Hydra's or OmegaConf's types."""
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def exit_on_bad_input(action: Callable[[], Any]) -> Any:
    """Run `action`; InputError ends the process with its message and status 2."""
    try:
        return action()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
