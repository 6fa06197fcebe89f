"""What a part of a model says of itself, and what is assumed where it says nothing.

A part is any module that fills a seam: a token mixer, a channel mixer, a router, the experts, a norm. It may have any
of the methods of `Part`. The functions of this module ask for them, and otherwise decide by dimension or by measuring.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moesaic.layers.parametrization import Fans, ParameterKind, Parametrization
from moesaic.layers.routing import beside_tokens
from moesaic.layers.work import Work

__all__ = [
    "Flops",
    "Part",
    "active_parameters",
    "cache_bytes",
    "declared_kinds",
    "flops_per_token",
    "initialize",
    "is_ours",
    "num_parameters",
    "parameter_kinds",
    "remember_marks",
]


class Part(Protocol):
    """What a part may say of itself. Each method is optional."""

    def parameter_kinds(self) -> Mapping[str, ParameterKind]:
        """Kinds of some parameters, by their name within the part ("A_log", "gate.weight"); the others get defaults."""

    def fans(self) -> Mapping[str, Fans]:
        """Fan-in and fan-out of matrices that no linear layer holds, or whose results are added up, by their name."""

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs of one token in a sequence of seq_len tokens. A multiply-add counts as two."""

    def active_parameters(self) -> int:
        """Number of parameters that one token meets."""

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes that decoding token number `length` of one sequence reads from the cache."""

    def initialize(self, parametrization: Parametrization) -> None:
        """Draw all parameters of the part. Without this method a custom part keeps what its constructor drew."""


class Flops(NamedTuple):
    """Forward FLOPs of one token, and how they are known."""

    per_token: float
    source: Literal["declared", "measured", "assumed"]
    """"assumed": two per element of every matrix, because the part could not be run."""


def parameter_kinds(module: nn.Module) -> dict[str, ParameterKind]:
    """The kind of every parameter by its dotted name, names of tied parameters included.

    What an outer module says counts before what an inner one says. By default embeddings are "embedding"; parameters
    with fewer than two dimensions, filters of convolutions, also by hand (C, 1, K), those named `..._log` and those
    with a true `_no_weight_decay` attribute are "vector"; all others are "matrix". Tied parameters have one kind, the
    one that is least like a matrix.

    Raises:
        ValueError: a part names a parameter or a kind that does not exist.
    """
    declared = declared_kinds(module)
    kinds: dict[str, ParameterKind] = {}
    one_of: dict[int, ParameterKind] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{name}" if prefix else name
            kinds[path] = declared.get(path) or _default_kind(part, name, parameter)
            known = one_of.get(id(parameter), kinds[path])
            one_of[id(parameter)] = max(known, kinds[path], key=_LIKENESS.index)
    return {name: one_of[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def declared_kinds(module: nn.Module) -> dict[str, ParameterKind]:
    """The part of `parameter_kinds` that a module or one below it states; the outer one counts."""
    kinds: dict[str, ParameterKind] = {}
    for child_name, child in module.named_children():
        kinds |= {f"{child_name}.{name}": kind for name, kind in declared_kinds(child).items()}
    stated: Mapping[str, ParameterKind] = getattr(module, "parameter_kinds", dict)()
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, kind in stated.items():
        if name not in names or kind not in _LIKENESS:
            raise ValueError(
                f"{type(module).__name__}.parameter_kinds: {name!r}: {kind!r} must be one of its parameters "
                f"({', '.join(sorted(names))}) and one of {', '.join(_LIKENESS)}"
            )
    return kinds | dict(stated)


def remember_marks(module: nn.Module) -> None:
    """Note on every module which of its parameters are marked `_no_weight_decay`.

    torch forgets attributes of parameters in deepcopy and to_empty; those of modules stay.
    """
    for part in module.modules():
        marked = {name for name, p in part.named_parameters(recurse=False) if getattr(p, "_no_weight_decay", False)}
        if marked:
            part._marked_no_weight_decay = marked  # type: ignore[assignment]


_LIKENESS: tuple[ParameterKind, ...] = ("matrix", "output", "vector", "embedding")
"""Kinds from the one most like a matrix."""


def initialize(part: nn.Module, parametrization: Parametrization) -> None:
    """Draw the weights of `part` and of what is below it. A custom part without `initialize` keeps its own."""
    declared = _stated(part, "initialize")  # a custom class may inherit ours and still have drawn in its constructor
    if declared is not None:
        declared(parametrization)
        return
    if not is_ours(type(part).__module__):
        return
    if isinstance(part, nn.Linear):
        nn.init.normal_(part.weight, std=parametrization.std("matrix", part.in_features))
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    for child in part.children():
        initialize(child, parametrization)


def flops_per_token(part: nn.Module, seq_len: int, *shape: int, further: tuple[Tensor, ...] = ()) -> Flops:
    """Forward FLOPs of one token of `part`: declared, or counted by torch while it runs, or assumed by dimension.

    torch counts matrix products, convolutions and attention; elementwise work is left out, as it is in ours.

    Args:
        seq_len: tokens of a sequence.
        shape: what the part takes for these tokens, such as (1, seq_len, D).
        further: tensors that the part takes beside it.
    """
    declared = _stated(part, "flops_per_token")
    if declared is not None:
        return Flops(float(declared(seq_len)), "declared")
    measured = _measure_flops(part, shape, further)
    if measured is not None:
        return Flops(measured / seq_len, "measured")
    kinds = parameter_kinds(part)
    return Flops(2.0 * sum(p.numel() for name, p in part.named_parameters() if kinds[name] != "vector"), "assumed")


def active_parameters(part: nn.Module, flops: Flops) -> int:
    """Parameters that one token meets in a channel mixer: declared, or as many as the measured `flops` account for."""
    declared = _stated(part, "active_parameters")
    if declared is not None:
        return int(declared())
    kinds, sizes = parameter_kinds(part), {name: p.numel() for name, p in part.named_parameters()}
    vectors = sum(size for name, size in sizes.items() if kinds[name] == "vector")
    total = sum(sizes.values())
    return total if flops.source != "measured" else min(total, round(flops.per_token / 2) + vectors)


def cache_bytes(part: nn.Module, length: int, dtype: torch.dtype, dim: int) -> int:
    """Bytes that decoding token number `length` of one sequence reads: declared, or all tensors of a filled cache.

    0 for a part without cache, or whose cache cannot be filled without running on real numbers.
    """
    declared = _stated(part, "cache_bytes")
    if declared is not None:
        return int(declared(length, dtype))
    if not hasattr(part, "make_cache"):
        return 0
    try:
        with torch.no_grad():
            moved: Any = copy.deepcopy(part).to("meta", dtype)
            with torch.device("meta"):
                cache = moved.make_cache()
            moved(torch.empty(1, length, dim, dtype=dtype, device="meta"), cache)
    except Exception:  # what a foreign module raises on tensors without memory has no common base
        if any(p.is_meta for p in part.parameters()) or num_parameters(part) * length > _MOST_WORK:
            return 0
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            moved = copy.deepcopy(part).to(dtype)
            cache = moved.make_cache()
            moved(torch.randn(1, length, dim, dtype=dtype), cache)
    return sum(tensor.nbytes for tensor in _tensors(cache))


def num_parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


_MOST_WORK = 10**9
"""Parameters times tokens up to which a part is run on real numbers, to count its FLOPs."""


def _default_kind(module: nn.Module, name: str, parameter: nn.Parameter) -> ParameterKind:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    is_filter = isinstance(module, nn.modules.conv._ConvNd) or (parameter.dim() == 3 and parameter.size(1) == 1)
    is_scale = name.endswith("_log")  # as A_log of a state-space mixer: one number for itself, not a row of a map
    is_marked = getattr(parameter, "_no_weight_decay", False) or name in getattr(module, "_marked_no_weight_decay", ())
    if parameter.dim() < 2 or is_filter or is_scale or is_marked:
        return "vector"
    return "matrix"


def _measure_flops(part: nn.Module, shape: tuple[int, ...], further: tuple[Tensor, ...]) -> float | None:
    """FLOPs of one call, counted on real numbers, or without memory where the part is large; None if neither."""

    def count(module: nn.Module, x: Tensor) -> float:
        with Work() as work, torch.no_grad():
            module(x, *further, **beside_tokens(module, x))
        return float(work.flops)

    weights = list(part.parameters())
    dtype = weights[0].dtype if weights else torch.float32
    tokens = torch.Size(shape[:-1]).numel()
    if not any(p.is_meta for p in weights) and num_parameters(part) * tokens <= _MOST_WORK:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return count(part, torch.randn(shape, dtype=dtype))
    try:
        return count(copy.deepcopy(part).to("meta"), torch.empty(shape, dtype=dtype, device="meta"))
    except Exception:  # what a foreign module raises on tensors without memory has no common base
        return None


def _stated(part: nn.Module, name: str) -> Any:
    """The method of a part by which it states something, None if it has none.

    What a custom class inherits from ours does not count: it may do more than ours.
    """
    method = getattr(part, name, None)
    if method is None or (is_ours(method.__module__) and not is_ours(type(part).__module__)):
        return None
    return method


def _tensors(value: Any) -> list[Tensor]:
    """All tensors within containers and the attributes of objects."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dict__"):
        value = list(vars(value).values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def is_ours(path: str) -> bool:
    """Whether a module by its dotted path is of this package, examples apart, or of torch: no code of a user."""
    return path.startswith(("moesaic.", "torch.")) and not path.startswith("moesaic.examples")
