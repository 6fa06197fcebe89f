"""Backends of the routed experts: pure functions of rows sorted by expert, stacked weights and row counts.

All take rows (R, D), gate_up (E, D, 2F) with the gate first, down (E, F, D), rows_per_expert (E,) int64 that sums to R
and the activation of the gate, return (R, D), and agree with `loop`, the oracle, in outputs and every gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["cannot_repeat", "grouped", "is_silu", "loop", "padded", "sliced", "sliced_recompute"]

Activation = Callable[[Tensor], Tensor]
BLOCK_ROWS = 512


def loop(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """One expert after the other: the oracle. Any dtype and shape.

    Experts without rows run on empty matrices, so that every weight has a gradient (DistributedDataParallel needs it).
    `unbind`, because the backward of `weight[e]` would zero-fill a whole (E, ...) gradient for every expert.
    """
    outputs = []
    for x, gate_up_e, down_e in zip(rows.split(rows_per_expert.tolist()), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = (x @ gate_up_e).chunk(2, dim=-1)
        outputs.append((activation(gate) * up) @ down_e)
    return torch.cat(outputs)


def padded(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """One batched matmul, every expert padded to the fullest one: good when balanced, memory grows with skew."""
    # at least 2 rows: a compiler would otherwise have to ask whether they are 0 or 1
    num_experts, capacity = gate_up.size(0), torch.sym_max(int(rows_per_expert.max()), 2)
    first_row = rows_per_expert.cumsum(0) - rows_per_expert
    expert_of_row = torch.arange(num_experts, device=rows.device).repeat_interleave(rows_per_expert)
    place = torch.arange(rows.size(0), device=rows.device) - first_row[expert_of_row]
    place = place + expert_of_row * capacity
    x = rows.new_zeros(num_experts * capacity, rows.size(1)).index_copy(0, place, rows)
    gate, up = torch.bmm(x.unflatten(0, (num_experts, capacity)), gate_up).chunk(2, dim=-1)
    y = torch.bmm(activation(gate) * up, down)
    return y.flatten(0, 1).index_select(0, place)


def grouped(rows: Tensor, gate_up: Tensor, down: Tensor, rows_per_expert: Tensor, activation: Activation) -> Tensor:
    """`torch.nn.functional.grouped_mm`: no padding, no host synchronisation."""
    ends = rows_per_expert.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(rows, gate_up, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(activation(gate) * up, down, offs=ends)
    if y.requires_grad:  # its backward refuses an expanded gradient, such as that of y.sum()
        y.register_hook(torch.Tensor.contiguous)
    return y


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
    blocks = make_blocks(counts, rounding(rows))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, gate_up, down)):
        y: Tensor = SlicedExperts.apply(rows, gate_up, down, blocks, activation, recompute)[0]
        return y
    return forward_in_slices(rows, gate_up, down, blocks, activation)


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
        blocks: "list[Block]",
        activation: Activation,
        recompute: bool,
    ) -> tuple[Tensor, Tensor | None]:
        kept = None if recompute else rows.new_empty(sum(block.size for block in blocks), gate_up.size(2))
        return forward_in_slices(rows, gate_up, down, blocks, activation, kept), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        rows, gate_up, down, ctx.blocks, ctx.activation, _ = inputs
        kept = output[1]
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)  # zeros for `kept` would be as large as it
        ctx.save_for_backward(rows, gate_up, down, kept)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_kept: None) -> tuple[Tensor | None, ...]:
        if d_y is None:
            return (None,) * 6
        arguments = (d_y, *ctx.saved_tensors, ctx.blocks, ctx.activation, ctx.needs_input_grad[:3])
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
    blocks: "list[Block]",
    activation: Activation,
    kept: Tensor | None = None,
) -> Tensor:
    """`kept` (P, 2F) receives the pre-activations."""
    y = with_room(rows, down.size(2))
    hidden_scratch = scratch(rows, down.size(1), blocks)
    memory = scratch(rows, gate_up.size(2), blocks) if kept is None else kept
    gate_up_of, down_of = per_expert(gate_up, rows.dtype), per_expert(down, rows.dtype)
    for block in blocks:
        gate_and_up = memory[: block.size] if kept is None else memory[block.places]
        for piece in block.pieces:
            torch.mm(reach(rows, piece), gate_up_of[piece.expert], out=gate_and_up[piece.place])
        hidden = gated(activation, gate_and_up, out=hidden_scratch[: block.size])
        for piece in block.pieces:
            torch.mm(hidden[piece.place], down_of[piece.expert], out=y[piece.rows])
    return y[: rows.size(0)]


def backward_in_slices(
    d_y: Tensor,
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    kept: Tensor | None,
    blocks: "list[Block]",
    activation: Activation,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of rows, gate_up and down, where needed; `kept` as the forward left it."""
    need_rows, need_gate_up, need_down = needed
    d_y = d_y.contiguous()
    d_rows = with_room(rows, rows.size(1)) if need_rows else None
    d_gate_up = WeightGradient(gate_up, rows.dtype, blocks) if need_gate_up else None
    d_down = WeightGradient(down, rows.dtype, blocks) if need_down else None
    hidden_scratch, d_hidden_scratch = scratch(rows, down.size(1), blocks), scratch(rows, down.size(1), blocks)
    memory = scratch(rows, gate_up.size(2), blocks) if kept is None else kept
    d_gate_up_scratch = scratch(rows, gate_up.size(2), blocks)
    gate_up_of, down_of = per_expert(gate_up, rows.dtype), per_expert(down, rows.dtype)
    for block in blocks:
        gate_and_up = memory[: block.size] if kept is None else memory[block.places]
        hidden, d_hidden = hidden_scratch[: block.size], d_hidden_scratch[: block.size]
        d_gate_and_up = d_gate_up_scratch[: block.size]
        if kept is None:
            for piece in block.pieces:
                torch.mm(reach(rows, piece), gate_up_of[piece.expert], out=gate_and_up[piece.place])
        if need_rows or need_gate_up:
            for piece in block.pieces:
                torch.mm(reach(d_y, piece), down_of[piece.expert].t(), out=d_hidden[piece.place])
            gated_backward(activation, gate_and_up, d_hidden, out=d_gate_and_up, hidden=hidden)
        else:
            gated(activation, gate_and_up, out=hidden)
        for piece in block.pieces:  # what was reached beyond the piece must not count in sums over its rows
            if piece.surplus is not None:
                hidden[piece.surplus].zero_()
                d_gate_and_up[piece.surplus].zero_()
        if d_down:
            for piece in block.pieces:
                d_down.add(piece.expert, hidden[piece.place], reach(d_y, piece))
        if d_gate_up:
            for piece in block.pieces:
                d_gate_up.add(piece.expert, reach(rows, piece), d_gate_and_up[piece.place])
        if d_rows is not None:
            for piece in block.pieces:
                torch.mm(d_gate_and_up[piece.place], gate_up_of[piece.expert].t(), out=d_rows[piece.rows])
    d_rows = None if d_rows is None else d_rows[: rows.size(0)]
    return d_rows, d_gate_up.total if d_gate_up else None, d_down.total if d_down else None


