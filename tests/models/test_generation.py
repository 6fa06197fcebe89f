import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.comparing import redraw
from torch import Tensor

from moesaic.errors import InputError
from moesaic.models import Decoder, LayerConfig, build_decoder, generate, llama4_toy, sample

VOCAB = 23


def toy(**changes: Any) -> Decoder:
    """Chunks of 8 and a temperature that changes every 8 tokens; fp64, so that nothing is nearly tied."""
    config = llama4_toy(vocab_size=VOCAB, **changes)
    attention = dataclasses.replace(config.attention, conv_width=2)
    return redraw(build_decoder(dataclasses.replace(config, attention=attention), dtype=torch.float64))  # type: ignore[return-value]


def prompt(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
}


@pytest.mark.slow_but_for("greedy-8", "all-13")
@pytest.mark.parametrize("length", [1, 5, 8, 13])
@pytest.mark.parametrize("way", WAYS)
def test_cache_changes_nothing(way: str, length: int) -> None:
    """Prompts below, at and beyond a chunk; 14 new tokens cross at least one boundary."""
    decoder, tokens = toy(), prompt(length=length)
    cached = generate(decoder, tokens, 14, seed=length, **WAYS[way])
    uncached = generate(decoder, tokens, 14, seed=length, use_cache=False, **WAYS[way])
    assert cached.tolist() == uncached.tolist()
    assert cached.shape == (2, length + 14)
    assert torch.equal(cached[:, :length], tokens)
    assert len(set(cached[0, length:].tolist())) > 2, "a text of one token hides mistakes"


def test_with_a_cache_every_token_is_seen_once() -> None:
    decoder = toy()
    seen: list[int] = []
    decoder.embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].size(1)))
    generate(decoder, prompt(), 4)
    assert seen == [5, 1, 1, 1]


@pytest.mark.slow
def test_seeds() -> None:
    decoder, tokens = toy(), prompt()
    first = generate(decoder, tokens, 20, seed=1)
    torch.rand(3)  # the global generator plays no part
    state = torch.get_rng_state()
    assert torch.equal(generate(decoder, tokens, 20, seed=1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generate(decoder, tokens, 20, seed=2), first)


def test_greedy_takes_the_most_likely_token() -> None:
    decoder, tokens = toy().eval(), prompt()
    for token in generate(decoder, tokens, 9, temperature=0)[:, 5:].T:
        assert torch.equal(token, decoder(tokens).logits[:, -1].argmax(-1))
        tokens = torch.cat((tokens, token[:, None]), dim=1)


@pytest.mark.slow
def test_greedy_rows_do_not_depend_on_each_other() -> None:
    decoder, tokens = toy(), prompt(rows=3)
    together = generate(decoder, tokens, 12, temperature=0)
    for row in range(3):
        assert torch.equal(generate(decoder, tokens[row : row + 1], 12, temperature=0)[0], together[row])


@pytest.mark.slow
def test_stop_token() -> None:
    decoder, tokens = toy(), prompt()
    free = generate(decoder, tokens, 20, temperature=0)
    new = free[:, 5:].tolist()
    # a token that ends the first row before the second
    at, stop = next(
        (i, token) for i, token in enumerate(new[0]) if token not in new[0][:i] and token not in new[1][: i + 1]
    )
    found = generate(decoder, tokens, 20, temperature=0, stop_token=stop)
    assert found[0, 5:].tolist() == (new[0][: at + 1] + [stop] * 20)[: found.size(1) - 5]
    assert found[1].tolist() == free[1, : found.size(1)].tolist()
    alone = generate(decoder, tokens[:1], 20, temperature=0, stop_token=stop)
    assert alone[0, 5:].tolist() == new[0][: at + 1], "it stops where every row is done"
    assert generate(decoder, tokens[:1], 20, temperature=0, stop_token=VOCAB + 1).size(1) == 25


def test_no_new_tokens() -> None:
    tokens = prompt()
    assert torch.equal(generate(toy(), tokens, 0), tokens)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_no_graph_is_kept(training: bool) -> None:
    decoder = toy().train(training)
    generate(decoder, prompt(), 2)
    assert decoder.training is training
    with pytest.raises(InputError):
        generate(decoder, prompt(), 2, temperature=-1)
    assert decoder.training is training
    assert all(p.grad is None for p in decoder.parameters())


def test_a_mixer_without_cache_falls_back_to_the_whole_text() -> None:
    own = LayerConfig({"type": "custom_samples.RunningMean"}, "dense")
    decoder = toy(
        pattern=(LayerConfig("chunked_rope", "moe"), own), interleave_moe_layer_step=None, nope_layer_interval=None
    )
    assert decoder.make_cache() is None
    seen: list[int] = []
    decoder.embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].size(1)))
    found = generate(decoder, prompt(), 4, temperature=0)
    assert seen == [5, 6, 7, 8]
    assert torch.equal(found, generate(decoder, found[:, :5], 4, temperature=0, use_cache=False))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, VOCAB]], f"token id {VOCAB}: the vocabulary has ids 0 to {VOCAB - 1}"),
        ([[-1, 3]], f"token id -1: the vocabulary has ids 0 to {VOCAB - 1}"),
        ([1, 2, 3], r"tokens of shape \(3,\): must be \(B, L\) with at least one token"),
        ([[]], r"tokens of shape \(1, 0\): must be \(B, L\) with at least one token"),
    ],
)
def test_bad_prompts(tokens: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(toy(), torch.tensor(tokens, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be a number >= 0"),
        ({"top_k": 0}, "top_k=0: must be an integer >= 1"),
        ({"top_p": 0.0}, "top_p=0.0: must be 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p=1.1: must be 0 < top_p <= 1"),
    ],
)
def test_bad_sampling_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample(torch.zeros(1, 3), **arguments)


PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])  # not in order
DRAWS = 20000


