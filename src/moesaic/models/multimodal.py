"""A decoder that sees pictures: at image tokens its embeddings come from a vision encoder (early fusion)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.layers import PixelShuffleAdapter, Routing, VisionEncoder, VisionTransformer
from moesaic.layers.checks import is_shape_only, require_floating, require_ids, require_sizes, require_tensor
from moesaic.layers.part import initialize as initialize_part
from moesaic.models.decoder import FOREIGN_FILES, Decoder, DecoderOutput, build_decoder
from moesaic.models.multimodal_config import MultimodalConfig, VisionConfig

__all__ = ["MULTIMODAL_FILES", "Images", "MultimodalDecoder", "build_encoder", "build_multimodal", "with_encoder"]

Images = Tensor | Sequence[Tensor]
"""Pixel values of M pictures: (M, C, H, W), or M tensors (C, H, W) of any sizes that the encoder takes."""

MULTIMODAL_FILES = (*FOREIGN_FILES, "preprocessor_config.json", "processor_config.json")
"""Names that `MultimodalDecoder.foreign_files` may have."""


class MultimodalDecoder(nn.Module):
    """A `Decoder` whose embeddings at image tokens come from an encoder; all else is the decoder's.

    Args:
        decoder: the text model, MoE and positions as they are. No router of it may ask for token ids.
        vision: images (M, C, H, W) -> (M, N, A), the tokens of each.
        projector: (..., A) -> (..., D).
        image_token: the id that stands at every place of an image; it is never drawn by `generate`.

    Raises:
        InputError: a router that asks for token ids.
    """

    config: MultimodalConfig | None = None
    """What `build_multimodal` built this from; None for a model put together by hand."""
    foreign_files: dict[str, str]
    """Text files that came with imported weights, by name, as `Decoder.foreign_files`; config.json is the whole one."""

    def __init__(self, decoder: Decoder, vision: nn.Module, projector: nn.Module, *, image_token: int) -> None:
        super().__init__()
        require_sizes(0, image_token=image_token)
        if image_token >= decoder.vocab_size:
            raise ValueError(f"image_token={image_token}: must be a token id below {decoder.vocab_size}")
        for i, block in enumerate(decoder.layers):
            if getattr(block, "takes_token_ids", False):
                raise InputError(
                    f"layer {i}: its router asks for token ids, which are all the same at a picture; must be another"
                )
        self.decoder = decoder
        self.vision = vision
        self.projector = projector
        self.image_token = image_token
        self.foreign_files = {}

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def make_cache(self) -> list[Any] | None:
        return self.decoder.make_cache()

    def forward(
        self,
        tokens: Tensor,
        cache: list[Any] | None = None,
        attention_mask: Tensor | None = None,
        *,
        images: Images | None = None,
        image_rows: Tensor | Sequence[int] | None = None,
    ) -> DecoderOutput:
        """tokens (B, L) int64 and the images at their image tokens -> logits (B, L, V).

        Args:
            cache, attention_mask: as of `Decoder.forward`.
            images: normalized pixel values of the dtype of the encoder. With a cache, those of the new tokens.
            image_rows: (M,) the row of each image. Images of one row are in the order of their tokens. None: all image
                tokens are filled in order, row after row, as in transformers.

        Raises:
            TypeError: tensors of another kind.
            ValueError: image tokens without images, or the reverse; pictures of a size that the encoder does not take;
                and what `Decoder.hidden_states` refuses.
        """
        hidden, routing = self.hidden_states(tokens, cache, attention_mask, images=images, image_rows=image_rows)
        return DecoderOutput(self.decoder.head(hidden), routing)

    def hidden_states(
        self,
        tokens: Tensor,
        cache: list[Any] | None = None,
        attention_mask: Tensor | None = None,
        *,
        images: Images | None = None,
        image_rows: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, dict[str, Routing]]:
        """What the head sees, (B, L, D), and the routing; arguments as of `forward`."""
        embeddings = self.embed(tokens, images=images, image_rows=image_rows)
        return self.decoder.hidden_states(None, cache, attention_mask, embeddings=embeddings)

    def embed(
        self,
        tokens: Tensor,
        *,
        images: Images | None = None,
        image_rows: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """tokens (B, L) -> (B, L, D), with those of the images in place; arguments as of `forward`."""
        x = self.decoder.embed(tokens)
        is_image = tokens == self.image_token
        found = [] if images is None else self.embed_images(images)
        if image_rows is not None:
            rows = _rows(image_rows, len(found), tokens.size(0))
            self._require_filled(is_image, found, rows)
            found = [found[i] for i in sorted(range(len(rows)), key=rows.__getitem__)]
        else:
            self._require_filled(is_image, found, None)
        if not found:
            return x
        return x.masked_scatter(is_image[:, :, None], torch.cat(found).to(x.dtype))

    def embed_images(self, images: Images) -> list[Tensor]:
        """The embeddings of each image, (its tokens, D). Images of one size are encoded together."""
        if isinstance(images, Tensor):
            require_tensor("MultimodalDecoder", "images", images, (None, None, None, None))
            return list(self.projector(self.vision(images))) if len(images) else []
        by_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            require_floating("MultimodalDecoder", **{f"images[{i}]": image})
            require_tensor("MultimodalDecoder", f"images[{i}]", image, (None, None, None))
            by_size.setdefault(image.shape, []).append(i)
        found: dict[int, Tensor] = {}
        for places in by_size.values():
            encoded = self.projector(self.vision(torch.stack([images[i] for i in places])))
            found.update(zip(places, encoded, strict=True))
        return [found[i] for i in range(len(images))]

    def _require_filled(self, is_image: Tensor, found: list[Tensor], rows: list[int] | None) -> None:
        """Raise ValueError unless the images have as many tokens as there are image tokens, in all or in each row."""
        if is_shape_only(is_image) or torch.compiler.is_compiling():
            return
        places = is_image.sum(dim=1).tolist()
        lengths = [len(each) for each in found]
        if rows is None:
            there, needed, where = [sum(places)], [sum(lengths)], ["tokens"]
        else:
            there, needed = places, [0] * len(places)
            for row, length in zip(rows, lengths, strict=True):
                needed[row] += length
            where = [f"row {row} of tokens" for row in range(len(places))]
        for name, has, wants in zip(where, there, needed, strict=True):
            if has != wants:
                held = f"{wants}, as many as its images have" if wants else "none without images"
                raise ValueError(f"images: {name} has {has} image tokens (id {self.image_token}); must be {held}")


def _rows(image_rows: Tensor | Sequence[int], number: int, batch: int) -> list[int]:
    """The row of each image as integers.

    Raises:
        TypeError: no integers.
        ValueError: another number of them than there are images, or a row that the batch does not have.
    """
    rows = image_rows if isinstance(image_rows, Tensor) else torch.tensor(list(image_rows), dtype=torch.int64)
    require_tensor("MultimodalDecoder", "image_rows", rows, (number,), torch.int64, torch.int32)
    require_ids("MultimodalDecoder", "image_rows", rows.cpu(), batch)
    return [int(row) for row in rows.tolist()]


def build_encoder(
    config: VisionConfig,
    *,
    checkpoint_activations: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VisionEncoder:
    """The encoder that `config` describes, drawn by torch's defaults."""
    grid = config.image_size // config.patch_size
    transformer = VisionTransformer(
        patch_size=config.patch_size,
        dim=config.dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        hidden_dim=config.hidden_dim,
        num_channels=config.num_channels,
        class_token=config.class_token,
        learned_grid=(grid, grid) if config.learned_positions else None,
        rope_theta=config.rope_theta,
        checkpoint_activations=checkpoint_activations,
        device=device,
        dtype=dtype,
    )
    adapter = PixelShuffleAdapter(
        config.dim, config.output_dim, factor=config.pixel_shuffle, device=device, dtype=dtype
    )
    return VisionEncoder(transformer, adapter)


