"""What tells two parts apart that were handed in from Python: nothing in their names does."""

import functools
import hashlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from moesaic.imports import is_own_code

__all__ = ["digest_of"]


def digest_of(part: Any) -> str:
    """A digest of code and settings: of a partial its arguments, of a function what it uses from outside, of a module
    its numbers and the shapes of its tensors. The values of tensors are left out, as each run draws its own.
    """
    return hashlib.sha256("\n".join(_facts(part, {})).encode()).hexdigest()[:16]


def _facts(found: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Lines that tell an object apart.

    Args:
        seen: what was told already, but for containers, by id; it keeps them, so that no id comes twice.
    """
    if found is None or isinstance(found, (bool, int, float, complex, str, bytes)):
        yield repr(found)
        return
    yield type(found).__qualname__
    if not isinstance(found, (tuple, list, set, frozenset, Mapping, Tensor, types.CodeType)):
        if id(found) in seen:
            return
        seen[id(found)] = found
    if isinstance(found, Tensor):
        yield f"{tuple(found.shape)} {found.dtype}"
    elif isinstance(found, types.CodeType):
        yield repr((found.co_code, found.co_names))
        yield from _facts(found.co_consts, seen)
    elif inspect.isclass(found):
        yield f"{found.__module__}.{found.__qualname__}"
        if is_own_code(found.__module__):
            code = {key: value for key, value in vars(found).items() if not key.startswith("__") or key == "__init__"}
            yield from _facts((code, found.__bases__), seen)
    elif isinstance(found, types.FunctionType):
        yield f"{found.__module__}.{found.__qualname__}"
        if is_own_code(found.__module__):
            outside = inspect.getclosurevars(found)
            used = (found.__code__, found.__defaults__, found.__kwdefaults__, outside.nonlocals, outside.globals)
            yield from _facts(used, seen)
    elif isinstance(found, Mapping):
        yield from sorted("\n".join(_facts(item, seen)) for item in found.items())
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from _facts(each, seen)
    elif isinstance(found, (set, frozenset)):
        yield from sorted("\n".join(_facts(each, seen)) for each in found)
    else:
        for each in _within(found):
            yield from _facts(each, seen)


def _within(found: Any) -> tuple[Any, ...]:
    if isinstance(found, functools.partial):
        return found.func, found.args, found.keywords
    if isinstance(found, types.MethodType):
        return found.__self__, found.__func__
    if isinstance(found, nn.Module):
        state = {key: value for key, value in vars(found).items() if key != "training" and "_hooks" not in key}
        return type(found), state
    if is_own_code(type(found).__module__):
        return type(found), vars(found) if hasattr(found, "__dict__") else {}
    return ()
