"""Pieces of sequences on several ranks are the whole sequences on one."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference.comparing import assert_close, assert_gradients, redraw
from torch import Tensor, distributed

from moesaic.errors import InputError
from moesaic.layers import AttentionTemperature
from moesaic.losses import load_balance_loss
from moesaic.models import AttentionConfig, Decoder, DecoderConfig, LayerConfig, MoEConfig, build_decoder
from moesaic.parallel.workers import Workers

VOCABULARY, LENGTH, SEQUENCES = 40, 16, 2
MIXERS = ("chunked_rope", "nope", "rope", "chunked_nope")


def config(conv_width: int = 0, mixers: tuple[Any, ...] = MIXERS) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=VOCABULARY,
        dim=8,
        hidden_dim=12,
        num_layers=len(mixers),
        attention=AttentionConfig(
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            attention_chunk_size=4,
            conv_width=conv_width,
            temperature=AttentionTemperature(attn_scale=0.5, floor_scale=3),
        ),
        pattern=tuple(LayerConfig(mixer, "moe" if i % 2 else "dense") for i, mixer in enumerate(mixers)),
        moe=MoEConfig(num_experts=4, hidden_dim=8, top_k=2, backend="loop"),
    )


def build(conv_width: int, recompute: bool) -> Decoder:
    decoder = build_decoder(config(conv_width), dtype=torch.float64, checkpoint_activations=recompute)
    torch.manual_seed(0)
    return redraw(decoder).train()  # type: ignore[return-value]


def data() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Learned(NamedTuple):
    hidden: Tensor
    loss: Tensor
    """Of this rank's tokens, over the number of all tokens; ranks add up."""
    gradients: dict[str, Tensor]


def learn(decoder: Decoder, tokens: Tensor, labels: Tensor) -> Learned:
    hidden, routing = decoder.hidden_states(tokens)
    every_token = SEQUENCES * LENGTH
    loss = F.cross_entropy(decoder.head(hidden).flatten(0, 1), labels.flatten(), reduction="sum") / every_token
    for each in routing.values():
        load = each.tokens_per_expert.clone()
        if distributed.is_initialized():
            distributed.all_reduce(load)
        loss = loss + load_balance_loss(each.logits, each.expert_ids, load=load, num_valid=every_token)
    loss.backward()
    return Learned(
        hidden.detach().clone(),
        loss.detach(),
        {name: each.grad for name, each in decoder.named_parameters() if each.grad is not None},
    )


def on_a_rank(conv_width: int, recompute: bool) -> Learned:
    from moesaic.parallel.context import piece, spread_context

    decoder, group = build(conv_width, recompute), distributed.group.WORLD
    spread_context(decoder, group)
    return learn(decoder, *(piece(decoder, each, group) for each in data()))


@pytest.mark.slow_but_for("False-3-2", "True-2-4")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("conv_width", [0, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_pieces_are_the_whole(workers: Workers, ranks: int, conv_width: int, recompute: bool) -> None:
    alone = learn(build(conv_width, False), *data())
    results = workers.run(on_a_rank, ranks, conv_width, recompute)
    assert_close(torch.cat([each.hidden for each in results], dim=1), alone.hidden, 1e-10, "hidden states")
    assert_close(torch.stack([each.loss for each in results]).sum(), alone.loss, 1e-10, "loss")
    sums = {name: torch.stack([each.gradients[name] for each in results]).sum(0) for name in alone.gradients}
    assert_gradients(sums, alone.gradients, 1e-10)


def undone() -> tuple[Tensor, Tensor]:
    from moesaic.parallel.context import spread_context

    decoder, (tokens, _) = build(3, False), data()
    before = decoder.hidden_states(tokens)[0]
    for handle in spread_context(decoder, distributed.group.WORLD):
        handle.remove()
    return before.detach(), decoder.hidden_states(tokens)[0].detach()


def test_it_can_be_undone(workers: Workers) -> None:
    for before, after in workers.run(undone, 2):
        assert torch.equal(before, after)


def messages() -> list[str]:
    """What is refused, and how."""
    from moesaic.parallel.context import piece, spread_context

    group, found = distributed.group.WORLD, []

    def refused(function: Any, *arguments: Any, **named: Any) -> None:
        try:
            function(*arguments, **named)
        except (InputError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")

    average = {"type": "moesaic.examples.custom_modules.GatedAverage"}
    refused(spread_context, build_decoder(config(mixers=("nope", average))), group)
    decoder = build(3, False)
    refused(piece, decoder, torch.zeros(1, 15, dtype=torch.int64), group)
    refused(piece, decoder, torch.zeros(1, 12, dtype=torch.int64), group)
    spread_context(decoder, group)
    refused(decoder, torch.zeros(1, 6, dtype=torch.int64))
    refused(decoder, torch.zeros(1, 4, dtype=torch.int64), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    refused(decoder, torch.zeros(1, 4, dtype=torch.int64), cache=decoder.make_cache())
    short = build_decoder(config(5, ("nope", "nope")))
    spread_context(short, group)
    refused(short, torch.zeros(1, 2, dtype=torch.int64))
    return found


def test_what_has_no_pieces_is_refused(workers: Workers) -> None:
    within = "must be a multiple of attention_chunk_size=4, because a chunk is not shared by ranks"
    neither = "ValueError: layer 0 mixer: pieces of sequences have neither a cache nor an attention mask; must be None"
    assert workers.run(messages, 2)[0] == [
        "InputError: layer 1 mixer: GatedAverage cannot have pieces of a sequence; must be Attention",
        "InputError: sequences of 15 tokens: must be a multiple of the 2 ranks that share them",
        f"InputError: layer 0 mixer: a piece of 6 tokens; {within}",
        f"InputError: layer 0 mixer: a piece of 6 tokens; {within}",
        neither,
        neither,
        "ValueError: layer 0 mixer: a piece of 2 tokens; must be 4 or more, for conv_width",
    ]
