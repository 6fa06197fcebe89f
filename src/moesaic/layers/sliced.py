"""The CPU's backend of the routed experts: one autograd function over the slice of rows of each expert.

It is lean and, on a CPU, as fast as any. It agrees with `moesaic.layers.backends.loop`, the oracle, in outputs and
every gradient. Nothing else in the layers depends on how it works.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Tile", "cannot_repeat", "is_silu", "make_tiles", "rounding", "sliced", "sliced_recompute", "tiles_of"]

Activation = Callable[[Tensor], Tensor]
TILE_ROWS = 512


def sliced(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """One autograd function over the slice of rows of each expert: lean, and the fastest on a CPU.

    It keeps rows and pre-activations (R, 2F) for the backward, which writes each expert's gradient where it belongs.
    Weights in another dtype than the rows are cast one expert at a time; their gradients are in their own dtype.

    First derivatives only. The backward calls the activation again, see `cannot_repeat`.
    """
    return run_sliced(rows, gate_up, down, rows_per_expert, activation, recompute=False)


def sliced_recompute(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation
) -> Tensor:
    """`sliced` that keeps the rows only, and computes the pre-activations once more in the backward."""
    return run_sliced(rows, gate_up, down, rows_per_expert, activation, recompute=True)


def cannot_repeat(activation: Activation, gate: Tensor) -> str | None:
    """Why it would be wrong to call `activation` a second time in the backward, if it would be."""
    if is_silu(activation):
        return None
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        random_state = torch.get_rng_state()
        if activation(gate.detach().clone()).requires_grad:
            return "the activation has parameters that train"
        if not torch.equal(random_state, torch.get_rng_state()):
            return "the activation draws random numbers"
    return None


def is_silu(activation: Activation) -> bool:
    return activation is F.silu or isinstance(activation, nn.SiLU)


def run_sliced(
    rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation, *, recompute: bool
) -> Tensor:
    counts = rows_per_expert.tolist()
    if len(counts) != gate_up.size(0):
        raise ValueError(f"rows_per_expert counts the rows of {len(counts)} experts: gate_up has {gate_up.size(0)}")
    if sum(counts) != rows.size(0):
        raise ValueError(f"rows_per_expert sums to {sum(counts)}: there are {rows.size(0)} rows")
    rows = rows.contiguous()
    tiles = make_tiles(counts, rounding(rows))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, gate_up, down)):
        y: Tensor = SlicedExperts.apply(rows, gate_up, down, tiles, activation, recompute)[0]
        return y
    return forward_in_slices(rows, gate_up, down, tiles, activation)


def rounding(rows: Tensor) -> int:
    """What the numbers of rows of matmuls are rounded up to.

    oneDNN, which does torch's half precision matmuls on a CPU, compiles one for every shape that it has not met lately.
    That takes longer than to run it, and row counts never stop to change. 16 rows are a tile of AMX.
    """
    return 16 if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16) else 1


class SlicedExperts(torch.autograd.Function):
    """-> rows out (R, D), and the pre-activations (P, 2F) kept for the backward or None. P is R, rounded up."""

    @staticmethod
    def forward(
        rows: Tensor,
        gate_up: Tensor,
        down: Tensor,
        tiles: "list[Tile]",
        activation: Activation,
        recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:
        kept = None if recompute else rows.new_empty(sum(tile.size for tile in tiles), gate_up.size(2))
        return forward_in_slices(rows, gate_up, down, tiles, activation, kept), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        rows, gate_up, down, ctx.tiles, ctx.activation, _ = inputs
        kept = output[1]
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)  # zeros for `kept` would be as large as it
        ctx.save_for_backward(rows, gate_up, down, kept)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_kept: None) -> tuple[Tensor | None, ...]:
        if d_y is None:
            return (None,) * 6
        arguments = (d_y, *ctx.saved_tensors, ctx.tiles, ctx.activation, ctx.needs_input_grad[:3])
        wants_graph = torch.is_grad_enabled()  # create_graph=True, or torch.func
        gradients = SlicedGradients.apply(*arguments) if wants_graph else backward_in_slices(*arguments)
        return *gradients, None, None, None


class SlicedGradients(torch.autograd.Function):
    """A function of its own, so that a second derivative is an error and not silently wrong."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        return backward_in_slices(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("the sliced backends have first derivatives only: use backend='loop' for second ones")


