"""Callbacks and loggers of a config: mappings with a `_target_`, as users of Hydra know them, made without Hydra."""

import difflib
import importlib.util
import inspect
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger

from moesaic.errors import InputError
from moesaic.imports import resolve
from moesaic.reading import is_number

__all__ = ["make_callbacks", "make_loggers", "require_loggers"]

PACKAGES = {
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "TrackioLogger": "trackio",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "NeptuneLogger": "neptune",
}
"""What the loggers need that have a package of their own."""


def make_callbacks(config: Mapping[str, Any]) -> list[Callback]:
    """Make the callbacks of `callbacks`, a mapping of {name: {_target_: dotted path, argument: value}}.

    Raises:
        InputError: no such class, not a Callback, an unknown argument, one that the class refuses, or early stopping by
            what no validation logs.
    """
    made = {name: _make(each, f"callbacks.{name}", Callback) for name, each in config.items()}
    for name, callback in made.items():
        if isinstance(callback, EarlyStopping) and not _is_validated(callback.monitor):
            raise InputError(
                f"callbacks.{name}.monitor={callback.monitor!r}: must be {', '.join(VALIDATED)} or router/LAYER/drift"
            )
    return list(made.values())


VALIDATED = ("validation/loss", "validation/bits_per_byte", "validation/teacher_loss")
"""What a validation logs for callbacks, beside the drift of each routed layer."""


def _is_validated(name: str) -> bool:
    return name in VALIDATED or (name.startswith("router/") and name.endswith("/drift"))


def require_loggers(config: Mapping[str, Any]) -> None:
    """Raise InputError for what `make_loggers` could not make, without making it: a logger may write at once."""
    for name, each in config.items():
        _class_of(each, f"logger.{name}", Logger)


def make_loggers(config: Mapping[str, Any], run_dir: Path, step: int = 0) -> list[Logger]:
    """Make the loggers of `logger`, as `make_callbacks` does; `save_dir` is the run directory unless it is given.

    Args:
        step: where the run goes on. TensorBoard hides what a killed process logged after it.

    Raises:
        InputError: as `make_callbacks`, or its package is missing.
    """
    return [
        _make({**_purge(each, step), **each}, f"logger.{name}", Logger, save_dir=str(run_dir))
        for name, each in config.items()
    ]


def _purge(config: Mapping[str, Any], step: int) -> dict[str, int]:
    is_board = str(config["_target_"]).endswith(".TensorBoardLogger")
    return {"purge_step": step + 1} if step and is_board else {}


def _class_of(config: Any, where: str, base: Any) -> Any:
    """The class that a component's mapping names, checked with its arguments but not called."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise InputError(f"{where}={config!r}: must be a mapping with _target_, the dotted path of a {base.__name__}")
    path = config["_target_"]
    if package := PACKAGES.get(str(path).rpartition(".")[2]):
        _require_package(package, where)
    cls = resolve(str(path), f"{where}._target_")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InputError(f"{where}._target_={path!r}: must be the dotted path of a {base.__name__}")
    parameters = inspect.signature(cls).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in config:
            if name != "_target_" and name not in parameters:
                close = difflib.get_close_matches(str(name), list(parameters), n=1)
                hint = f" (did you mean {where}.{close[0]}?)" if close else ""
                raise InputError(f"{where}.{name}: unknown key{hint}; it must be one of {', '.join(parameters)}")
    _require_types(cls, config, where)
    return cls


def _require_types(cls: type[Any], config: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of another type than the constructor's annotations say, as far as these are plain types."""
    try:
        wanted = typing.get_type_hints(cls.__init__)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return
    for name, value in config.items():
        if name in wanted and not _fits(value, wanted[name]):
            kind = wanted[name]
            must = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise InputError(f"{where}.{name}={value!r}: must be {must}")


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a config is of an annotated type, where that is a plain one; others are not judged."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(wanted))
    if wanted is float:
        return is_number(value)
    if wanted in (int, str, bool, type(None)):
        return type(value) is wanted
    if isinstance(wanted, type) and issubclass(wanted, PurePath):
        return isinstance(value, str)
    return True


def _require_package(package: str, where: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{where}: it needs the package {package}: pip install {package}")


def _make(config: Any, where: str, base: Any, **defaults: Any) -> Any:
    cls = _class_of(config, where, base)
    known = inspect.signature(cls).parameters
    arguments = {name: value for name, value in defaults.items() if name in known}
    arguments |= {name: value for name, value in config.items() if name != "_target_"}
    try:
        return cls(**arguments)
    except (TypeError, ValueError, MisconfigurationException, ModuleNotFoundError) as error:
        raise InputError(f"{where}: {config['_target_']} refuses its arguments: {error}") from error