def frequencies(probabilities: Tensor, **arguments: Any) -> Tensor:
    logits = probabilities.log().expand(DRAWS, -1) + 3.0  # softmax does not see the shift
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **arguments)
    return torch.bincount(drawn, minlength=probabilities.numel()) / DRAWS


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 0.96}, [0, 1, 2, 3]),
        ({"top_p": 0.94}, [1, 2, 3]),
        ({"top_p": 0.81}, [1, 2, 3]),
        ({"top_p": 0.79}, [1, 3]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.001}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two left, 1 has 0.625
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
    ],
)
def test_kept_tokens_and_their_frequencies(arguments: dict[str, Any], kept: list[int]) -> None:
    found = frequencies(PROBABILITIES, **arguments)
    expected = torch.zeros(4).index_copy(0, torch.tensor(kept), PROBABILITIES[kept] / PROBABILITIES[kept].sum())
    assert ((found > 0) == (expected > 0)).all(), found
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    found = frequencies(PROBABILITIES, temperature=temperature)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.015)


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=7, unique=True),
    top_p=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_top_p_draws_from_the_smallest_set(weights: list[int], top_p: float, seed: int) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    order = probabilities.argsort(descending=True).tolist()
    nucleus, held = [], 0.0
    for token in order:
        if held >= top_p - 1e-6:  # a tie within rounding may go either way
            break
        nucleus.append(token)
        held += probabilities[token].item()
    logits = probabilities.log().expand(200, -1)
    drawn = set(sample(logits, top_p=top_p, generator=torch.Generator().manual_seed(seed)).tolist())
    allowed = set(nucleus) if abs(held - top_p) > 1e-6 else set(order[: len(nucleus) + 1])
    assert drawn <= allowed


def test_rows_are_drawn_apart() -> None:
    logits = torch.eye(3) * 100
    assert sample(logits).tolist() == [0, 1, 2]
    assert sample(logits, temperature=0).tolist() == [0, 1, 2]
