"""Text that a model continues from a prompt."""

import dataclasses

import torch

from moesaic.config import require
from moesaic.data import Tokenizer
from moesaic.models import Decoder, generate

__all__ = ["SampleConfig", "sample_text"]


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


def sample_text(decoder: Decoder, tokenizer: Tokenizer, sampling: SampleConfig, seed: int) -> str:
    """The prompt and its continuation, up to the end of the text."""
    prompt = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(sampling.prompt.encode()).tolist()]])
    tokens = generate(
        decoder,
        prompt.to(decoder.device),
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=seed,
        stop_token=tokenizer.end_of_text,
    )[0, 1:].tolist()
    if tokens and tokens[-1] == tokenizer.end_of_text:
        tokens = tokens[:-1]
    return tokenizer.decode(tokens).decode("utf-8", errors="replace")
