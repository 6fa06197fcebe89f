"""The YAML files behind a command, read as files: groups, their options and defaults, and the help made of them.

Neither Hydra nor torch is imported, so that help is there at once.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moesaic.checkout import CONFIG_DIR
from moesaic.cli import COMMANDS

__all__ = ["config_groups", "default_options", "help_text"]

FLAGS = """\
Flags:
  --config-dir DIR  also read your own files: DIR/experiment/mine.yaml is experiment=mine
  -m                run every combination of comma-separated values (key=1,2)
  --cfg job         print the composed config and stop
  --help            this page
Values follow Hydra's grammar: a text with special signs needs quotes inside quotes, as in 'key="a, b = c"'."""


def config_groups(*folders: Path) -> dict[str, list[str]]:
    """The config groups of Moesaic, and the options of each in these folders."""
    groups = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
    return {
        group: sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")}) for group in groups
    }


def default_options(config_name: str) -> dict[str, list[str]]:
    """The groups that a command's config composes, and the options of each by default."""
    found: dict[str, list[str]] = {}
    for entry in _defaults(config_name):
        if isinstance(entry, dict):
            [(group, options)] = entry.items()
            if not group.startswith("override "):
                found[group] = options if isinstance(options, list) else [options] if options else []
        elif entry != "_self_":
            found |= default_options(entry)
    return found


def help_text(name: str, arguments: Sequence[str] = ()) -> str:
    """What --help prints for a command; `arguments` may name the user's own --config-dir."""
    config_name = name.replace("-", "_")
    defaults = default_options(config_name)
    groups = config_groups(*filter(None, [CONFIG_DIR, _config_dir(arguments)]))
    lines = [
        COMMANDS[name].summary,
        "",
        " ".join(filter(None, ["Usage: moesaic", name, COMMANDS[name].usage, "[key=value ...]"])),
    ]
    for file in _composed_files(config_name):
        lines += ["", _explained(CONFIG_DIR / file)]
    if defaults:
        lines += ["", "Groups (group=option, the default in brackets):"]
        for group, chosen in defaults.items():
            names = ", ".join(f"[{name}]" if name in chosen else name for name in groups.get(group, []))
            lines.append(f"  {group:<11} {names}")
    for group, chosen in defaults.items():
        for option in (each for named in chosen for each in _with_bases(group, named)):
            title = f"Keys of {group}={option}, below {group}:"
            lines += ["", title, "", _explained(CONFIG_DIR / group / f"{option}.yaml")]
    return "\n".join([*lines, "", FLAGS])


def _with_bases(group: str, option: str) -> list[str]:
    """An option of a group, and those that it is a difference to."""
    bases = [base for base in _defaults(f"{group}/{option}") if isinstance(base, str) and base != "_self_"]
    return [option, *(each for base in bases for each in _with_bases(group, base))]


def _composed_files(config_name: str) -> list[str]:
    """A command's file, and those of other commands whose keys it takes too."""
    found = [f"{config_name}.yaml"]
    for entry in _defaults(config_name):
        if isinstance(entry, str) and entry not in ("_self_", "quiet"):
            found += _composed_files(entry)
    return found


def _defaults(config_name: str) -> list[Any]:
    text = (CONFIG_DIR / f"{config_name}.yaml").read_text(encoding="utf-8")
    found: list[Any] = (yaml.safe_load(text) or {}).get("defaults", [])
    return found


def _explained(file: Path) -> str:
    """A YAML file with its comments, without what only Hydra reads."""
    text = re.sub(r"^(defaults|hydra):\n(?:[ -].*\n|\n)*", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _config_dir(arguments: Sequence[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            return Path(value or " ".join(arguments[i + 1 : i + 2]))
    return None
