"""Seams by name: where in a model a part of a user's own belongs, as its signature says or as the user says."""

import difflib
import importlib
import inspect
import itertools
import re
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.imports import HANDED_IN, resolve
from moesaic.layers import Attention, Experts, FeedForward, MoE, Routing, SoftMoE, TopKRouter
from moesaic.models.custom import construct, require_maker

__all__ = ["SEAMS", "SMALL", "FoundPart", "Seam", "find_part", "seam_of", "split_seam"]

Seam = Literal["router", "mixer", "ffn", "expert", "dispatcher"]
"""Where a part belongs. "expert" is the stack of all experts of a MoE layer."""

SEAMS: tuple[Seam, ...] = get_args(Seam)

_OURS: dict[type, Seam] = {
    TopKRouter: "router",
    Attention: "mixer",
    FeedForward: "ffn",
    MoE: "ffn",
    SoftMoE: "ffn",
    Experts: "expert",
}

SMALL: dict[str, Any] = {
    "dim": 32,
    "layer_index": 0,
    "num_layers": 2,
    "norm_eps": 1e-5,
    "num_experts": 4,
    "top_k": 2,
    "score_function": "sigmoid",
    "normalize_scores": False,
    "expert_bias": False,
}
"""What a part is given that asks for it by name, where it is made outside a model."""

MOST_FILES = 2000
"""Files that are looked into for a name without its module."""


class FoundPart(NamedTuple):
    """A part as the words of a command name it."""

    seam: Seam
    path: str
    """Dotted: package.module.Name."""


def find_part(text: str, key: str = "part") -> FoundPart:
    """The seam and the dotted path that a word such as `my.parts:Router` or `mixer:my.parts.Mine` stands for.

    Dots and colon both name a part. The seam before a colon counts before what the signature says.

    Args:
        key: names the word in messages.

    Raises:
        InputError: it cannot be imported, is no part, or its signature fits several seams or none.
    """
    given, path = split_seam(text)
    try:
        found = resolve(path, key)
    except InputError as error:
        hint = _nearest(text, path)
        raise InputError(f"{error} (did you mean {hint}?)" if hint else str(error)) from error
    if not path.startswith(f"{HANDED_IN}."):  # the person handed it over to be called
        require_maker(found, f"{key}={text!r}", dispatches=given in (None, "dispatcher"))
    if given is not None:
        _tried_out(path, key)
        return FoundPart(given, path)
    fitting = seam_of(found) or _tried_out(path, key)
    if len(fitting) == 1:
        return FoundPart(fitting[0], path)
    is_object = path.startswith(f"{HANDED_IN}.")
    listed = " or ".join(f'{{"{seam}": ...}}' if is_object else f"{seam}:{path}" for seam in fitting or SEAMS)
    fits = f"fits the seams {', '.join(fitting)}" if fitting else "fits no seam"
    raise InputError(f"{key}={text!r}: {_signature(found)} {fits}; must be given as {listed}")


def _nearest(text: str, path: str) -> str | None:
    """What was probably meant by a word that names nothing; None if nothing is near."""
    if "/" in text or ".py" in text:
        dotted = re.sub(r"\.py(?=:|$)", "", text.replace(f"{Path.cwd()}/", "").replace("./", "")).replace("/", ".")
        return dotted if ":" in dotted else f"{dotted}:NAME"
    if "." not in path:
        return " or ".join(_places_of(path)) or None
    first, _, rest = text.partition(":")
    if first not in SEAMS and ":" in rest and (close := difflib.get_close_matches(first, SEAMS, n=1)):
        return f"{close[0]}:{rest}"
    module, _, name = path.rpartition(".")
    names = vars(sys.modules[module]) if module in sys.modules else {}
    seam = f"{first}:" if first in SEAMS else ""
    return f"{seam}{module}:{close[0]}" if (close := difflib.get_close_matches(name, names, n=1)) else None


def _places_of(name: str) -> list[str]:
    """module:name where the parts that ship, or the files of the working directory and its folders, have this name."""
    shipped = ("moesaic.layers", "moesaic.examples.custom_modules")
    found = [f"{module}:{name}" for module in shipped if hasattr(importlib.import_module(module), name)]
    has_it = re.compile(rf"^(?:class|def)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", re.MULTILINE)
    files = itertools.chain.from_iterable(Path().glob(pattern) for pattern in ("*.py", "*/*.py", "*/*/*.py"))
    for file in itertools.islice(files, MOST_FILES):
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        try:
            if has_it.search(file.read_text(encoding="utf-8")) and all(map(str.isidentifier, module.split("."))):
                found.append(f"{module}:{name}")
        except (OSError, ValueError):
            continue
    return sorted(found)[:3]


