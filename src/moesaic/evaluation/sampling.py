"""Text that a model continues from a prompt."""

import dataclasses

import torch
from torch import Tensor

from moesaic.config import require
from moesaic.data import Tokenizer
from moesaic.data.images import ImageText, Layout, Picture, Text, pixel_values
from moesaic.models import Decoder, MultimodalDecoder, generate

__all__ = ["SampleConfig", "sample_of_picture", "sample_text"]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end of a run."""

    prompt: str = "class "
    max_new_tokens: int = dataclasses.field(default=200, metadata={"most": 10**6})
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = 0.95

    def __post_init__(self) -> None:
        require(self, "max_new_tokens", self.max_new_tokens >= 0, "a number >= 0")
        require(self, "temperature", self.temperature >= 0, "a number >= 0 (0: greedy)")
        require(self, "top_k", self.top_k is None or self.top_k >= 1, "a number >= 1, or null")
        require(self, "top_p", self.top_p is None or 0 < self.top_p <= 1, "0 < top_p <= 1, or null")


def sample_text(decoder: Decoder | MultimodalDecoder, tokenizer: Tokenizer, sampling: SampleConfig, seed: int) -> str:
    """The prompt and its continuation, up to the end of the text."""
    prompt = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(sampling.prompt.encode()).tolist()]])
    return _decoded(_continued(decoder, tokenizer, prompt, None, sampling, seed)[1:], tokenizer)


def sample_of_picture(
    model: MultimodalDecoder, layout: Layout, picture: Picture, sampling: SampleConfig, seed: int
) -> str:
    """The prompt and its continuation behind a picture, up to the end of the text.

    Args:
        picture: of tiles that the encoder takes.
    """
    prompt = torch.from_numpy(layout.encode([ImageText((picture, Text(sampling.prompt)))])[0].tokens)[None]
    images = pixel_values(picture.tiles(None)).to(model.device, model.dtype)
    tokens = _continued(model, layout.tokenizer, prompt, images, sampling, seed)
    return _decoded(tokens[len(layout.picture_ids(picture)) :], layout.tokenizer)


def _continued(
    model: Decoder | MultimodalDecoder,
    tokenizer: Tokenizer,
    prompt: Tensor,
    images: Tensor | None,
    sampling: SampleConfig,
    seed: int,
) -> list[int]:
    """The ids of a prompt (1, L) and what follows."""
    found: list[int] = generate(
        model,
        prompt.to(model.device),
        sampling.max_new_tokens,
        images=images,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        stop_token=tokenizer.end_of_text,
    )[0].tolist()
    return found


def _decoded(tokens: list[int], tokenizer: Tokenizer) -> str:
    if tokens and tokens[-1] == tokenizer.end_of_text:
        tokens = tokens[:-1]
    tokens = [token for token in tokens if token < tokenizer.vocab_size]  # a model may have more ids than words
    return tokenizer.decode(tokens).decode("utf-8", errors="replace")
