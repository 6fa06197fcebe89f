"""A router that has something to say to the one of the next MoE layer."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.layers import ROUTERS, MlpRouter, Routing
from moesaic.models import Decoder, MoEConfig, build_decoder, generate, llama4_toy
from moesaic.models.decoder import Block, initialize

DEPTH = {"type": "mlp", "router_dim": 8, "depth_average": True}


class Counting(nn.Module):
    """It routes by how many routers came before it, so that one whose state is lost shows."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x: Tensor, router_state: Tensor | None) -> Routing:
        seen = x.new_zeros(x.size(0), 1) if router_state is None else router_state
        logits = x @ self.weight.T
        return Routing(logits, logits[:, :1].sigmoid(), seen.long() % self.num_experts, state=seen + 1)


def make(router: dict[str, object] | str, **arguments: object) -> Decoder:
    torch.manual_seed(0)
    scores = "softmax" if router in ("top_p", {"type": "top_p"}) or "router_dim" in router else "sigmoid"
    config = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, router=router, score_function=scores))
    arguments = {"interleave_moe_layer_step": 1, "init_std": 0.3} | arguments
    config = dataclasses.replace(config, **arguments)  # type: ignore[arg-type]
    return build_decoder(config, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1))


def gradients(decoder: Decoder, *, training: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.train(training)
    logits = decoder(tokens()).logits
    (logits * torch.linspace(-1, 1, logits.size(-1), dtype=logits.dtype)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


def test_the_decoder_hands_the_state_from_layer_to_layer() -> None:
    decoder = make(DEPTH)
    _, routing = decoder.hidden_states(tokens())
    x, state, states = decoder.embed(tokens()), None, []
    for block in decoder.layers:
        assert isinstance(block, Block)
        x, decided = block(x, router_state=state)
        assert decided is not None and decided.state is not None
        state = decided.state
        states.append(state)
    assert all(torch.equal(a.state, b) for a, b in zip(routing.values(), states, strict=True) if a.state is not None)
    without = make(DEPTH)
    for block in without.layers:
        block.takes_router_state = False
    assert not torch.equal(without(tokens()).logits, decoder(tokens()).logits), "the state matters"


def test_every_scale_but_the_first_learns_and_recomputation_changes_nothing() -> None:
    logits, kept = gradients(make(DEPTH))
    scales = [grad for name, grad in kept.items() if name.endswith("state_scale")]
    assert not scales[0].any() and all(grad.abs().max() > 0 for grad in scales[1:])
    decoder = make(DEPTH)
    decoder.checkpoint_activations = True
    again, recomputed = gradients(decoder)
    assert torch.equal(logits, again) and kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


def test_decoding_with_a_cache_changes_nothing_and_padding_is_not_seen() -> None:
    decoder = make(DEPTH).eval()
    whole = decoder(tokens()).logits
    cache = decoder.make_cache()
    parts = [decoder(part, cache).logits for part in tokens().split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    padded, other = (torch.cat((torch.full((2, 3), fill), tokens()), dim=1) for fill in (0, 7))
    mask = torch.arange(12).expand(2, 12) >= 3
    seen = decoder(padded, attention_mask=mask).logits[:, 3:]
    assert torch.equal(decoder(other, attention_mask=mask).logits[:, 3:], seen)
    assert generate(decoder, tokens(), 3, temperature=0).shape == (2, 12)


def test_a_replay_scores_with_the_state() -> None:
    decoder = make(DEPTH)
    block = decoder.layers[1]
    assert isinstance(block, Block)
    x, state = decoder.embed(tokens()), torch.randn(18, 8, dtype=torch.float64)
    y, routing = block.ffn.forward_with_routing(x, router_state=state)  # type: ignore[operator]
    again, replayed = block.ffn.forward_with_routing(x, routing, router_state=state)  # type: ignore[operator]
    assert torch.equal(y, again) and torch.equal(replayed.logits, routing.logits) and replayed.replayed
    other, _ = block.ffn.forward_with_routing(x, routing)  # type: ignore[operator]
    assert not torch.equal(other, y)


def test_a_router_of_somebody_else_gets_the_state() -> None:
    decoder = make({"type": f"{__name__}.Counting"})
    _, routing = decoder.hidden_states(tokens())
    assert [each.expert_ids.unique().tolist() for each in routing.values()] == [[0], [1], [2], [3]]
    dense_between = make({"type": f"{__name__}.Counting"}, interleave_moe_layer_step=2)
    _, routing = dense_between.hidden_states(tokens())
    assert [each.expert_ids.unique().tolist() for each in routing.values()] == [[0], [1]]


def test_a_state_of_another_shape_and_a_flag_that_is_none_are_refused_by_name() -> None:
    router = MlpRouter(16, 4, router_dim=8, depth_average=True)
    with pytest.raises(ValueError, match=r"MlpRouter: router_state of shape \(5, 4\).*\(5, 8\)"):
        router(torch.randn(5, 16), router_state=torch.randn(5, 4))
    with pytest.raises(InputError, match=r"moe\.router=mlp: depth_average='yes'.*must be True or False"):
        make({**DEPTH, "depth_average": "yes"})


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_drawn_whole_by_the_rule(name: str) -> None:
    """Weights that hold garbage, as after `to_empty`, are all drawn: biases 0, gains 1."""
    own = {"group_limited": {"num_groups": 2, "top_groups": 1}, "mlp": DEPTH}.get(name, {})
    decoder = make({"type": name, **own})
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(torch.nan)
        torch.manual_seed(0)
        initialize(decoder, decoder.parametrization)
    for path, parameter in decoder.named_parameters():
        assert path.endswith("norm.weight") or parameter.isfinite().all(), path
        assert not path.endswith(".bias") or not parameter.any(), path
