"""Rotary position embedding (RoPE) on interleaved pairs, with the frequency scalings of Llama 3 and YaRN."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from moesaic.layers.checks import (
    require_flags,
    require_kinds,
    require_last,
    require_numbers,
    require_sizes,
    require_tensor,
)

__all__ = ["Llama3RopeScaling", "RopeScaling", "RotaryEmbedding", "YarnRopeScaling"]


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Stretch of the slow frequencies for contexts beyond `original_length` (Llama 3.1, `rope_type="llama3"`).

    A pair that turns more than `high_freq_factor` times within `original_length` tokens is kept, one that turns less
    than `low_freq_factor` times is slowed down by `factor`, and between the two the frequency is interpolated.
    """

    factor: float = dataclasses.field(metadata={"most": 1e9})
    low_freq_factor: float = dataclasses.field(metadata={"most": 1e9})
    high_freq_factor: float = dataclasses.field(metadata={"most": 1e9})
    original_length: int = dataclasses.field(metadata={"most": 2**40})

    def __post_init__(self) -> None:
        require_numbers(1, factor=self.factor)
        require_numbers(above=True, low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        require_sizes(original_length=self.original_length)
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor}: must not be below low_freq_factor={self.low_freq_factor}"
            )

    @property
    def amplitude(self) -> float:
        """What multiplies rotated queries and keys."""
        return 1.0

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Radians per token of each pair (H / 2,), scaled."""
        turns = self.original_length * frequencies / (2 * math.pi)
        band = self.high_freq_factor - self.low_freq_factor
        if band == 0:  # published Scout files: no band to interpolate in
            keep = (turns >= self.low_freq_factor).to(frequencies.dtype)
        else:
            keep = ((turns - self.low_freq_factor) / band).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnRopeScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a stretch by pair, and sharper attention (`rope_type="yarn"`).

    A pair that turns more than `beta_fast` times within `original_length` tokens is kept, one that turns less than
    `beta_slow` times is slowed down by `factor`. Between the two the share is linear in the number of the pair, where
    Llama 3's is linear in the turns. Rotated queries and keys are multiplied by an amplitude.

    Args:
        beta_fast, beta_slow: turns; 32 and 1 in the paper and in most models.
        truncate: whether the two bounds are rounded to whole pairs, outwards. gpt-oss does not.
        attention_factor: the amplitude; None for 0.1 ln(factor) + 1, as in the paper.
    """

    factor: float = dataclasses.field(metadata={"most": 1e9})
    original_length: int = dataclasses.field(metadata={"most": 2**40})
    beta_fast: float = dataclasses.field(metadata={"most": 1e9})
    beta_slow: float = dataclasses.field(metadata={"most": 1e9})
    truncate: bool
    attention_factor: float | None = dataclasses.field(default=None, metadata={"most": 1e6})

    def __post_init__(self) -> None:
        require_numbers(1, factor=self.factor)
        require_numbers(above=True, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        require_sizes(original_length=self.original_length)
        require_flags(truncate=self.truncate)
        if self.attention_factor is not None:
            require_numbers(above=True, attention_factor=self.attention_factor)
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast}: must not be below beta_slow={self.beta_slow}")

    @property
    def amplitude(self) -> float:
        """What multiplies rotated queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def apply(self, frequencies: Tensor, theta: float) -> Tensor:
        """Radians per token of each pair (H / 2,), scaled; `theta` is above 1."""
        pairs = frequencies.size(0)

        def pair_that_turns(times: float) -> float:
            return pairs * math.log(self.original_length / (times * 2 * math.pi)) / math.log(theta)

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)  # as transformers, which bounds pairs by head_dim
        numbers = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
        keep = 1 - ((numbers - first) / (last - first or 0.001)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / self.factor


RopeScaling = Llama3RopeScaling | YarnRopeScaling


class RotaryEmbedding(nn.Module):
    """Rotates the pairs (2j, 2j + 1) of each head by the angle position * theta^(-2j / head_dim).

    Su et al. 2021 (arXiv 2104.09864); interleaved pairs as in Meta's Llama code, not the half-split order of many
    other implementations. It has no parameters and no buffers: frequencies are recomputed in fp32 (a few hundred
    numbers), so `.to(bfloat16)` or the meta device cannot spoil them.
    """

    def __init__(self, head_dim: int, *, theta: float = 10000.0, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        require_sizes(head_dim=head_dim)
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: rotary embedding needs an even head_dim")
        require_numbers(above=True, theta=theta)
        require_kinds(RopeScaling, scaling=scaling)
        if isinstance(scaling, YarnRopeScaling) and theta <= 1:
            raise ValueError(f"theta={theta}: must be a number > 1 with YaRN")
        self.head_dim = head_dim
        self.theta = float(theta)
        self.scaling = scaling

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Radians per token of each pair, (head_dim / 2,) in fp32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        frequencies = 1.0 / (self.theta**exponents)
        return frequencies if self.scaling is None else self.scaling.apply(frequencies, self.theta)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, L, heads, head_dim) by positions (L,); fp32 inside, returned in x's dtype.

        Raises:
            TypeError: x is no floating-point tensor.
            ValueError: another shape.
        """
        require_last(x, self.head_dim, "RotaryEmbedding")
        require_tensor("RotaryEmbedding", "x", x, (None, None, None, None))
        require_tensor("RotaryEmbedding", "positions", positions, (x.size(1),))
        rotation_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        angles = positions.float()[:, None, None] * self.frequencies(x.device)  # (L, 1, H/2)
        cos, sin = angles.cos().to(rotation_dtype), angles.sin().to(rotation_dtype)
        if self.scaling is not None and (amplitude := self.scaling.amplitude) != 1:
            cos, sin = cos * amplitude, sin * amplitude
        pairs = x.to(rotation_dtype).unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # compilers fuse this, and do not know complex numbers
            even, odd = pairs.unbind(-1)
            rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        else:  # one product: 4 to 10 times faster on a CPU
            rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
        return rotated.flatten(-2).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta}, scaling={self.scaling}"
