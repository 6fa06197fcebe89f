"""Products in FP8, emulated: every operand is rounded to 8 bits and back, then multiplied as usual.

Emulation shows on any device what FP8 does to numbers. It is slower than products without it, not faster. Formats are
those of Micikevicius et al. 2022 (arXiv 2209.05433); the recipes "rowwise" and "tensorwise" are those of torchao.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.layers.checks import require_choice
from moesaic.layers.sliced import Activation

__all__ = ["Fp8Recipe", "Operand", "fp8_emulated", "fp8_product", "quantize", "round_to_fp8", "scales_for"]

Operand = Literal["activations", "weights", "gradients"]
"""What is multiplied in training; each of the three products of a layer has two of them."""


Scaling = Literal["rowwise", "tensorwise", "mxfp8"]

BLOCK = 32
"""Numbers that share a scale in MXFP8."""


class _Format(NamedTuple):
    mantissa_bits: int
    least: int
    """Exponent of the smallest number that has all bits of the mantissa."""
    largest: int
    """n, where the largest number is 1.75 * 2**n: 448 and 57344."""


FORMATS = {torch.float8_e4m3fn: _Format(3, -6, 8), torch.float8_e5m2: _Format(2, -14, 15)}


@dataclasses.dataclass(frozen=True)
class Fp8Recipe:
    """Operands that are rounded, and which numbers share a scale. Scales are powers of two.

    "rowwise": the numbers that are summed in one product share one, and everything is e4m3 (4 bits of exponent, 3 of
    mantissa). "tensorwise": a whole matrix shares one, and gradients are e5m2, which has more range and less precision.
    Each expert is a matrix of its own. "mxfp8": 32 of the numbers that are summed share one, and everything is e4m3, as
    in OCP's Microscaling Formats 1.0; its scale is the least that saturates no number.
    """

    scaling: Scaling = "rowwise"
    operands: tuple[Operand, ...] = get_args(Operand)

    def __post_init__(self) -> None:
        require_choice(get_args(Scaling), scaling=self.scaling)
        if not self.operands:
            raise ValueError(f"operands=(): must be one or more of {', '.join(get_args(Operand))}")
        for operand in self.operands:
            require_choice(get_args(Operand), operands=operand)

    def round(self, operand: Operand, x: Tensor, contracted: int) -> Tensor:
        """What FP8 leaves of x (M, N), an operand of a product that sums over dimension `contracted`."""
        if operand not in self.operands:
            return x
        if self.scaling == "rowwise":
            return round_to_fp8(x, contracted)
        if self.scaling == "mxfp8":
            return _round_blocks(x, contracted)
        return round_to_fp8(x, None, torch.float8_e5m2 if operand == "gradients" else torch.float8_e4m3fn)


@torch.no_grad()
def round_to_fp8(x: Tensor, dim: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """The numbers of x (..., M, N) after `quantize` and back, in the dtype of x. No gradient flows.

    By additions in fp32, because casts from 8 bits are slow on a CPU. What is added and taken away again is so large
    that its last bit is the last one that the format leaves of a number.
    """
    if not x.numel():
        return x
    up, down = _scales(x, dim, dtype)
    kept = FORMATS[dtype]
    scaled = x.float() * up
    exponent = (scaled.view(torch.int32) & 0x7F800000).clamp_(min=kept.least + 127 << 23)
    anchor = exponent.add_((23 - kept.mantissa_bits << 23) + 0x400000).view(torch.float32)  # 1.5 * 2**n
    return (scaled.add_(anchor).sub_(anchor).mul_(down)).to(x.dtype)


def _round_blocks(x: Tensor, dim: int) -> Tensor:
    """x (M, N) rounded to e4m3, where each `BLOCK` numbers along a dimension share a scale; the last may be fewer."""
    rows = x.movedim(dim, -1)
    blocks = F.pad(rows, (0, -rows.size(-1) % BLOCK)).unflatten(-1, (-1, BLOCK))
    return round_to_fp8(blocks, -1).flatten(-2)[..., : rows.size(-1)].movedim(-1, dim)


@torch.no_grad()
def quantize(x: Tensor, dim: int | None, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """x (..., M, N), not empty, in an FP8 format; nan and infinities stay what they are, or become nan.

    Args:
        dim: the numbers along it share a scale; None: a whole matrix does.

    Returns:
        values in `dtype`, and factors in fp32 of size 1 along what shares them: x is about values * factors.
    """
    up, down = _scales(x, dim, dtype)
    return (x * up).to(dtype), down


def _scales(x: Tensor, dim: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return scales_for(x.abs().amax((-2, -1) if dim is None else dim, keepdim=True), dtype)


def scales_for(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest powers of two that take `largest` >= 0 into the range of an FP8 format, and their inverses: fp32.

    By integers, because powers of floating-point numbers are not exact on every device.
    """
    bits = largest.float().view(torch.int32)
    exponent = (bits + 0x1FFFFF >> 23) - 127  # the least n with largest <= 1.75 * 2**n
    up = (FORMATS[dtype].largest - exponent).clamp(-126, 126)
    return (up + 127 << 23).view(torch.float32), (127 - up << 23).view(torch.float32)


def fp8_product(x: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    """x (R, K) @ weight (K, N) -> (R, N), both of one dtype, which the result has too.

    The product, the gradient of x and that of the weight round their operands along what each of them sums over. First
    derivatives only.
    """
    y: Tensor = _Fp8Product.apply(x, weight, recipe)
    return y


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
        return recipe.round("activations", x, 1) @ recipe.round("weights", weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.recipe = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        recipe: Fp8Recipe = ctx.recipe
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = recipe.round("gradients", d_y, 1) @ recipe.round("weights", weight, 1).t()
        if ctx.needs_input_grad[1]:
            d_weight = recipe.round("activations", x, 0).t() @ recipe.round("gradients", d_y, 0)
        return d_x, d_weight, None


def fp8_emulated(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    rows_per_expert: Tensor,
    activation: Activation,
    recipe: Fp8Recipe = Fp8Recipe(),
) -> Tensor:
    """One expert after the other, as `loop`, by `fp8_product`. Any device, dtype and number of rows."""
    outputs = []
    for x, gate_up_e, down_e in zip(rows.split(rows_per_expert.tolist()), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = fp8_product(x, gate_up_e, recipe).chunk(2, dim=-1)
        outputs.append(fp8_product(activation(gate) * up, down_e, recipe))
    return torch.cat(outputs)