def build_multimodal(
    config: MultimodalConfig,
    *,
    checkpoint_activations: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MultimodalDecoder:
    """The model that `config` describes, initialized by the rule of its text model unless it is on the meta device.

    The decoder is drawn first, so it has the weights of `build_decoder(config.text)` with the same seed.

    Raises:
        InputError: what `build_decoder` or `MultimodalDecoder` refuses.
    """
    decoder = build_decoder(config.text, checkpoint_activations=checkpoint_activations, device=device, dtype=dtype)
    return with_encoder(decoder, config, checkpoint_activations=checkpoint_activations, device=device, dtype=dtype)


def with_encoder(
    decoder: Decoder,
    config: MultimodalConfig,
    *,
    checkpoint_activations: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> MultimodalDecoder:
    """The decoder of `config.text` with a new encoder and projector, as `build_multimodal` draws them.

    Raises:
        InputError: a router that asks for token ids.
    """
    encoder = build_encoder(config.vision, checkpoint_activations=checkpoint_activations, device=device, dtype=dtype)
    projector = nn.Linear(config.vision.output_dim, config.text.dim, bias=False, device=device, dtype=dtype)
    for part in (encoder, projector):
        if device is None or torch.device(device).type != "meta":
            with torch.no_grad():
                initialize_part(part, decoder.parametrization)
    model = MultimodalDecoder(decoder, encoder, projector, image_token=config.image_token)
    model.config = config
    return model
