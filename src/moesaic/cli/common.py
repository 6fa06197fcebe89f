"""What the commands share: plain mappings from Hydra, and bad input reported without a traceback."""

import difflib
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moesaic.config import flatten
from moesaic.errors import InputError

__all__ = ["CONFIG_PATH", "exit_on_bad_input", "plain", "refuse_unknown_keys"]

CONFIG_PATH = str(Path(__file__).resolve().parents[3] / "conf")

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


def refuse_unknown_keys(config_name: str, arguments: Sequence[str]) -> None:
    """Say what is allowed where an override names no key; Hydra would only say that it is not there.

    Raises:
        InputError: for the first such override among `arguments` (a command line).
    """
    groups = {path.name for path in Path(CONFIG_PATH).iterdir() if path.is_dir()}
    chosen = [argument for argument in arguments if argument.partition("=")[0] in groups]
    for argument in chosen:
        group, _, value = argument.partition("=")
        if value in ("null", ""):
            names = ", ".join(sorted(path.stem for path in Path(CONFIG_PATH, group).glob("*.yaml")))
            raise InputError(f"{argument}: allowed: {names}")
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        try:
            config = compose(config_name, chosen)  # an experiment may give keys to a section that is null by default
        except HydraException:  # a sweep over experiments, or one that is not there, which Hydra says well
            config = compose(config_name)
    for argument in arguments:
        key, separator, _ = argument.partition("=")
        if key[:1] == "~" and key[1:] in config:
            raise InputError(f"{argument}: this key cannot be taken away; give it another value")
        added = key.lstrip("+").split(".")[0]
        if key[:1] == "+" and added not in config and added not in groups and not set("@/") & set(key):
            at_top = ", ".join(str(other) for other in config if str(other) != "hydra")
            raise InputError(f"{key.lstrip('+')}: unknown key; allowed: {at_top}")
        if not separator or key in groups or key[0] in "+~-" or key.split(".")[0] == "hydra" or "@" in key:
            continue
        section, name = config, key
        while "." in name and isinstance(section, DictConfig) and name.split(".")[0] in section:
            section, name = section[name.split(".")[0]], name.partition(".")[2]
        if not isinstance(section, DictConfig) or not section or name in section.keys():  # noqa: SIM118 (`in` hides required ones)
            continue  # below a value that is null by default: Hydra knows better
        prefix = key.removesuffix(name)
        allowed = [prefix + str(other) for other in section if str(other) != "hydra"]
        known = flatten(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]
        close = difflib.get_close_matches(key, [*allowed, *known], n=1, cutoff=0.85)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise InputError(f"{key}: unknown key{hint}; allowed: {', '.join(allowed)}")


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
