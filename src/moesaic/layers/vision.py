"""Pictures to embeddings, as in Llama 4: patches, a vision transformer with 2-D RoPE, pixel shuffle and an adapter.

Semantics: transformers' `Llama4VisionModel` (5.23). Here pictures may be of any size that divides, and class token,
learned positions and RoPE have a switch each. In shapes M is the number of pictures, C channels, h and w rows and
columns of patches.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layers.checks import (
    require_dtype,
    require_flags,
    require_floating,
    require_last,
    require_numbers,
    require_sizes,
    require_tensor,
    require_weights_dtype,
)
from moesaic.layers.parametrization import ParameterKind, Parametrization
from moesaic.layers.part import initialize as initialize_part
from moesaic.layers.rotary import RotaryEmbedding

__all__ = [
    "PixelShuffleAdapter",
    "RotaryEmbedding2d",
    "VisionAttention",
    "VisionBlock",
    "VisionEncoder",
    "VisionFeedForward",
    "VisionTransformer",
    "pixel_shuffle",
    "to_patches",
]


def to_patches(images: Tensor, size: int) -> Tensor:
    """images (M, C, H, W) -> pixels of square patches (M, h, w, C * size * size), channel by channel as in an unfold.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape, or a side that is no multiple of `size`.
    """
    require_floating("to_patches", images=images)
    require_tensor("to_patches", "images", images, (None, None, None, None))
    height, width = images.shape[2:]
    if not height or not width or height % size or width % size:
        raise ValueError(f"images of {height} x {width} pixels: both sides must be multiples of patch_size={size}")
    return rearrange(images, "m c (h p) (w q) -> m h w (c p q)", p=size, q=size)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """x (M, h, w, D) -> (M, h / factor, w / factor, factor^2 * D): patches of a square side by side, row by row.

    Raises:
        ValueError: another shape, or rows or columns that are no multiple of `factor`.
    """
    require_tensor("pixel_shuffle", "x", x, (None, None, None, None))
    rows, columns = x.shape[1:3]
    if rows % factor or columns % factor:
        raise ValueError(f"x of {rows} x {columns} patches: both must be multiples of factor={factor}")
    return rearrange(x, "m (h p) (w q) d -> m h w (p q d)", p=factor, q=factor)


class RotaryEmbedding2d(nn.Module):
    """RoPE by the column of a patch on the first half of each head, and by its row on the second.

    Each half is a `RotaryEmbedding` of its own, so a patch at row 3 and column 3 has both halves rotated alike.
    """

    def __init__(self, head_dim: int, *, theta: float = 10000.0) -> None:
        super().__init__()
        require_sizes(head_dim=head_dim)
        if head_dim % 4:
            raise ValueError(f"head_dim={head_dim}: must be a multiple of 4, for pairs of columns and pairs of rows")
        self.head_dim = head_dim
        self.of_half = RotaryEmbedding(head_dim // 2, theta=theta)

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Rotate x (M, L, heads, head_dim) by rows (L,) and columns (L,); 0 leaves as it is."""
        require_last(x, self.head_dim, "RotaryEmbedding2d")
        across, down = x.chunk(2, dim=-1)
        return torch.cat((self.of_half(across, columns), self.of_half(down, rows)), dim=-1)


class VisionAttention(nn.Module):
    """Self-attention in which every patch sees every other one, with biases on all four projections.

    Args:
        dim: width D.
        num_heads: N, a divisor of D.
        rotary: positions for queries and keys; None for none.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        rotary: RotaryEmbedding2d | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, num_heads=num_heads)
        require_dtype(dtype)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide dim={dim}")
        if rotary is not None and rotary.head_dim != dim // num_heads:
            raise ValueError(f"rotary.head_dim={rotary.head_dim}: must equal dim / num_heads={dim // num_heads}")
        self.head_dim = dim // num_heads
        self.rotary = rotary
        self.q_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.o_proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """x (M, L, D) at rows (L,) and columns (L,), counted from 1 -> (M, L, D)."""
        require_last(x, self.q_proj.in_features, "VisionAttention")
        heads = "m l (n h) -> m l n h"
        q, k, v = (rearrange(each(x), heads, h=self.head_dim) for each in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotary is not None:
            q, k = self.rotary(q, rows, columns), self.rotary(k, rows, columns)
        y = F.scaled_dot_product_attention(*(rearrange(each, "m l n h -> m n l h") for each in (q, k, v)))
        return self.o_proj(rearrange(y, "m n l h -> m l (n h)"))


class VisionFeedForward(nn.Module):
    """down(gelu(up(x))), with biases."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, hidden_dim=hidden_dim)
        require_dtype(dtype)
        self.up_proj = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        require_last(x, self.up_proj.in_features, "VisionFeedForward")
        return self.down_proj(F.gelu(self.up_proj(x)))


