"""Sampling tokens from a decoder."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.models.decoder import Decoder
from moesaic.models.multimodal import Images, MultimodalDecoder

__all__ = ["generate", "sample"]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row of logits (B, V); returns (B,) int64.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens only.
        top_p: keep the smallest set of most likely tokens that holds at least this probability (Holtzman et al. 2019).
    """
    _check_sampling(temperature, top_k, top_p)
    scaled = logits.float() / (temperature or 1.0)
    if not bool(scaled.amax(dim=-1).isfinite().all()):
        raise InputError(
            f"temperature={temperature}: the logits are not finite; the model has diverged, its config is wrong, or "
            "the temperature is too small (0: greedy)"
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)  # multinomial renormalizes
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: must be a number >= 0 (0: greedy)")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k={top_k}: must be an integer >= 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p}: must be 0 < top_p <= 1")


@torch.no_grad()
def generate(
    decoder: Decoder | MultimodalDecoder,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    images: Images | None = None,
    image_rows: Tensor | Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue tokens (B, L) by up to max_new_tokens; returns (B, L + new).

    The same seed gives the same tokens with and without the cache. Stops early once every row has drawn
    `stop_token`; a row that is done is filled with it.

    Args:
        images, image_rows: pictures of the prompt, as of `MultimodalDecoder.forward`. An image token is never drawn.

    Raises:
        InputError: an empty prompt, a token id outside the vocabulary, an option out of range, or images that the
            decoder has no encoder for.
    """
    _check_sampling(temperature, top_k, top_p)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens}: must be an integer >= 0")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise InputError(f"tokens of shape {tuple(tokens.shape)}: must be (B, L) with at least one token")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= decoder.vocab_size:
        wrong = low if low < 0 else high
        raise InputError(f"token id {wrong}: the vocabulary has ids 0 to {decoder.vocab_size - 1}")
    seen: dict[str, Any] = {}
    if isinstance(decoder, MultimodalDecoder):
        seen = {"images": images, "image_rows": image_rows}
    elif images is not None:
        raise InputError("images: a decoder without an encoder; must be a MultimodalDecoder")
    was_training = decoder.training
    decoder.eval()
    try:
        # drawn on the CPU, so that a seed means the same on every device
        generator = torch.Generator().manual_seed(seed)
        cache = decoder.make_cache() if use_cache else None
        done = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
        unseen = tokens
        for _ in range(max_new_tokens):
            logits = decoder(tokens if cache is None else unseen, cache, **seen).logits[:, -1].cpu()
            if cache is not None:
                seen = {}  # the cache holds them
            if isinstance(decoder, MultimodalDecoder):
                logits[:, decoder.image_token] = -torch.inf
            drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            drawn = drawn.to(tokens.device)
            if stop_token is not None:
                drawn = drawn.masked_fill(done, stop_token)
                done = done | (drawn == stop_token)
            unseen = drawn[:, None]
            tokens = torch.cat((tokens, unseen), dim=1)
            if stop_token is not None and bool(done.all()):
                break
    finally:
        decoder.train(was_training)
    return tokens