def split_seam(text: str) -> tuple[Seam | None, str]:
    """The seam that a word begins with, None if it begins with none, and the dotted path that it names.

    `router:Mine` names Mine of a module `router`: a seam stands before a path of at least a module and a name.
    """
    first, colon, rest = text.partition(":")
    for seam in SEAMS:
        if colon and first == seam and ("." in rest or ":" in rest):
            return seam, rest.replace(":", ".")
    return None, text.replace(":", ".")


def seam_of(found: Any) -> tuple[Seam, ...]:
    """The seams that a class, a module or a function fits, as far as its signature says; () where it says nothing.

    A router returns a `Routing`, or takes `expert_ids`, `token_ids` or `router_state`. A mixer takes a cache, an
    attention mask or positions. Experts take rows and rows_per_expert. A `forward(x)` that says no more fits mixer and
    ffn alike.
    """
    if not inspect.isclass(found) and not isinstance(found, nn.Module) and callable(found):
        found = _return_type(found)
    cls = found if inspect.isclass(found) else type(found)
    for ours, seam in _OURS.items():
        if issubclass(cls, ours):
            return (seam,)
    if callable(getattr(cls, "dispatch", None)) and callable(getattr(cls, "combine", None)):
        return ("dispatcher",)
    if not issubclass(cls, nn.Module) or cls.forward is nn.Module.forward:
        return ()
    return _by_forward(cls)


def _by_forward(cls: type[nn.Module]) -> tuple[Seam, ...]:
    taken = list(inspect.signature(cls.forward).parameters)[1:]
    is_whole = hasattr(cls, "forward_with_routing")
    hands_on = bool({"expert_ids", "token_ids", "router_state"} & set(taken)) and not is_whole
    said = {
        "router": hands_on or _names_routing(cls.forward),
        "mixer": hasattr(cls, "make_cache") or bool({"cache", "attention_mask", "positions", "rotary"} & set(taken)),
        "ffn": is_whole,
        "expert": "rows_per_expert" in taken or taken[:1] == ["rows"],
    }
    return tuple(seam for seam in SEAMS if said.get(seam))


def _names_routing(forward: Any) -> bool:
    """Whether `forward` is annotated to return a `Routing`, in whatever spelling."""
    annotation = inspect.signature(forward).return_annotation
    return annotation is Routing or (
        isinstance(annotation, str) and annotation.split(".")[-1].strip("'\"") == "Routing"
    )


def _return_type(function: Any) -> Any:
    """The class that a function says it returns, itself if it says none."""
    try:
        annotation = inspect.signature(function, eval_str=True).return_annotation
    except (TypeError, ValueError, NameError):
        return function
    return annotation if inspect.isclass(annotation) else function


def _signature(found: Any) -> str:
    """What was looked at, for messages."""
    if inspect.isclass(found) and issubclass(found, nn.Module):
        return f"forward{inspect.signature(found.forward)}"
    return f"a {type(found).__name__}" if not callable(found) else f"{getattr(found, '__name__', found)}, once called,"


def _tried_out(path: str, key: str) -> tuple[Seam, ...]:
    """The seams that a part fits which its signature does not say: it is made small, and run where it takes x alone.

    Raises:
        InputError: it cannot be called with what a model gives it, or returns what no seam takes.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            made = construct({"type": path}, key, **SMALL)
            said = seam_of(made)
            if said or not isinstance(made, nn.Module):
                return said
            answer = made(torch.randn(6, SMALL["dim"]))
    except Exception as error:  # it needs another size, or other inputs: what it raises has no common base
        if isinstance(error, InputError) and isinstance(error.__cause__, TypeError):  # no model could make it either
            raise
        return ("mixer", "ffn")
    if isinstance(answer, tuple) and len(answer) >= 3 and all(isinstance(each, Tensor) for each in answer[:3]):
        return ("router",)
    if not isinstance(answer, Tensor):
        found = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else f"a {type(answer).__name__}"
        raise InputError(
            f"{key}: {path} returned {found}; must be logits, scores and expert_ids of a router, or one tensor of a "
            "mixer or a feed-forward layer"
        )
    return ("mixer", "ffn")