class VisionBlock(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)), with layer norms."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        hidden_dim: int,
        rotary: RotaryEmbedding2d | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_numbers(norm_eps=norm_eps)
        self.mixer_norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.mixer = VisionAttention(dim, num_heads=num_heads, rotary=rotary, device=device, dtype=dtype)
        self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.ffn = VisionFeedForward(dim, hidden_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """x (M, L, D) -> (M, L, D)."""
        x = x + self.mixer(self.mixer_norm(x), rows, columns)
        return x + self.ffn(self.ffn_norm(x))


class VisionTransformer(nn.Module):
    """Patches of pictures to features, one per patch.

    Args:
        patch_size: side of a square patch in pixels.
        dim: width D.
        num_layers: blocks.
        num_heads: of each block, a divisor of D.
        hidden_dim: inner width of the feed-forward layers.
        num_channels: C.
        class_token: whether a learned token stands after the patches, seen by all of them and dropped at the end.
        learned_grid: (h, w) of a table of learned positions, which pictures of another grid cannot use; None for none.
        rope_theta: base of the 2-D RoPE; None for none.
        norm_eps: of all layer norms.
        checkpoint_activations: recompute each block in backward instead of keeping its activations.
    """

    class_embedding: nn.Parameter | None
    position_embedding: nn.Parameter | None

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        num_channels: int = 3,
        class_token: bool = True,
        learned_grid: tuple[int, int] | None = None,
        rope_theta: float | None = 10000.0,
        norm_eps: float = 1e-5,
        checkpoint_activations: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(
            patch_size=patch_size, dim=dim, num_layers=num_layers, num_heads=num_heads, num_channels=num_channels
        )
        require_flags(class_token=class_token, checkpoint_activations=checkpoint_activations)
        require_numbers(norm_eps=norm_eps)
        require_dtype(dtype)
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must divide dim={dim}")
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.learned_grid = learned_grid
        self.checkpoint_activations = checkpoint_activations
        pixels = num_channels * patch_size**2
        self.patch_embedding = nn.Linear(pixels, dim, bias=False, device=device, dtype=dtype)
        tables: dict[str, tuple[int, ...] | None] = {"class_embedding": (dim,) if class_token else None}
        tables["position_embedding"] = None
        if learned_grid is not None:
            require_sizes(**{"learned_grid[0]": learned_grid[0], "learned_grid[1]": learned_grid[1]})
            tables["position_embedding"] = (learned_grid[0] * learned_grid[1] + class_token, dim)
        for name, shape in tables.items():
            table = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, table)
        self.norm_before = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            VisionBlock(
                dim,
                num_heads=num_heads,
                hidden_dim=hidden_dim,
                rotary=None if rope_theta is None else RotaryEmbedding2d(dim // num_heads, theta=rope_theta),
                norm_eps=norm_eps,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.norm_after = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self._draw_tables()

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        kinds: dict[str, ParameterKind] = {"patch_embedding.weight": "embedding"}  # pixels are no hidden features
        return kinds if self.position_embedding is None else {**kinds, "position_embedding": "embedding"}

    def initialize(self, parametrization: Parametrization) -> None:
        """Draw all weights; class token and positions have the std 1 / sqrt(D), as in Llama 4."""
        self._draw_tables()
        nn.init.normal_(
            self.patch_embedding.weight, std=parametrization.std("embedding", self.patch_embedding.in_features)
        )
        for block in self.layers:
            initialize_part(block, parametrization)

    def _draw_tables(self) -> None:
        for table in (self.class_embedding, self.position_embedding):
            if table is not None:
                nn.init.normal_(table, std=table.size(-1) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        """images (M, C, H, W) -> features (M, h, w, D) of their patches.

        Raises:
            TypeError: no floating-point tensor, or not of the weights' dtype.
            ValueError: another number of channels, sides that patches do not fill, or a grid that has no positions.
        """
        x = to_patches(images, self.patch_size)
        if images.size(1) != self.num_channels:
            raise ValueError(f"images of {images.size(1)} channels: must have num_channels={self.num_channels}")
        rows, columns = x.shape[1:3]
        if self.learned_grid is not None and (rows, columns) != tuple(self.learned_grid):
            size = " x ".join(str(each * self.patch_size) for each in self.learned_grid)
            raise ValueError(
                f"images of {images.size(2)} x {images.size(3)} pixels: must be of {size}, for which positions were "
                "learned; without learned positions they may be of any size"
            )
        require_weights_dtype("VisionTransformer", x, self.patch_embedding.weight)
        x = rearrange(self.patch_embedding(x), "m h w d -> m (h w) d")
        at_row = torch.arange(1, rows + 1, device=x.device).repeat_interleave(columns)
        at_column = torch.arange(1, columns + 1, device=x.device).repeat(rows)
        if self.class_embedding is not None:
            x = torch.cat((x, self.class_embedding.to(x.dtype).expand(x.size(0), 1, -1)), dim=1)
            at_row, at_column = F.pad(at_row, (0, 1)), F.pad(at_column, (0, 1))  # nowhere
        if self.position_embedding is not None:
            x = x + self.position_embedding.to(x.dtype)
        x = self.norm_before(x)
        for block in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, at_row, at_column, use_reentrant=False)
            else:
                x = block(x, at_row, at_column)
        return rearrange(self.norm_after(x)[:, : rows * columns], "m (h w) d -> m h w d", h=rows)


class PixelShuffleAdapter(nn.Module):
    """gelu(down(gelu(up(shuffled)))) without biases: fewer and wider tokens.

    Args:
        dim: width D of what comes in.
        hidden_dim: width A of what comes out.
        factor: patches side by side that become one token, in both directions; 1 for none.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        factor: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(dim=dim, hidden_dim=hidden_dim, factor=factor)
        require_dtype(dtype)
        self.factor = factor
        self.up_proj = nn.Linear(dim * factor**2, hidden_dim, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, hidden_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (M, h, w, D) -> (M, h / factor * w / factor, A), row by row."""
        x = rearrange(pixel_shuffle(x, self.factor), "m h w d -> m (h w) d")
        require_last(x, self.up_proj.in_features, "PixelShuffleAdapter")
        return F.gelu(self.down_proj(F.gelu(self.up_proj(x))))


class VisionEncoder(nn.Module):
    """Pictures to tokens: a transformer over patches, then an adapter."""

    def __init__(self, transformer: VisionTransformer, adapter: PixelShuffleAdapter) -> None:
        super().__init__()
        self.transformer = transformer
        self.adapter = adapter

    def forward(self, images: Tensor) -> Tensor:
        """images (M, C, H, W) -> (M, tokens of a picture, A)."""
        return self.adapter(self.transformer(images))
