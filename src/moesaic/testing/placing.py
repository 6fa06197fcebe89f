"""A part in its place: a mixer or a channel mixer as a block calls it, a router or experts within a MoE layer."""

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.layers import Experts, LocalDispatcher, MoE, RMSNorm, Routing, TopKRouter
from moesaic.layers.routing import beside_tokens
from moesaic.models.decoder import Block
from moesaic.models.seams import Seam

__all__ = ["IN_A_ROW", "LENGTH", "Place", "Placed", "Stack", "put", "stack", "token_ids_of"]

LENGTH = 24
HIDDEN = 16

DRAWS = 64
"""Seeds that are tried of what draws random numbers: one that drops a sequence in ten shows it."""

IN_A_ROW = 4
"""MoE layers with a state of their router that are called one after the other: a leak may begin in a later one."""

REPEATS = 16
"""Calls that are compared of what may draw random numbers that no seed reaches."""


class Placed:
    """One fresh instance of a part, and the whole that it is called in."""

    def __init__(self, part: nn.Module, whole: nn.Module, dim: int, takes_mask: bool | None = None) -> None:
        self.part = part
        self.whole = whole
        self.dim = dim
        self.dtype = next((p.dtype for p in whole.parameters() if p.is_floating_point()), torch.float32)
        self.takes_mask = _takes_three(whole) if takes_mask is None else takes_mask

    def random(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Noise (B, L, D) of scale 1, as a norm hands it to a part."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.dim, generator=generator, dtype=torch.float64).to(self.dtype)

    def call(self, x: Tensor, *state: Any, seed: int = 0) -> Tensor:
        """The part as a block calls it, here and now. Noise of its own is drawn from `seed`."""
        _seed(seed)
        asked, given = self._asked(x), x.detach().clone()
        if hasattr(self.whole, "takes_router_state") and not state:
            y = self._through_state(x, **asked)
        else:
            y = self.whole(x, *state, **asked)
        _require_unchanged("its input", x, given)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            found = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"found {found} for an input of shape {tuple(x.shape)}; must be a tensor of the same shape"
            )
        return y

    def routing(self, x: Tensor) -> Routing:
        """What the router of a MoE layer decides."""
        decided: Routing = self.whole.forward_with_routing(x, **self._asked(x))[1]  # type: ignore[operator]
        return decided

    def _asked(self, x: Tensor) -> dict[str, Tensor]:
        return {"token_ids": token_ids_of(self.whole, x)} if getattr(self.whole, "takes_token_ids", False) else {}

    def _through_state(self, x: Tensor, **asked: Tensor) -> Tensor:
        """A MoE layer as several in a row, which hand on the state of their router, and what a reader sees in it."""
        layer: Any = self.whole
        state: Tensor | None = None
        total, tokens = torch.zeros_like(x), x
        for _ in range(IN_A_ROW if layer.takes_router_state else 1):
            given = None if state is None else state.clone()
            handed = {} if given is None else {"router_state": state}
            y, routing = layer.forward_with_routing(tokens, **handed, **asked)
            if state is not None and given is not None:
                _require_unchanged("router_state", state, given)
            total, state = total + y, routing.state
            if state is not None:
                generator = torch.Generator().manual_seed(3)
                reader = torch.randn(state.size(-1), x.size(-1), generator=generator, dtype=torch.float64)
                total = total + (state.to(x) @ reader.to(x)).view_as(x)
            tokens = F.rms_norm(x + total, x.shape[-1:])  # as in a block, so that numbers do not grow with depth
        return total

    def run(
        self, x: Tensor, *, training: bool = False, mask: Tensor | None = None, seed: int = 0, with_graph: bool = False
    ) -> Tensor:
        """The output of a copy, so that nothing that a call leaves behind meets the next one."""
        with torch.set_grad_enabled(with_graph):
            return self._copy(training).call(x, *(() if mask is None else (None, mask)), seed=seed)

    @torch.no_grad()
    def in_pieces(self, x: Tensor, pieces: list[int], mask: Tensor | None) -> Tensor:
        """The outputs of pieces of x that come one after the other, with a cache."""
        placed = self._copy(training=False)
        cache = placed.whole.make_cache()  # type: ignore[operator]
        outputs, end = [], 0
        for piece in pieces:
            begin, end = end, end + piece
            outputs.append(placed.call(x[:, begin:end], cache, *(() if mask is None else (mask[:, :end],))))
        return torch.cat(outputs, dim=1)

    def _copy(self, training: bool) -> "Placed":
        part, whole = copy.deepcopy((self.part, self.whole))
        return Placed(part, whole.train(training), self.dim, self.takes_mask)