def forward_in_slices(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    tiles: "list[Tile]",
    activation: Activation,
    kept: Tensor | None = None,
) -> Tensor:
    """`kept` (P, 2F) receives the pre-activations."""
    y = with_room(rows, down.size(2))
    hidden_scratch = scratch(rows, down.size(1), tiles)
    memory = scratch(rows, gate_up.size(2), tiles) if kept is None else kept
    gate_up_of, down_of = per_expert(gate_up, rows.dtype), per_expert(down, rows.dtype)
    for tile in tiles:
        gate_and_up = memory[: tile.size] if kept is None else memory[tile.places]
        for piece in tile.pieces:
            torch.mm(reach(rows, piece), gate_up_of[piece.expert], out=gate_and_up[piece.place])
        hidden = gated(activation, gate_and_up, out=hidden_scratch[: tile.size])
        for piece in tile.pieces:
            torch.mm(hidden[piece.place], down_of[piece.expert], out=y[piece.rows])
    return y[: rows.size(0)]


def backward_in_slices(
    d_y: Tensor,
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    kept: Tensor | None,
    tiles: "list[Tile]",
    activation: Activation,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows, gate_up and down, where needed; `kept` as the forward left it."""
    need_rows, need_gate_up, need_down = needed
    d_y = d_y.contiguous()
    d_rows = with_room(rows, rows.size(1)) if need_rows else None
    d_gate_up = WeightGradient(gate_up, rows.dtype, tiles) if need_gate_up else None
    d_down = WeightGradient(down, rows.dtype, tiles) if need_down else None
    hidden_scratch, d_hidden_scratch = scratch(rows, down.size(1), tiles), scratch(rows, down.size(1), tiles)
    memory = scratch(rows, gate_up.size(2), tiles) if kept is None else kept
    d_gate_up_scratch = scratch(rows, gate_up.size(2), tiles)
    gate_up_of, down_of = per_expert(gate_up, rows.dtype), per_expert(down, rows.dtype)
    for tile in tiles:
        gate_and_up = memory[: tile.size] if kept is None else memory[tile.places]
        hidden, d_hidden = hidden_scratch[: tile.size], d_hidden_scratch[: tile.size]
        d_gate_and_up = d_gate_up_scratch[: tile.size]
        if kept is None:
            for piece in tile.pieces:
                torch.mm(reach(rows, piece), gate_up_of[piece.expert], out=gate_and_up[piece.place])
        if need_rows or need_gate_up:
            for piece in tile.pieces:
                torch.mm(reach(d_y, piece), down_of[piece.expert].t(), out=d_hidden[piece.place])
            gated_backward(activation, gate_and_up, d_hidden, out=d_gate_and_up, hidden=hidden)
        else:
            gated(activation, gate_and_up, out=hidden)
        for piece in tile.pieces:  # what was reached beyond the piece must not count in sums over its rows
            if piece.surplus is not None:
                hidden[piece.surplus].zero_()
                d_gate_and_up[piece.surplus].zero_()
        if d_down:
            for piece in tile.pieces:
                d_down.add(piece.expert, hidden[piece.place], reach(d_y, piece))
        if d_gate_up:
            for piece in tile.pieces:
                d_gate_up.add(piece.expert, reach(rows, piece), d_gate_and_up[piece.place])
        if d_rows is not None:
            for piece in tile.pieces:
                torch.mm(d_gate_and_up[piece.place], gate_up_of[piece.expert].t(), out=d_rows[piece.rows])
    d_rows = None if d_rows is None else d_rows[: rows.size(0)]
    return d_rows, d_gate_up.total if d_gate_up else None, d_down.total if d_down else None


class Piece(NamedTuple):
    """Rows of one expert in a tile. Rounded up, they reach into the rows of the next expert.

    What is read there is computed with and thrown away; what is written there is overwritten, as the next expert comes
    next. So rounding up copies nothing.
    """

    expert: int
    rows: slice
    place: slice
    """In the tile's scratch memory, where pieces do not overlap."""
    surplus: slice | None
    """The places of what was rounded up."""


class Tile(NamedTuple):
    """Neighboring pieces whose activations are computed at once, in cache."""

    pieces: list[Piece]
    places: slice
    """Among those of all tiles."""

    @property
    def size(self) -> int:
        return self.places.stop - self.places.start


def make_tiles(counts: list[int], multiple: int) -> list[Tile]:
    """At least TILE_ROWS each, because operations on few rows are all overhead; of one expert at most as many."""
    tiles: list[Tile] = []
    pieces: list[Piece] = []
    begin = first = size = 0
    for expert, count in enumerate(counts):
        for start in range(begin, begin + count, TILE_ROWS):
            exact = min(TILE_ROWS, begin + count - start)
            rounded = -(-exact // multiple) * multiple
            surplus = slice(size + exact, size + rounded) if rounded > exact else None
            pieces.append(Piece(expert, slice(start, start + rounded), slice(size, size + rounded), surplus))
            size += rounded
            if size >= TILE_ROWS:
                tiles.append(Tile(pieces, slice(first, first + size)))
                first, pieces, size = first + size, [], 0
        begin += count
    if pieces:
        tiles.append(Tile(pieces, slice(first, first + size)))
    return tiles


def tiles_of(counts: list[int], multiple: int) -> tuple[int, int]:
    """Rows of all tiles that `make_tiles` makes, and of the largest one, in time that does not grow with the counts."""
    total = largest = size = 0
    for count in counts:
        full, rest = divmod(count, TILE_ROWS)
        rounded = -(-rest // multiple) * multiple
        total += full * TILE_ROWS + rounded
        if full:  # the first one ends a tile that was begun
            largest, size = max(largest, size + TILE_ROWS), 0
        size += rounded
        if size >= TILE_ROWS:
            largest, size = max(largest, size), 0
    return total, max(largest, size)


def reach(rows: Tensor, piece: Piece) -> Tensor:
    """The rows of a piece, with zeros where it reaches beyond the last row of all."""
    found = rows[piece.rows]
    missing = piece.rows.stop - piece.rows.start - found.size(0)
    return found if not missing else torch.cat((found, found.new_zeros(missing, found.size(1))))


def with_room(rows: Tensor, width: int) -> Tensor:
    """Memory for results of all rows, and for what the last pieces write beyond them."""
    return rows.new_empty(rows.size(0) + rounding(rows) - 1, width)


def scratch(like: Tensor, width: int, tiles: list[Tile]) -> Tensor:
    return like.new_empty(max((tile.size for tile in tiles), default=0), width)


def per_expert(weight: Tensor, dtype: torch.dtype) -> "tuple[Tensor, ...] | CastExperts":
    return (
        weight.unbind() if weight.dtype == dtype else CastExperts(weight, dtype)
    )  # unbind: cheaper than many weight[e]


class CastExperts:
    """`weight` (E, in, out) in another dtype, of which only the expert asked for last exists."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weights = weight.unbind()
        self.expert = -1
        self.cast = torch.empty_like(weight[0], dtype=dtype)

    def __getitem__(self, expert: int) -> Tensor:
        if expert != self.expert:
            self.cast.copy_(self.weights[expert])
            self.expert = expert
        return self.cast


class WeightGradient:
    """The gradient of a stacked weight (E, in, out): a sum of a.T @ b for each expert, zero for those without rows."""

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, tiles: list[Tile]) -> None:
        self.total = torch.empty_like(weight)
        self.totals = self.total.unbind()
        self.product = torch.empty_like(weight[0], dtype=compute_dtype) if weight.dtype != compute_dtype else None
        self.expert = -1
        for expert in set(range(weight.size(0))) - {piece.expert for tile in tiles for piece in tile.pieces}:
            self.totals[expert].zero_()

    def add(self, expert: int, a: Tensor, b: Tensor) -> None:
        """Experts come one after the other."""
        total, is_first, self.expert = self.totals[expert], expert != self.expert, expert
        if self.product is None:
            if is_first:
                torch.mm(a.t(), b, out=total)
            else:
                total.addmm_(a.t(), b)
            return
        torch.mm(a.t(), b, out=self.product)
        if is_first:
            total.copy_(self.product)
        else:
            total.add_(self.product)


def gated(activation: Activation, gate_and_up: Tensor, *, out: Tensor) -> Tensor:
    """activation(gate) * up."""
    gate, up = gate_and_up.chunk(2, dim=1)
    if is_silu(activation):
        return torch.ops.aten.silu.out(gate, out=out).mul_(up)
    with torch.autocast(gate.device.type, enabled=False):
        return torch.mul(activation(gate.clone()), up, out=out)  # a clone: it may work in place


def gated_backward(
    activation: Activation, gate_and_up: Tensor, d_hidden: Tensor, *, out: Tensor, hidden: Tensor
) -> None:
    """The gradient of gate and up into `out`, `gated` into `hidden`. Overwrites d_hidden."""
    gate, up = gate_and_up.chunk(2, dim=1)
    d_gate, d_up = out.chunk(2, dim=1)
    if is_silu(activation):
        torch.ops.aten.silu.out(gate, out=hidden)
        torch.mul(d_hidden, hidden, out=d_up)
        hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
        return
    with torch.autocast(gate.device.type, enabled=False), torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        activated = activation(leaf.clone())
    torch.mul(d_hidden, activated.detach(), out=d_up)
    torch.mul(activated.detach(), up, out=hidden)
    d_gate.copy_(torch.autograd.grad(activated, leaf, d_hidden.mul_(up).to(activated.dtype))[0])
