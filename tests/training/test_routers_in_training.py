"""Every built-in router trains, and those with a state move it once per optimizer step, by all of its tokens."""

from typing import Any

import pytest
import torch
from small_fits import Batch, batches, fit, make
from torch import Tensor

from moesaic.layers import ROUTERS
from moesaic.models import MoEConfig, llama4_toy
from moesaic.training.module import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "group_limited": {"num_groups": 2, "top_groups": 1},
    "mlp": {"router_dim": 8, "depth_average": True},
}


def moe(router: str) -> MoEConfig:
    scores: Any = {"score_function": "softmax"} if router == "top_p" else {}
    return MoEConfig(num_experts=4, hidden_dim=32, router={"type": router, **ARGUMENTS.get(router, {})}, **scores)


def train(router: str, data: list[Batch], validation: list[Batch] | None = None, **arguments: Any) -> LanguageModel:
    return fit(make(llama4_toy(moe=moe(router)), **arguments), data, validation)


def state(module: LanguageModel) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in module.decoder.named_buffers() if ".router." in name}


@pytest.mark.slow_but_for("top_k")
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_trains_and_learns(router: str) -> None:
    before = make(llama4_toy(moe=moe(router)))
    module = train(router, batches(2))
    weight = "layers.1.ffn.router.weight"
    moved = module.decoder.get_parameter(weight) - before.decoder.get_parameter(weight)
    assert moved.abs().max() > 0
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.slow_but_for("relu")
@pytest.mark.parametrize("router", ["quantile", "threshold", "relu"])
def test_the_state_moves_once_per_step_by_all_of_its_tokens(router: str) -> None:
    both = batches(2)
    joined = [{key: torch.cat([batch[key] for batch in both]) for key in ("tokens", "labels")}]
    whole = state(train(router, joined))
    initial = state(make(llama4_toy(moe=moe(router))))
    assert any(not torch.equal(whole[name], initial[name]) for name in whole)
    for arguments in ({"accumulate": 2}, {"accumulate": 2, "checkpoint_activations": True}):
        micro = state(train(router, both, validation=batches(2, size=3), **arguments))
        for name, expected in whole.items():
            torch.testing.assert_close(micro[name], expected, msg=f"{name} {arguments}")


@pytest.mark.parametrize("router", ["quantile", "threshold", "relu"])
def test_padding_does_not_move_the_state(router: str) -> None:
    [batch] = batches(1)
    padding = torch.zeros(2, 48, dtype=torch.int64)
    padded = {
        "tokens": torch.cat((batch["tokens"], padding), dim=1),
        "labels": torch.cat((batch["labels"], padding - 100), dim=1),
        "valid": torch.arange(64).expand(2, 64) < 16,
    }
    with_padding, without = state(train(router, [padded])), state(train(router, [batch]))
    for name, expected in without.items():
        torch.testing.assert_close(with_padding[name], expected, msg=name)


def test_the_loss_of_a_router_is_part_of_the_gradient() -> None:
    config = llama4_toy(moe=MoEConfig(num_experts=4, hidden_dim=32, router={"type": "relu", "initial_weight": 10.0}))
    strong, weak = fit(make(config), batches(1)), train("relu", batches(1))
    name = "layers.1.ffn.router.weight"
    assert not torch.allclose(strong.decoder.get_parameter(name), weak.decoder.get_parameter(name), atol=1e-6)
    assert float(strong.log_book.auxiliary["train/router_loss"]) > 0


def test_ids_reach_a_hash_router_under_recomputation_in_decoding_and_not_from_embeddings() -> None:
    decoder = make(llama4_toy(moe=moe("hash"))).decoder
    tokens = batches(1)[0]["tokens"]
    routing = decoder(tokens).routing["layers.1.ffn"]
    table = decoder.get_buffer("layers.1.ffn.router.token_experts")
    assert torch.equal(routing.expert_ids, table[tokens.flatten()])
    plain, recomputed = train("hash", batches(2)), train("hash", batches(2), checkpoint_activations=True)
    for (name, a), b in zip(plain.state_dict().items(), recomputed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    decoder.eval()
    cache = decoder.make_cache()
    steps = [decoder(tokens[:, i : i + 1], cache).logits for i in range(tokens.size(1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), decoder(tokens).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="embeddings: the router of layer 1 asks for token ids; must be tokens"):
        decoder.hidden_states(embeddings=decoder.embed(tokens))