class Place:
    """A source of fresh instances of one part.

    Args:
        make: a new part in its place, drawn from torch's generator.
        longest: the length of the sequences that it will be trained on.
        model: the same with all layers of a model as the whole, if there is one.
    """

    def __init__(
        self, make: Callable[[], Placed], longest: int = LENGTH, model: Callable[[], Placed] | None = None
    ) -> None:
        self.make = make
        self.longest = longest
        self.model = None if model is None else Place(model, longest)
        self._length: int | None = None
        self._dtype = torch.float64
        self._deterministic: dict[bool, bool] = {}
        self._repeatable: dict[bool, bool] = {}

    @property
    def length(self) -> int:
        """`LENGTH`, or the longest if it runs on that alone, as a mixer that wants whole chunks."""
        if self._length is None:
            self._length = LENGTH
            torch.default_generator.manual_seed(0)
            if self.longest > LENGTH and not _runs(self.make(), LENGTH) and _runs(self.make(), self.longest):
                self._length = self.longest
        return self._length

    def fresh(self, dtype: torch.dtype | None = None, seed: int = 0) -> Placed:
        """Make it float64, which tells a leak from rounding, or float32 where the part cannot do that."""
        torch.default_generator.manual_seed(seed)
        placed = self.make()
        _stir(placed.part)
        dtype = dtype or self._dtype
        placed = Placed(placed.part, placed.whole.to(dtype), placed.dim)
        if dtype == torch.float64:
            try:
                placed.run(placed.random(2, 3 if self.length == LENGTH else self.length))
            except Exception:  # what a foreign module raises at another dtype has no common base
                self._dtype = torch.float32
                return self.fresh(seed=seed)
        return placed

    def is_deterministic(self, training: bool) -> bool:
        """Whether it draws no random numbers."""
        if training not in self._deterministic:
            placed = self.fresh()
            x = placed.random(2, self.length)
            copied = placed._copy(training)
            _seed(0)
            seeded, own = _global_states(), list(_own_states(copied.whole))
            with torch.no_grad():
                y = copied.call(x)
            drew = _global_states() != seeded
            others = (placed.run(x, training=training, seed=seed) for seed in range(1, DRAWS))
            self._deterministic[training] = list(_own_states(copied.whole)) == own and (
                not drew or all(torch.equal(y, other) for other in others)
            )
        return self._deterministic[training]

    def is_repeatable(self, training: bool) -> bool:
        """Whether the same input and seeds give the same output, so that two outputs can be compared."""
        if training not in self._repeatable:
            placed = self.fresh()
            x = placed.random(2, self.length)
            y = placed.run(x, training=training).nan_to_num()
            others = (placed.run(x, training=training).nan_to_num() for _ in range(REPEATS))
            bound = 1e-5 * y.abs().max().item() if y.numel() else 0.0
            self._repeatable[training] = all(torch.allclose(y, other, rtol=0, atol=bound) for other in others)
        return self._repeatable[training]


def _require_unchanged(name: str, x: Tensor, given: Tensor) -> None:
    if not torch.equal(x.detach().nan_to_num(), given.nan_to_num()):
        raise InputError(f"it changes {name} in place, which others read too; must make a new tensor")


