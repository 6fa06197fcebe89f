"""Parameters, FLOPs and bytes of a vision encoder and its projector, in closed form, beside those of a text model."""

import dataclasses

import torch

from moesaic.errors import InputError
from moesaic.models.memory import MemoryEstimate, estimate_memory, optimizer_bytes
from moesaic.models.multimodal_config import MultimodalConfig, VisionConfig
from moesaic.models.shapes import Shape, decoder_shapes

__all__ = ["EncoderAccount", "account_encoder", "encoder_shapes", "estimate_multimodal_memory"]


@dataclasses.dataclass(frozen=True)
class EncoderAccount:
    """An encoder and the projector behind it. FLOPs are per tile, forward; a multiply-add counts as two."""

    tokens: int
    """Image tokens of a tile."""
    parameters: int
    """All of them work on every tile."""
    matmul_flops: int
    attention_flops: int
    """FLOPs of q k and p v; every patch sees every other one."""

    @property
    def forward_flops(self) -> int:
        return self.matmul_flops + self.attention_flops

    @property
    def training_flops(self) -> int:
        """Forward and backward. A decoder's gradients of the image tokens are in its own account."""
        return 3 * self.forward_flops


def account_encoder(config: MultimodalConfig) -> EncoderAccount:
    """Count the encoder and projector of a model, for tiles of `image_size`."""
    vision = config.vision
    patches, places, tokens = _patches(vision), _places(vision), vision.num_tokens()
    block = 4 * vision.dim**2 + 2 * vision.dim * vision.hidden_dim
    behind = vision.pixel_shuffle**2 * vision.dim * vision.output_dim + vision.output_dim**2
    behind += vision.output_dim * config.text.dim
    before = patches * vision.num_channels * vision.patch_size**2 * vision.dim
    return EncoderAccount(
        tokens=tokens,
        parameters=sum(shape.numel for shape in encoder_shapes(config)),
        matmul_flops=2 * (before + vision.num_layers * places * block + tokens * behind),
        attention_flops=vision.num_layers * 4 * places**2 * vision.dim,
    )


def _patches(vision: VisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2


def _places(vision: VisionConfig) -> int:
    """Patches of a tile, and the class token."""
    return _patches(vision) + vision.class_token


def encoder_shapes(config: MultimodalConfig) -> list[Shape]:
    """All parameters of the encoder and the projector that `build_multimodal(config)` makes."""
    vision = config.vision
    dim, hidden, out = vision.dim, vision.hidden_dim, vision.output_dim
    norm = [Shape((dim,), "vector")] * 2
    block = [*norm, *norm, *[Shape((dim, dim), "matrix"), Shape((dim,), "vector")] * 4]
    block += [Shape((hidden, dim), "matrix"), Shape((hidden,), "vector")]
    block += [Shape((dim, hidden), "matrix"), Shape((dim,), "vector")]
    tables = [Shape((dim,), "vector")] if vision.class_token else []
    if vision.learned_positions:
        tables.append(Shape((_places(vision), dim), "embedding"))
    behind = [(out, dim * vision.pixel_shuffle**2), (out, out), (config.text.dim, out)]
    return [
        Shape((dim, vision.num_channels * vision.patch_size**2), "embedding"),
        *tables,
        *norm,
        *block * vision.num_layers,
        *norm,
        *[Shape(sizes, "matrix") for sizes in behind],
    ]


def estimate_multimodal_memory(
    config: MultimodalConfig,
    *,
    images: int,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str | None = "adamw",
    checkpoint_activations: bool = False,
) -> MemoryEstimate:
    """`estimate_memory` of the text model, and on top of it what encoder and projector take, all being trained.

    What the encoder keeps for its backward stays there until that of the text model is over. A picture in the prompt
    takes nothing more in the cache than its image tokens.

    Args:
        images: tiles in each sequence; their image tokens are among its seq_len tokens.

    Raises:
        InputError: what `estimate_memory` refuses, or more image tokens than tokens.
    """
    tokens = config.vision.num_tokens()
    if not 0 <= images * tokens <= seq_len:
        raise InputError(
            f"images={images}: of {tokens} image tokens each; must be 0 to {seq_len // tokens}, as seq_len={seq_len}"
        )
    text = estimate_memory(
        config.text,
        batch_size=batch_size,
        seq_len=seq_len,
        dtype=dtype,
        optimizer=optimizer,
        checkpoint_activations=checkpoint_activations,
    )
    shapes = encoder_shapes(config)
    weights = sum(shape.numel for shape in shapes) * dtype.itemsize
    state, stepping = optimizer_bytes([*decoder_shapes(config.text), *shapes], dtype, optimizer)
    kept, working = _activations(config, images * batch_size, dtype, checkpoint_activations)
    return dataclasses.replace(
        text,
        weights=text.weights + weights,
        gradients=text.gradients + weights,
        optimizer=state,
        activations=text.activations + kept,
        step=max(text.step + kept, text.gradients + weights + kept + working),
        optimizer_step=stepping,
    )


def _activations(
    config: MultimodalConfig, tiles: int, dtype: torch.dtype, checkpoint_activations: bool
) -> tuple[int, int]:
    """Bytes that the encoder keeps for its backward, and most that the backward of a block needs beside them.

    A block keeps in order: what comes into both norms and out of them, queries, keys, values, what softmax attention
    makes of them, and the hidden features before and after GELU.
    """
    vision = config.vision
    places, patches, tokens = tiles * _places(vision), tiles * _patches(vision), tiles * vision.num_tokens()
    stream, hidden = places * vision.dim, places * vision.hidden_dim
    exact = max(dtype.itemsize, torch.float32.itemsize)
    statistics = places * 2 * exact  # of a norm
    block = (8 * stream + 2 * hidden) * dtype.itemsize + 2 * statistics + places * vision.num_heads * exact
    outside = patches * (vision.num_channels * vision.patch_size**2 + vision.dim) + 2 * stream
    kept = outside * dtype.itemsize + 2 * statistics + 4 * tokens * vision.output_dim * dtype.itemsize
    working = (stream + max(2 * hidden, 5 * stream)) * dtype.itemsize
    if checkpoint_activations:
        return kept + vision.num_layers * stream * dtype.itemsize, working + block
    return kept + vision.num_layers * block, working
