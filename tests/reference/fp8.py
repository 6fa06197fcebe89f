"""FP8, one number at a time: all numbers of a format by its definition, and the nearest of them. No code of moesaic."""

import bisect
import functools
import math

import torch
from torch import Tensor

BITS = {"e4m3": (4, 3), "e5m2": (5, 2)}


@functools.cache
def numbers(name: str) -> list[float]:
    """Every finite number >= 0 of a format (Micikevicius et al. 2022, table 1), in order; its place is its code."""
    exponent_bits, mantissa_bits = BITS[name]
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        if name == "e4m3" and code == 2**7 - 1:  # the only nan
            continue
        if name == "e5m2" and exponent == 31:  # infinity and nans
            continue
        fraction = mantissa / 2**mantissa_bits
        found.append(2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction)
    return found


def nearest(x: float, name: str) -> float:
    """The nearest number of a format; of two as near, the one with the even code."""
    table, size = numbers(name), abs(x)
    above = min(bisect.bisect_left(table, size), len(table) - 1)
    below = max(above - 1, 0)
    gap = (size - table[below]) - (table[above] - size)
    code = above if gap > 0 or (gap == 0 and above % 2 == 0) else below
    return math.copysign(table[code], x)


def exponent_of_scale(largest: float, name: str) -> int:
    """The largest n for which largest * 2**n is a number of the format's range."""
    n = math.floor(math.log2(numbers(name)[-1] / largest)) + 2 if largest else 0
    while largest * 2.0**n > numbers(name)[-1]:
        n -= 1
    return n


def rounded(x: Tensor, dim: int | None, name: str) -> Tensor:
    """x (M, N) as float64, each number rounded under the scale of those along `dim`, or of the whole matrix."""
    result = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(x.size(0)):
        for j in range(x.size(1)):
            shared = x if dim is None else x[:, j] if dim == 0 else x[i]
            n = exponent_of_scale(float(shared.abs().max()), name)
            result[i, j] = nearest(float(x[i, j]) * 2.0**n, name) / 2.0**n
    return result


def product_and_gradients(
    x: Tensor, weight: Tensor, d_y: Tensor, scaling: str = "rowwise", operands: tuple[str, ...] = ("x", "w", "d")
) -> tuple[Tensor, Tensor, Tensor]:
    """x @ weight and the gradients of both, in float64, each from operands rounded along what it sums over."""

    def low(operand: str, matrix: Tensor, dim: int) -> Tensor:
        if operand not in operands:
            return matrix.double()
        if scaling == "rowwise":
            return rounded(matrix, dim, "e4m3")
        return rounded(matrix, None, "e5m2" if operand == "d" else "e4m3")

    y = low("x", x, 1) @ low("w", weight, 0)
    d_x = low("d", d_y, 1) @ low("w", weight, 1).T
    d_weight = low("x", x, 0).T @ low("d", d_y, 0)
    return y, d_x, d_weight


def grouped_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, ends: Tensor) -> Tensor:
    """What torch.nn.functional.scaled_grouped_mm documents, group by group; rows of no group come out as nan."""
    starts = [0, *ends.tolist()[:-1]]
    spans = [slice(start, end) for start, end in zip(starts, ends.tolist(), strict=True)]
    if b.dim() == 3:
        y = torch.full((a.size(0), b.size(2)), math.nan)
        for e, span in enumerate(spans):
            y[span] = (a[span].float() * scale_a[span, None]) @ (b[e].float() * scale_b[e])
        return y.bfloat16()
    by_a, by_b = scale_a.view(len(spans), -1, 1), scale_b.view(len(spans), 1, -1)
    products = [(a[:, span].float() * by_a[e]) @ (b[span].float() * by_b[e]) for e, span in enumerate(spans)]
    return torch.stack(products).bfloat16()
