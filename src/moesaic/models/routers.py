"""The routers that `model.moe.router` may name, from the config to the module."""

import inspect
from typing import Any, get_args

import torch
from torch import nn

from moesaic.errors import InputError
from moesaic.layers.parametrization import ParameterKind
from moesaic.layers.part import parameter_kinds
from moesaic.layers.routers import ROUTERS
from moesaic.models.config import DecoderConfig, MoEConfig

__all__ = ["build_router", "router_parameters"]

ABOUT_SCORES = {"score_function": "sigmoid", "normalize_scores": False, "expert_bias": False}
"""Keys of `model.moe` that some routers do not have, and their defaults."""


def build_router(
    config: DecoderConfig, moe: MoEConfig, where: str, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """The built-in router that `moe` names, with its arguments.

    Args:
        where: the place in the model, for messages.

    Raises:
        InputError: arguments that the router has not, or refuses.
    """
    assert moe.built_in_router is not None
    cls = ROUTERS[moe.built_in_router]
    asked = _arguments_of(cls)
    own = {key: value for key, value in moe.router.items() if key != "type"} if isinstance(moe.router, dict) else {}
    name = f"{where}: moe.router={moe.built_in_router}"
    given = {"dim": config.dim, "num_experts": moe.num_routed, "device": device, "dtype": dtype}
    known: dict[str, Any] = {"top_k": moe.top_k, "vocab_size": config.vocab_size}
    for key, default in ABOUT_SCORES.items():
        known[key] = getattr(moe, key)
        if key not in asked and known[key] != default:
            raise InputError(f"{name} has no {key}; moe.{key}={known[key]} must be {default}")
    allowed = sorted(asked - given.keys())
    if unknown := own.keys() - set(allowed):
        raise InputError(f"{name}: unknown argument {min(unknown)!r}; must be one of {', '.join(allowed)}")
    needed = [each.name for each in inspect.signature(cls).parameters.values() if each.default is each.empty]
    needed = [each for each in needed if each in allowed and each not in own and each not in known]
    if needed:
        written = ", ".join(f"{each}: ..." for each in needed)
        raise InputError(f"{name}: needs {', '.join(needed)}; must be {{type: {moe.built_in_router}, {written}}}")
    try:
        return cls(**{key: value for key, value in known.items() if key in asked} | own | given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error


def router_parameters(config: DecoderConfig) -> list[tuple[tuple[int, ...], ParameterKind]]:
    """Shapes and kinds of the parameters of the built-in router of one MoE layer; of a custom one none."""
    if config.moe is None or config.moe.built_in_router is None:
        return []
    router = build_router(config, config.moe, "router", torch.device("meta"), None)
    kinds = parameter_kinds(router)
    return [(tuple(parameter.shape), kinds[name]) for name, parameter in router.named_parameters()]


def _arguments_of(cls: type) -> set[str]:
    """Names of the arguments that a constructor takes, those of a TypedDict that it unpacks included."""
    names: set[str] = set()
    for each in inspect.signature(cls).parameters.values():
        names |= get_args(each.annotation)[0].__annotations__.keys() if each.kind is each.VAR_KEYWORD else {each.name}
    return names
