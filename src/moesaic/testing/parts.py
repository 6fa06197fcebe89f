"""`check_part` and `check_decoder_parts`: whether a router, a mixer, a channel mixer or experts alone are valid."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from moesaic.errors import InputError
from moesaic.models.config import DecoderConfig, LayerConfig
from moesaic.models.custom import construct, custom_modules
from moesaic.models.decoder import build_block
from moesaic.models.seams import SMALL, Seam
from moesaic.testing.part_checks import PART_CHECKS
from moesaic.testing.placing import IN_A_ROW, LENGTH, Place, Placed, Stack, put, stack
from moesaic.testing.report import CheckResult, Report

__all__ = ["check_decoder_parts", "check_named_part", "check_part"]

DIM: int = SMALL["dim"]


def check_part(part: nn.Module | Callable[[], Any], seam: Seam, *, dim: int | None = None) -> Report:
    """Run every check of parts on one part, in the place where a decoder would put it.

    Args:
        part: a module, which is copied and never changed; or a function without arguments that makes one. Only with a
            function can it be seen what the constructor draws and the state dict does not keep.
        seam: "router", "mixer", "ffn" (a channel mixer), "expert" (the stack of all experts) or "dispatcher".
        dim: width D of its inputs (B, L, D); None means that it is found by trial.

    Returns:
        A `Report`; its rows are in the order of the checks, "causality" first.

    Raises:
        InputError: it cannot be made, or maps inputs of no width, or of several.
    """
    make = (lambda: copy.deepcopy(part)) if isinstance(part, nn.Module) else part
    made = make()
    width = _width(seam, make) if dim is None else dim
    return _report(type(made).__name__, Place(lambda: put(seam, make(), width)))


def check_named_part(seam: Seam, path: str) -> Report:
    """`check_part` of what a dotted path names, made of a small size: dim 32, 4 experts, top 2.

    Raises:
        InputError: it cannot be imported, or made from what a decoder gives it by name.
    """

    def make(**changes: int) -> Any:
        return construct({"type": path}, seam, **SMALL | changes)

    def model() -> Placed:
        layers = (put(seam, make(layer_index=i, num_layers=IN_A_ROW), DIM).whole for i in range(IN_A_ROW))
        return stack(layers, seam, DIM)

    make()
    return _report(path, Place(lambda: put(seam, make(), DIM), model=model))


def check_decoder_parts(config: DecoderConfig, seq_len: int = LENGTH) -> list[CheckResult]:
    """The checks of every custom module of a model, each once, where it stands in the model.

    Everything is made small, with dim 32, unless a module wants the model's own width. The number of experts and top_k
    are the model's.

    Args:
        seq_len: the length of the sequences of training, on which causality is seen to hold too.

    Raises:
        InputError: a module that cannot be imported or made.
    """
    distinct: dict[str, str] = {}
    for where, custom in custom_modules(config).items():
        if not where.startswith("moe.") or _first_moe(config) is not None:
            distinct.setdefault(f"{_attribute(where)}: {custom}", where)
    rows = []
    for where in distinct.values():
        place = _place(config, where, seq_len)
        rows += [_at(where, row) if len(distinct) > 1 else row for row in _report(where, place).rows]
    return rows


def _attribute(where: str) -> str:
    """What a place such as "layers.0.mixer" or "moe.router" is called within a block or a MoE layer."""
    return where.rpartition(".")[2]


def _at(where: str, row: CheckResult) -> CheckResult:
    return dataclasses.replace(row, detail=f"{where}: {row.detail}")


def _report(name: str, place: Place) -> Report:
    return Report(name, tuple(check.run(place) for check in PART_CHECKS))


def _place(config: DecoderConfig, where: str, seq_len: int) -> Place:
    """A custom module of a model in its block, a small one if that can be built and run, and all layers of it."""
    in_moe, attribute = where.startswith("moe."), _attribute(where)
    index = (_first_moe(config) or 0) if in_moe else int(where.split(".")[1])

    def make(config: DecoderConfig) -> Placed:
        block = build_block(config, index)
        whole = getattr(block, "ffn" if in_moe else attribute)
        part = getattr(whole, attribute) if in_moe else whole
        return Placed(part if isinstance(part, nn.Module) else whole, whole, config.dim)

    def model(config: DecoderConfig) -> Placed:
        layers = Stack(build_block(config, i) for i in range(config.num_layers))
        return Placed(layers, layers, config.dim, takes_mask=False)

    smaller = (_small(_alone(config, where)), _small(config))
    for length, candidate in itertools.product((3, seq_len), smaller):
        try:
            with torch.random.fork_rng(devices=[]):
                placed = make(candidate)
                placed.run(placed.random(2, length))
        except Exception:  # what a foreign module raises has no common base
            continue
        return Place(partial(make, candidate), seq_len, partial(model, candidate))
    return Place(partial(make, config), seq_len)  # if it cannot run there either, the rows will say so


def _alone(config: DecoderConfig, where: str) -> DecoderConfig:
    """With built-in parts in place of all custom ones but the one at `where`, so that nothing else can fail."""
    attribute, here = _attribute(where), custom_modules(config)[where]
    built_in: dict[str, Any] = {"mixer": "rope" if config.attention.mla is None else "mla", "ffn": "dense"}

    def beside(layer: LayerConfig) -> LayerConfig:
        others = (name for name in built_in if isinstance(getattr(layer, name), dict))
        replaced = (name for name in others if (name, getattr(layer, name)) != (attribute, here))
        return dataclasses.replace(layer, **{name: built_in[name] for name in replaced})

    config = dataclasses.replace(
        config,
        pattern=tuple(map(beside, config.layers)),
        interleave_moe_layer_step=None,
        nope_layer_interval=None,
        first_dense_layers=0,
        dense_twin=False,
    )
    if config.moe is None:
        return config
    others = [_attribute(place) for place in custom_modules(config) if place.startswith("moe.") and place != where]
    defaults: dict[str, Any] = {each.name: each.default for each in dataclasses.fields(config.moe)}
    moe = dataclasses.replace(config.moe, **{name: defaults[name] for name in others})
    return dataclasses.replace(config, moe=moe)


def _small(config: DecoderConfig) -> DecoderConfig:
    kv_heads = 1 if config.attention.mla is None else None
    attention = dataclasses.replace(config.attention, num_heads=2, num_kv_heads=kv_heads, head_dim=None)
    moe = config.moe and dataclasses.replace(config.moe, hidden_dim=16, shared_hidden_dim=0)
    return dataclasses.replace(config, dim=DIM, hidden_dim=2 * DIM, attention=attention, moe=moe)


def _first_moe(config: DecoderConfig) -> int | None:
    return next((i for i, layer in enumerate(config.layers) if layer.ffn == "moe"), None)


def _width(seam: Seam, make: Callable[[], Any]) -> int:
    """The one width of inputs that a part takes, tried among the sizes of its parameters."""
    part = make()
    if seam == "dispatcher":
        return DIM
    sizes = {size for p in part.parameters() for size in p.shape} if isinstance(part, nn.Module) else set()
    fitting = []
    for size in sorted(sizes):
        try:
            placed = put(seam, make(), size)
            placed.run(torch.randn(2, 3, size, dtype=placed.dtype))
        except Exception:  # what a foreign module raises at a wrong width has no common base
            continue
        fitting.append(size)
    if len(fitting) != 1:
        raise InputError(f"{type(part).__name__}: inputs of the widths {fitting} fit; dim must be given")
    return fitting[0]
