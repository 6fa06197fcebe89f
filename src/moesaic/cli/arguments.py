"""A command line before Hydra reads it: words become key=value, and an unknown key or option is answered by name."""

import argparse
import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moesaic.checkout import CONFIG_DIR
from moesaic.cli import COMMANDS
from moesaic.cli.config_files import config_groups, default_options
from moesaic.cli.synonyms import COMMAND_OF, OPTIONS, key_known_as
from moesaic.config import flatten
from moesaic.errors import InputError, naming, require_short
from moesaic.overrides import for_shell, override, quoted
from moesaic.reading import reading

__all__ = [
    "as_additions",
    "check_overrides",
    "complete",
    "compose_with",
    "composing",
    "did_you_mean",
    "in_one_line",
    "is_sweep",
    "read_flags",
    "require_candidate",
    "require_known",
    "require_list",
    "require_single_values",
    "require_switches",
    "require_text",
]

OVERRIDE = re.compile(r"(?:\+{0,2}|~)(?:[\w.$@:-]*|hydra/[\w/@]+)=|~[\w.]+$")
"""An argument that is not a word: key=value, also of hydra/launcher, or ~key. Other paths with = in them are words."""

TEXT = {"new", "baseline", "prompt", "sample.prompt", "where"}
"""Keys whose value is text to the end, whatever signs are in it; so are the keys that words fill."""

GLOBAL_GROUPS = ("experiment", "debug")
"""Groups whose files are differences to the whole config; without their first line they would be a section of it."""

PATHS = {
    *("checkpoint", "other_checkpoint", "ckpt_path", "teacher", "cache", "cache_dir", "path", "source", "destination"),
    *("directory", "folder", "from", "name", "output", "output_dir", "results_dir", "run_dir"),
}
"""Last parts of keys whose value is a path, or a name in one."""

SIGNS = re.compile(r"""[][(){}'",]""")
"""What makes a value more than text to Hydra."""


def require_text(arguments: Sequence[str]) -> None:
    """Refuse what no file of a run could hold.

    Raises:
        InputError: bytes that are no UTF-8, which Python marks as surrogates, or a NUL.
    """
    for argument in arguments:
        if "\0" in argument or any("\ud800" <= letter <= "\udfff" for letter in argument):
            reads = "" if sys.getfilesystemencoding() == "utf-8" else "; PYTHONUTF8=1 lets Python read it as such"
            raise InputError(f"{argument!r}: must be UTF-8 text without NUL{reads}")


def complete(name: str, arguments: Sequence[str]) -> list[str]:
    """Words and key=value of a command, without flags, all as key=value, and with quotes where a text needs them.

    Raises:
        InputError: more words than the command takes.
    """
    keys, rest = list(COMMANDS[name].words), list(arguments)
    given = []
    while rest and rest[0] and not OVERRIDE.match(rest[0]):
        if not keys:
            raise InputError(_no_place_for(name, rest[0]))
        if keys[0].endswith("..."):
            words = [rest.pop(0) for _ in range(_number_of_words(rest))]
            given.append(f"{keys.pop(0)[:-3]}=[{','.join(map(quoted, words))}]")
        else:
            given.append(f"{keys.pop(0)}={quoted(rest.pop(0))}")
    texts = TEXT | {key.removesuffix("...") for key in COMMANDS[name].words}
    return [*given, *(_readable(argument, texts) for argument in rest)]


def _number_of_words(arguments: Sequence[str]) -> int:
    stops = [i for i, word in enumerate(arguments) if OVERRIDE.match(word)]
    return stops[0] if stops else len(arguments)


def _no_place_for(name: str, word: str) -> str:
    options = [f"{group}={word}" for group, names in config_groups(CONFIG_DIR).items() if word in names]
    if not options and "data" in default_options(name.replace("-", "_")) and _is_path(word):
        options = [_as_data(word)]
    hint = did_you_mean(options)
    usage = " ".join(["moesaic", name, *filter(None, [COMMANDS[name].usage]), "[key=value ...]"])
    return f"{word}: no place for this word{hint}; must be {usage}"


def _readable(argument: str, texts: set[str]) -> str:
    """The argument, with its value in quotes if Hydra cannot read it and it is meant as text."""
    key, equals, value = argument.partition("=")
    if not equals or not OVERRIDE.match(argument) or not (key in texts or not SIGNS.search(value)):
        return argument
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={quoted(value)}"
    return argument


