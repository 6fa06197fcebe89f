"""Whether a model of transformers and our decoder with its weights are the same function."""

from typing import Any

import torch
from reference.comparing import assert_close, assert_gradients
from torch import Tensor

from moesaic.interop import from_hf, gradients_to_hf
from moesaic.models import Decoder

__all__ = ["require_bf16_as_near", "require_same_gradients", "require_same_logits"]


def require_same_logits(
    model: Any, decoder: Decoder, tokens: Tensor, mask: Tensor | None, within: float
) -> tuple[Tensor, Tensor]:
    """Theirs and ours for tokens (B, L), where a mask (B, L) leaves some; at padding both are zeros."""
    real = torch.ones_like(tokens)[:, :, None] if mask is None else mask[:, :, None]
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    assert expected.std() > 0.5, "logits this small hide mistakes"
    expected, found = expected * real, decoder(tokens, attention_mask=mask).logits * real
    assert_close(found, expected, within, "logits")
    return expected, found


def require_same_gradients(model: Any, decoder: Decoder, expected: Tensor, found: Tensor, within: float) -> None:
    """The gradients of a random sum of these logits, theirs and ours, agree for every parameter."""
    upstream = torch.randn_like(expected)
    for logits in (expected, found):
        (logits * upstream).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ours = gradients_to_hf(decoder)
    assert theirs.keys() <= ours.keys()
    assert_gradients({name: ours[name] for name in theirs}, theirs, within)
    assert all(ours[name] is None or not ours[name].any() for name in ours.keys() - theirs.keys())


def require_bf16_as_near(model: Any, tokens: Tensor) -> None:
    """Ours in bf16 is as near to the fp32 logits of a bf16 model as that is itself.

    By the median token: where two experts are nearly tied, rounding decides, and such a token is far off in both.
    """
    exact = type(model)(model.config).eval().float()
    exact.load_state_dict(model.state_dict())
    model.model.rotary_emb.inv_freq = exact.model.rotary_emb.inv_freq  # .to() has rounded it

    def error(logits: Tensor) -> float:
        return (logits.float() - truth).square().mean(dim=-1).sqrt().median().item()

    with torch.no_grad():
        truth = exact(tokens, use_cache=False).logits
        theirs, ours = model(tokens, use_cache=False).logits, from_hf(model)(tokens).logits
    assert ours.dtype == torch.bfloat16
    assert 0 < error(ours) <= 1.1 * error(theirs)