class Piece(NamedTuple):
    """Rows of one expert in a block. Rounded up, they reach into the rows of the next expert.

    What is read there is computed with and thrown away; what is written there is overwritten, as the next expert comes
    next. So rounding up copies nothing.
    """

    expert: int
    rows: slice
    place: slice
    """In the block's scratch memory, where pieces do not overlap."""
    surplus: slice | None
    """The places of what was rounded up."""


class Block(NamedTuple):
    """Neighbouring pieces whose activations are computed at once, in cache."""

    pieces: list[Piece]
    places: slice
    """Among those of all blocks."""

    @property
    def size(self) -> int:
        return self.places.stop - self.places.start


def make_blocks(counts: list[int], multiple: int) -> list[Block]:
    """At least BLOCK_ROWS each, because operations on few rows are all overhead; of one expert at most as many."""
    blocks: list[Block] = []
    pieces: list[Piece] = []
    begin = first = size = 0
    for expert, count in enumerate(counts):
        for start in range(begin, begin + count, BLOCK_ROWS):
            exact = min(BLOCK_ROWS, begin + count - start)
            rounded = -(-exact // multiple) * multiple
            surplus = slice(size + exact, size + rounded) if rounded > exact else None
            pieces.append(Piece(expert, slice(start, start + rounded), slice(size, size + rounded), surplus))
            size += rounded
            if size >= BLOCK_ROWS:
                blocks.append(Block(pieces, slice(first, first + size)))
                first, pieces, size = first + size, [], 0
        begin += count
    if pieces:
        blocks.append(Block(pieces, slice(first, first + size)))
    return blocks


def reach(rows: Tensor, piece: Piece) -> Tensor:
    """The rows of a piece, with zeros where it reaches beyond the last row of all."""
    found = rows[piece.rows]
    missing = piece.rows.stop - piece.rows.start - found.size(0)
    return found if not missing else torch.cat((found, found.new_zeros(missing, found.size(1))))


def with_room(rows: Tensor, width: int) -> Tensor:
    """Memory for results of all rows, and for what the last pieces write beyond them."""
    return rows.new_empty(rows.size(0) + rounding(rows) - 1, width)


def scratch(like: Tensor, width: int, blocks: list[Block]) -> Tensor:
    return like.new_empty(max((block.size for block in blocks), default=0), width)


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

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype, blocks: list[Block]) -> None:
        self.total = torch.empty_like(weight)
        self.totals = self.total.unbind()
        self.product = torch.empty_like(weight[0], dtype=compute_dtype) if weight.dtype != compute_dtype else None
        self.expert = -1
        for expert in set(range(weight.size(0))) - {piece.expert for block in blocks for piece in block.pieces}:
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