def read_flags(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command line as Hydra takes it apart, wherever its flags stand.

    Returns:
        `overrides` (words and key=value), `config_dir` and Hydra's other flags by name; and the flags as given.

    Raises:
        InputError: an unknown flag, or one without its value.
    """

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; moesaic {name} --help lists the flags")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    found = parser.parse_intermixed_args(list(arguments))
    overrides = iter(found.overrides)
    following, flags = next(overrides, None), []
    for argument in arguments:
        if argument == following:
            following = next(overrides, None)
        elif argument != "--":
            flags.append(argument)
    return found, flags


def as_additions(arguments: Sequence[str]) -> list[str]:
    """Overrides for Hydra in which trainer.NAME=VALUE is ++trainer.NAME=VALUE.

    Hydra would refuse the options of Lightning that conf/trainer does not list; `TrainerConfig` knows them, and what is
    close to a name that nobody knows.
    """
    return [f"++{each}" if each.startswith("trainer.") and "=" in each else each for each in arguments]


def require_single_values(arguments: Sequence[str]) -> None:
    """Refuse the values of a sweep, which a comma makes of a text too.

    Raises:
        InputError: for the first override that has several values.
    """
    if any(argument.startswith("hydra.mode=") for argument in arguments):
        return
    groups = config_groups(CONFIG_DIR)
    for argument in arguments:
        override = _parse(argument)
        if override.is_sweep_override():
            key, _, value = argument.partition("=")
            text = f"; one text must be in quotes inside quotes: {for_shell(f'{key}={quoted(value)}')}"
            raise InputError(
                f"{argument}: several values are a sweep, which must have -m{'' if key in groups else text}"
            )


def is_sweep(argument: str) -> bool:
    """Whether an override has several values."""
    return bool(_parse(argument).is_sweep_override())


def require_candidate(arguments: Sequence[str], is_sweep: bool) -> None:
    """Refuse a comparison without a candidate, or one that is asked for as a sweep.

    Raises:
        InputError: it says what to type.
    """
    if is_sweep:
        raise InputError("-m: several candidates must be several new=, and several seeds seeds=[0,1,2]")
    if not any(argument.startswith("new=") for argument in arguments):
        given = " ".join(each for each in arguments if each.startswith("model."))
        raise InputError(f"new: missing; must be given, such as {for_shell('new=' + (given or 'my_parts:Router'))}")
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "seeds" and "," in value and not value.startswith("["):
            raise InputError(f"{argument}: several seeds must be seeds=[{value}]")


def check_overrides(config_name: str, arguments: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Refuse an override that names no key or no option, and say what it may have meant.

    Args:
        config_dir: the user's own config files.

    Raises:
        InputError: for the first such override.
    """
    overrides = [_parse(argument) for argument in arguments]
    folders = [CONFIG_DIR, *([Path(config_dir)] if config_dir else [])]
    if not folders[-1].is_dir():
        raise InputError(f"--config-dir {config_dir}: no such directory")
    groups = config_groups(*folders)
    if config_dir and not Path(config_dir).samefile(CONFIG_DIR):
        _refuse_double_names(Path(config_dir))
    for each in overrides:
        if each.key_or_group == "launcher" and config_name not in ("study", "ladder"):
            must = "is for moesaic study and moesaic ladder; a sweep must have -m and hydra/launcher=NAME"
            raise InputError(f"{each.input_line}: {must}")
        if each.key_or_group in groups and (each.is_add() or each.is_force_add()):
            given = str(each.input_line).lstrip("+")
            raise InputError(f"{each.input_line}: {each.key_or_group} is there already; must be {given}, without +")
        if each.key_or_group in groups and not each.is_delete():
            _check_options(each, groups[each.key_or_group])
            _check_files(each, folders[1:])
    chosen = [str(o.input_line) for o in overrides if o.key_or_group in groups and not o.is_sweep_override()]
    config = compose_with(config_dir, config_name, chosen)  # an experiment may fill a section that is null by default
    for group in GLOBAL_GROUPS:
        if config.get(group) is not None:
            raise InputError(f"{group}: its file must begin with # @package _global_, without a byte order mark before")
    for each in overrides:
        _check_key(each, config, groups)
        _check_path(each)


def _refuse_double_names(folder: Path) -> None:
    ours, theirs = config_groups(CONFIG_DIR), config_groups(folder)
    for group, options in theirs.items():
        for option in options:
            if option in ours[group]:
                file = folder / group / f"{option}.yaml"
                raise InputError(f"{file}: Moesaic has {group}={option} already; must have another name")


def _parse(argument: str) -> Override:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"{argument}: must be key=value; words stand before the first key=value") from error
        raise InputError(
            f"{argument}: cannot be read ({str(error).splitlines()[0]}); "
            f"a text with special signs must be in quotes inside quotes: {for_shell(f'{key}={quoted(value)}')}"
        ) from error


