"""The configuration of a decoder that sees pictures."""

import dataclasses

from moesaic.models.config import DecoderConfig

__all__ = ["MultimodalConfig", "VisionConfig"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision encoder: patches of pictures, a transformer over them, and an adapter that makes tokens of them.

    `image_size` is the side of a tile, in pixels. With learned positions every picture is a tile; without, pictures
    may be of any size that `num_tokens` accepts.
    """

    image_size: int = dataclasses.field(metadata={"most": 2**14})
    patch_size: int = dataclasses.field(metadata={"most": 2**10})
    dim: int = dataclasses.field(metadata={"most": 2**20})
    num_layers: int = dataclasses.field(metadata={"most": 2**10})
    num_heads: int = dataclasses.field(metadata={"most": 2**16})
    hidden_dim: int = dataclasses.field(metadata={"most": 2**22})  # of the feed-forward layers
    output_dim: int = dataclasses.field(metadata={"most": 2**20})  # of the adapter
    num_channels: int = dataclasses.field(default=3, metadata={"most": 2**10})
    pixel_shuffle: int = dataclasses.field(default=2, metadata={"most": 2**10})  # squares of so many patches: one token
    class_token: bool = True
    learned_positions: bool = True
    rope_theta: float | None = 10000.0  # null: no RoPE

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                _require(value > 0, f"{field.name}={value}: must be a number > 0")
        square = self.patch_size * self.pixel_shuffle
        _require(
            self.image_size % square == 0,
            f"image_size={self.image_size}: must be a multiple of patch_size x pixel_shuffle = {square}",
        )
        _require(self.dim % self.num_heads == 0, f"num_heads={self.num_heads}: must divide dim={self.dim}")
        if self.rope_theta is not None:
            theta, head_dim = self.rope_theta, self.dim // self.num_heads
            _require(1 <= theta <= 1e15, f"rope_theta={theta}: must be a number from 1 to 1e+15, or null")
            _require(
                head_dim % 4 == 0,
                f"num_heads={self.num_heads}: dim / num_heads = {head_dim} must be a multiple of 4 for RoPE in two "
                "dimensions",
            )

    def num_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """The number of image tokens of a picture of so many pixels; without a size, of a tile.

        Raises:
            ValueError: a size that its patches do not fill, or one without positions.
        """
        sides = self.image_size if height is None else height, self.image_size if width is None else width
        square = self.patch_size * self.pixel_shuffle
        for side in sides:
            if side < 1 or side % square:
                raise ValueError(f"a picture of {sides[0]} x {sides[1]} pixels: both must be multiples of {square}")
            if self.learned_positions and side != self.image_size:
                raise ValueError(
                    f"a picture of {sides[0]} x {sides[1]} pixels: both must be image_size={self.image_size} with "
                    "learned_positions=true"
                )
        return (sides[0] // square) * (sides[1] // square)


@dataclasses.dataclass(frozen=True)
class MultimodalConfig:
    """A decoder, an encoder, and the token id that stands wherever an embedding comes from a picture."""

    text: DecoderConfig
    vision: VisionConfig
    image_token: int

    def __post_init__(self) -> None:
        vocabulary = self.text.vocab_size
        _require(
            0 <= self.image_token < vocabulary,
            f"image_token={self.image_token}: must be a token id below text.vocab_size={vocabulary}",
        )
        _require(
            self.image_token != self.text.padding_token,
            f"image_token={self.image_token}: must differ from text.padding_token",
        )
        _require(
            self.text.parametrization != "transfer",
            "text.parametrization='transfer': must be standard or scaled_logits, as its base says nothing of an "
            "encoder",
        )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
