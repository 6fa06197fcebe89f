"""Our decoder with transformers' weights is transformers' Llama 4: logits, every gradient, masks, cache, bf16."""

import pytest
import torch
from agreement import require_same_gradients, require_same_logits
from llama4_samples import CASES, llama4, llama4_with_vision
from reference.comparing import assert_close, assert_gradients
from torch import Tensor
from transformers import Llama4ForCausalLM

from moesaic.interop import from_hf, hf_name
from moesaic.models import Decoder

LENGTH = 13


def tokens_of(model: Llama4ForCausalLM, batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length))


def left_padding(*amounts: int, length: int = LENGTH) -> Tensor:
    return torch.stack([(torch.arange(length) >= amount).long() for amount in amounts])


def gradients_like_theirs(decoder: Decoder) -> dict[str, Tensor | None]:
    return {hf_name(name): p.grad for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_agree(name: str, padded: bool) -> None:
    model = llama4(**CASES[name])
    decoder = from_hf(model)
    tokens = tokens_of(model)
    mask = left_padding(0, 3, 9) if padded else None
    expected, found = require_same_logits(model, decoder, tokens, mask, 2e-5)
    require_same_gradients(model, decoder, expected, found, 1e-4)


@pytest.mark.slow_but_for("[5, 1, 1, 6]")
@pytest.mark.parametrize("mask", [None, left_padding(0, 3, 9), left_padding(4, 0, 5)], ids=["", "padded", "padded 2"])
@pytest.mark.parametrize("pieces", [[13], [5, 1, 1, 6], [1] * 13, [4, 4, 4, 1], [2, 11]], ids=str)
@pytest.mark.parametrize("name", ["maverick", "masks listed", "chunks of two"])
def test_cached_decoding_agrees(name: str, pieces: list[int], mask: Tensor | None) -> None:
    """Against transformers without a cache: its own cached path is the same function, by its own tests."""
    model = llama4(**CASES[name])
    decoder = from_hf(model)
    tokens = tokens_of(model)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        cache, start, found = decoder.make_cache(), 0, []
        for length in pieces:
            end = start + length
            found.append(decoder(tokens[:, start:end], cache, None if mask is None else mask[:, :end]).logits)
            start = end
    real = torch.ones_like(tokens) if mask is None else mask
    assert_close(torch.cat(found, dim=1) * real[:, :, None], expected * real[:, :, None], 2e-5, "logits")


def test_prefill_and_decode_agree_with_their_cache() -> None:
    model = llama4()
    decoder = from_hf(model)
    tokens, mask = tokens_of(model, 2), left_padding(0, 6)
    with torch.no_grad():
        first = model(tokens[:, :8], attention_mask=mask[:, :8], use_cache=True)
        cache = decoder.make_cache()
        assert_close(decoder(tokens[:, :8], cache, mask[:, :8]).logits[0], first.logits[0], 2e-5, "prefill")
        past = first.past_key_values
        for i in range(8, LENGTH):
            theirs = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=past, use_cache=True)
            ours = decoder(tokens[:, i : i + 1], cache, mask[:, : i + 1])
            assert_close(ours.logits, theirs.logits, 2e-5, f"token {i}")


def test_holes_in_the_mask_agree() -> None:
    model = llama4()
    tokens = tokens_of(model)
    mask = left_padding(0, 3, 5)
    mask[0, -2:] = 0
    mask[1, 7] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        found = from_hf(model)(tokens, attention_mask=mask).logits
    assert_close(found * mask[:, :, None], expected * mask[:, :, None], 2e-5, "logits")


@pytest.mark.parametrize("name", ["maverick", "scout", "top 2", "biases"])
def test_bf16_lies_within_their_own_spread(name: str) -> None:
    """Between transformers' eager and sdpa attention, over enough tokens for the root mean square to be steady."""
    model = llama4(**CASES[name]).to(torch.bfloat16)
    rotary = model.model.rotary_emb  # .to() rounds its frequencies, from_pretrained would not
    rotary.inv_freq = llama4(**CASES[name]).model.rotary_emb.inv_freq
    tokens = tokens_of(model, batch=16, length=16)
    with torch.no_grad():
        ours = from_hf(model)(tokens).logits.float()
        sdpa = model(tokens, use_cache=False).logits.float()
        model.set_attn_implementation("eager")
        eager = model(tokens, use_cache=False).logits.float()

    def distance(a: Tensor, b: Tensor) -> float:
        return (a - b).square().mean().sqrt().item()

    assert ours.isfinite().all()
    assert distance(eager, sdpa) > 0
    assert distance(ours, sdpa) <= 1.1 * distance(eager, sdpa)


def test_the_text_part_of_a_model_with_vision_agrees() -> None:
    model = llama4_with_vision()
    tokens = tokens_of(model.language_model)
    with torch.no_grad():
        expected = model.language_model(tokens, use_cache=False).logits
        assert_close(from_hf(model)(tokens).logits, expected, 2e-5, "logits")


def test_activation_checkpointing_changes_nothing() -> None:
    model = llama4()
    tokens, mask = tokens_of(model), left_padding(0, 3, 9)
    results = []
    for checkpointed in (False, True):
        decoder = from_hf(model, checkpoint_activations=checkpointed).train()
        logits = decoder(tokens, attention_mask=mask).logits
        logits[mask.bool()].square().mean().backward()
        results.append((logits.detach(), gradients_like_theirs(decoder)))
    assert_close(results[1][0], results[0][0], 0, "logits")
    assert_gradients(results[1][1], results[0][1], 1e-6)