def _check_files(override: Override, folders: Sequence[Path]) -> None:
    """Name the user's own file that is no text: Hydra's error would not."""
    for file in (folder / override.key_or_group / f"{override.value()}.yaml" for folder in folders):
        if file.is_file():
            with reading(file):
                file.read_text(encoding="utf-8")


def _check_options(override: Override, options: Sequence[str]) -> None:
    value = override.value()
    if isinstance(value, ChoiceSweep):
        value = value.list
    elif override.is_sweep_override():
        return  # a pattern
    for option in value if isinstance(value, list) else [value]:
        name = option.text if isinstance(option, QuotedString) else option
        if str(name) in options:
            continue
        elsewhere = OPTIONS.get(f"{override.key_or_group}={str(name).lower()}")
        if override.key_or_group == "data" and _is_path(str(name)):
            elsewhere = _as_data(str(name))
        hint = did_you_mean([elsewhere] if elsewhere else difflib.get_close_matches(str(name), options, n=1))
        raise InputError(f"{override.input_line}: no such option{hint}; must be one of {', '.join(options)}")


def _check_path(override: Override) -> None:
    """Refuse a path that no file system takes, before anything asks whether it is there.

    An empty one is what a shell makes of a variable that is not set; it would mean the working directory, or nothing.
    """
    key, value = override.key_or_group, override.value()
    if key.rpartition(".")[2] not in PATHS:
        return
    for path in value.list if isinstance(value, ChoiceSweep) else [value]:
        if not isinstance(path, (str, QuotedString)):
            continue
        text = path if isinstance(path, str) else path.text
        if not text:
            raise InputError(f"{key}=: empty; must be a path or a name, or be left out")
        with naming(key):
            require_short(text)


def _is_path(text: str) -> bool:
    """Whether a text is no name of an option, but says where files are."""
    return bool(re.search(r"[/\\*?]|\.\w+$", text)) or os.access(text, os.F_OK)


def _as_data(path: str) -> str:
    return f"data=files {for_shell(override('data.path', path))}"