def _seed(seed: int) -> None:
    """Seed what a run seeds."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow: it seeds GPUs, with a stack trace
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def _global_states() -> tuple[str, ...]:
    """The generators that a run seeds, as they stand."""
    return str(torch.get_rng_state().tolist()), repr(random.getstate()), repr(np.random.get_state())  # noqa: NPY002


def _own_states(module: nn.Module) -> Iterator[str]:
    """The generators that a module and those below it hold."""
    for each in module.modules():
        for value in vars(each).values():
            if isinstance(value, torch.Generator):
                yield str(value.get_state().tolist())
            elif isinstance(value, random.Random):
                yield repr(value.getstate())
            elif isinstance(value, np.random.Generator):
                yield repr(value.bit_generator.state)


def _runs(placed: Placed, length: int) -> bool:
    try:
        placed.run(placed.random(2, length))
    except Exception:  # what a foreign module raises has no common base
        return False
    return True


def put(seam: Seam, part: Any, dim: int) -> Placed:
    """A part in its place. A router and experts are called within a MoE layer without a shared expert.

    Raises:
        InputError: what is in the way of it.
    """
    if seam == "dispatcher":
        layer = MoE.build(dim, HIDDEN, 4, top_k=2, shared_hidden_dim=0, dispatcher=part)
        return Placed(layer, layer, dim)
    if not isinstance(part, nn.Module):
        raise InputError(f"found a {type(part).__name__}; a {seam} must be a torch.nn.Module")
    if seam == "router":
        tokens = torch.randn(8, dim)
        with torch.no_grad():
            decided = copy.deepcopy(part)(tokens, **beside_tokens(part, tokens))
        if not isinstance(decided, tuple) or not isinstance(decided[0], Tensor):
            raise InputError(f"{type(part).__name__} returned {type(decided).__name__}; a router must return a Routing")
        experts = Experts(decided[0].size(-1), dim, HIDDEN, backend="loop")
        return Placed(part, MoE(router=part, experts=experts, dispatcher=LocalDispatcher()), dim)
    if seam == "expert":
        num_experts = getattr(part, "num_experts", 4)
        return Placed(part, MoE(router=TopKRouter(dim, num_experts, top_k=min(2, num_experts)), experts=part), dim)
    return Placed(part, part, dim)


class Stack(nn.Module):
    """The blocks of a model, without embedding and head, in the place of a part."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.takes_token_ids = any(block.takes_token_ids for block in self.blocks)

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """x (B, L, D) and the ids (B, L) of its tokens -> (B, L, D)."""
        state = None
        for block in self.blocks:
            x, routing = block(x, token_ids=token_ids, router_state=state)
            state = state if routing is None else routing.state
        return x


def stack(wholes: Iterable[nn.Module], seam: Seam, dim: int) -> Placed:
    """Parts in their places, one behind the other with a norm before and a residual around each."""
    blocks = []
    for whole in wholes:
        mixer, ffn = (whole, nn.Identity()) if seam == "mixer" else (nn.Identity(), whole)
        blocks.append(Block(mixer=mixer, ffn=ffn, mixer_norm=RMSNorm(dim), ffn_norm=RMSNorm(dim)))
    layers = Stack(blocks)
    return Placed(layers, layers, dim, takes_mask=False)


def token_ids_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Ids (B, L) for a router that asks for them, made of the tokens (B, L, D): equal tokens have equal ids."""
    vocabularies = (size for each in layer.modules() if isinstance(size := getattr(each, "vocab_size", None), int))
    return (x[..., 0].detach().double() * 1e3).long() % next(vocabularies, 64)


def _takes_three(module: nn.Module) -> bool:
    """Whether it can be called with x, a cache and an attention mask."""
    try:
        inspect.signature(module.forward).bind(*range(3))
    except TypeError:
        return False
    return True


@torch.no_grad()
def _stir(part: nn.Module) -> None:
    """Move parameters that are constant, such as zeros: a product with them would hide what stands behind it."""
    generator = torch.Generator().manual_seed(11)
    for p in part.parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
            scale = p.size(-1) ** -0.5 if p.dim() > 1 else 0.1
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=scale)