def compose_with(folder: str | Path | None, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes, with the user's own config files in `folder`.

    Raises:
        InputError: it cannot be composed, or one of these files is no YAML.
    """
    if folder is None:
        return _composed(config_name, tuple(overrides))
    found = f"hydra.searchpath=[{quoted(f'file://{Path(folder).resolve()}')}]"
    return _compose(config_name, [found, *overrides], f"--config-dir {folder}: ")


@functools.lru_cache(maxsize=64)
def _composed(config_name: str, overrides: tuple[str, ...]) -> DictConfig:
    """Our own files do not change; a comparison asks for the same arm several times."""
    return _compose(config_name, overrides, "")


def _compose(config_name: str, overrides: Sequence[str], where: str) -> DictConfig:
    outer = GlobalHydra.instance().hydra  # of the command that asks
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"), composing(where):
            return compose(config_name, [*overrides])
    except RecursionError as error:
        raise InputError(f"{where}a file is among its own defaults, which must not be") from error
    except ValueError as error:  # of a list of defaults that is none
        raise error if isinstance(error, InputError) else InputError(f"{where}{in_one_line(error)}") from error
    finally:
        GlobalHydra.instance().hydra = outer


@contextlib.contextmanager
def composing(where: str = "") -> Iterator[None]:
    """Make an InputError of what Hydra, OmegaConf and YAML refuse within.

    Raises:
        InputError: it begins with `where`.
    """
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where}a file must be YAML: {in_one_line(error)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(where + in_one_line(error) + _plugin_to_install(str(error))) from error


def _plugin_to_install(text: str) -> str:
    """How to get the launcher or sweeper that Hydra cannot find; the names of its plugins are made alike."""
    missing = re.search(r"Could not find 'hydra/(launcher|sweeper)/([a-z]+)", text)
    return f"; it may need pip install hydra-{missing[2]}-{missing[1]}" if missing else ""


def in_one_line(error: BaseException) -> str:
    """What Hydra, OmegaConf or YAML say over many lines, without what only their authors need."""
    cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    text = str(error).split("Config search path:")[0] + cause
    lines = [line.strip() for line in text.splitlines() if not re.match(r"\s*(object_type|reference_type)=", line)]
    return " ".join(re.sub(r"^full_key: *", "at ", line) for line in lines if line not in ("", "full_key:"))


def _check_key(override: Override, config: DictConfig, groups: dict[str, list[str]]) -> None:
    key = override.key_or_group
    root = re.split(r"[./]", key)[0]
    if root == "hydra" or key in groups or override.package is not None:
        return
    value = None if override.is_delete() else override.value()
    for each in value.list if isinstance(value, ChoiceSweep) else [value]:
        if meant_value := OPTIONS.get(f"{key}={str(each.text if isinstance(each, QuotedString) else each).lower()}"):
            raise InputError(f"{key}={each}: no such value{did_you_mean([meant_value])}")
    at_top = [str(name) for name in config if str(name) != "hydra"]
    if override.is_delete():
        if key in at_top:
            raise InputError(f"~{key}: this key cannot be taken away; give it another value")
        return
    leaves = list(flatten(OmegaConf.to_container(config, resolve=False)))  # type: ignore[arg-type]
    known = leaves if "." in key else [*groups, *at_top, *leaves]
    if root not in at_top:
        meant = [COMMAND_OF[key]] if key in COMMAND_OF else _close(key, known, at_top)
        raise InputError(f"{key}: unknown key{did_you_mean(meant)}; must be one of {', '.join(at_top)}")
    if override.is_add() or override.is_force_add():
        ours = key_known_as(key) if root == "trainer" else None
        if ours is not None and ours.startswith("trainer.") and ours != key:
            raise InputError(f"{key}: unknown key (did you mean {ours}?)")
        return
    section, path, name = config, "", key
    while "." in name and isinstance(section, DictConfig) and name.split(".")[0] in section:
        first, _, name = name.partition(".")
        section, path = section[first], f"{path}{first}."
    if not isinstance(section, DictConfig) or not section:
        return  # below a value that is null by default: the config's own types know better
    siblings = [path + str(other) for other in section]
    if key not in siblings:
        raise InputError(
            f"{key}: unknown key{did_you_mean(_close(key, known, siblings))}; must be one of {', '.join(siblings)}"
        )
    if isinstance(section[name], DictConfig) and section[name] and isinstance(value, (str, int, float, QuotedString)):
        keys = [f"{key}.{other}" for other in section[name]]
        hint = f" (did you mean {key}.name={value}?)" if f"{key}.name" in keys else ""
        raise InputError(f"{override.input_line}: {key} is a section{hint}; give one of its keys: {', '.join(keys)}")


def _close(key: str, known: Sequence[str], siblings: Sequence[str]) -> list[str]:
    """The likeliest key: what other tools call so, nearly this path, nearly a sibling, or this name elsewhere."""
    key = key.lower()
    last = key.rpartition(".")[2]
    if (ours := key_known_as(key)) in known:
        return [str(ours)]
    by_name = {name.rpartition(".")[2]: name for name in reversed(known)}  # of two, the first: model.moe.top_k
    beside = {name.rpartition(".")[2]: name for name in siblings}
    by_path = {name: name for name in known}
    for names, wanted, cutoff in ((by_path, key, 0.85), (beside, last, 0.7), (by_name, last, 0.8)):
        if found := difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff):
            return [names[found[0]]]
    return []


def did_you_mean(found: Sequence[str]) -> str:
    """The hint that follows what was typed wrongly: the first of what it may have meant, or nothing."""
    return f" (did you mean {found[0]}?)" if found else ""


def require_list(key: str, value: object) -> None:
    """Raise InputError unless the value of a key is a list of names or numbers."""
    if not isinstance(value, list) or not all(type(each) in (str, int) for each in value):
        raise InputError(f"{key}={value!r}: must be a list, such as {key}=[{value if type(value) is str else 'NAME'}]")


def require_switches(given: Mapping[str, object], *keys: str) -> None:
    """Raise InputError unless the values of these keys are true or false: any text would count as true."""
    for key in keys:
        if not isinstance(given[key], bool):
            raise InputError(f"{key}={given[key]!r}: must be true or false")


def require_known(key: str, value: object, known: Sequence[str], or_else: str = "") -> None:
    """Raise InputError, which suggests the nearest name, unless the value of a key is a known one."""
    if value not in known:
        hint = did_you_mean(difflib.get_close_matches(str(value), known, n=1))
        raise InputError(f"{key}={value}{hint}: must be one of {', '.join(known)}{or_else}")
