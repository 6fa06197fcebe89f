"""A dense model made into a mixture of experts: the function is the same, and what does not fit is refused by name."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from moesaic.errors import InputError
from moesaic.layers.routers import RouterName
from moesaic.models import Decoder, DecoderConfig, LayerConfig, MoEConfig, build_decoder, llama4_toy, upcycle
from moesaic.models.decoder import Block

WIDTH = 64
NORMALIZED: dict[str, Any] = {"normalize_scores": True, "score_before_experts": False}


def dense_model(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    """A decoder of dense FFNs with weights large enough that every layer matters."""
    torch.manual_seed(3)
    decoder = build_decoder(llama4_toy(50, num_layers=2, moe=None, interleave_moe_layer_step=0, **changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return decoder


def with_experts(**moe: Any) -> DecoderConfig:
    return llama4_toy(50, num_layers=2, moe=MoEConfig(**{"num_experts": 8, "hidden_dim": WIDTH, **moe}))


TOKENS = torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "moe",
    [
        {"hidden_dim": 32},  # Llama 4's: the shared expert is one half
        {"shared_hidden_dim": 0},
        {"shared_hidden_dim": 0, "top_k": 2},
        {"shared_hidden_dim": 0, "score_function": "softmax", "score_before_experts": False},
        {"shared_hidden_dim": 0, "top_k": 3, "num_experts": 7, "score_function": "softmax", **NORMALIZED},
        {"hidden_dim": 16, "shared_hidden_dim": 0, "top_k": 4, "score_function": "softmax", **NORMALIZED},
        {"hidden_dim": 16, "shared_hidden_dim": 0, "num_experts": 16, "top_k": 8, **NORMALIZED},
        {"hidden_dim": 16, "shared_hidden_dim": 0, "num_experts": 16, "top_k": 8, "normalize_scores": True},
        {"hidden_dim": 16, "shared_hidden_dim": 0, "num_experts": 16, "top_k": 4, "normalize_scores": True},
        {"hidden_dim": 16, "shared_hidden_dim": 0, "num_experts": 16, "top_k": 8},
        {"hidden_dim": 16, "shared_hidden_dim": 32, "num_experts": 6, "top_k": 2, "score_function": "sqrt_softplus"},
        {"hidden_dim": 16, "shared_hidden_dim": 32, "num_experts": 6, "top_k": 4, "score_before_experts": False},
        {"top_k": 2, "shared_hidden_dim": 0, "router": {"type": "top_k", "scale": 2.5, "bias": True}},
        {"hidden_dim": 32, "shared_hidden_dim": 0, "top_k": 4, "expert_bias": True, **NORMALIZED},
    ],
    ids=str,
)
def test_the_function_is_that_of_the_dense_model(moe: dict[str, Any]) -> None:
    dense = dense_model()
    decoder = upcycle(dense, with_experts(**moe))
    found, expected = decoder(TOKENS), dense(TOKENS).logits
    torch.testing.assert_close(found.logits, expected, rtol=1e-11, atol=1e-11)
    [routing] = found.routing.values()
    shards = (WIDTH - with_experts(**moe).moe.shared_width) // decoder.config.moe.hidden_dim  # type: ignore[union-attr]
    groups = routing.expert_ids // shards
    assert groups.unique().numel() == routing.logits.size(1) // shards, "tokens go to all groups"
    for shard in range(shards):
        assert ((routing.expert_ids % shards == shard).sum(dim=1) == routing.expert_ids.size(1) // shards).all()
    found.logits.square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("hidden_dim", "top_k"), [(32, 1), (16, 2), (8, 8)])
def test_it_is_bit_equal_where_every_number_is_exact(hidden_dim: int, top_k: int, before: bool) -> None:
    dense = dense_model(torch.float32, activation="relu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=draw))
    moe = MoEConfig(8, hidden_dim, top_k=top_k, shared_hidden_dim=32, score_before_experts=before)
    made = upcycle(dense, llama4_toy(50, num_layers=2, moe=moe, activation="relu"))
    x = torch.randint(-2, 3, (40, 32), generator=draw).float()
    first, second = (decoder.layers[1] for decoder in (dense, made))
    assert isinstance(first, Block) and isinstance(second, Block)
    expected = first.ffn(x)
    assert expected.abs().max() > 100
    assert torch.equal(second.ffn(x), expected)


@pytest.mark.slow_but_for("quantile", "capacity")
@pytest.mark.parametrize("router", get_args(RouterName))
def test_every_router_keeps_the_function_or_is_refused(router: str) -> None:
    arguments = {
        "group_limited": {"num_groups": 2, "top_groups": 1},
        "mlp": {"router_dim": 8, "depth_average": True},
    }.get(router, {})
    skips = router in ("top_p", "relu", "threshold", "expert_choice", "capacity")
    moe = {"top_k": 2, "shared_hidden_dim": 0, "router": {"type": router, **arguments}, "score_before_experts": False}
    scores = {"score_function": "softmax"} if router == "top_p" else {"normalize_scores": not skips}
    config = with_experts(**moe, **scores)
    dense = dense_model()
    if skips:
        with pytest.raises(InputError, match=r"model.moe.router: \w+Router may leave out experts; must be top_k"):
            upcycle(dense, config)
        return
    decoder = upcycle(dense, config)
    for model in (decoder.train(), decoder.eval()):
        torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, rtol=1e-11, atol=1e-11)


def test_noise_makes_the_copies_differ_and_is_repeatable() -> None:
    dense, config = dense_model(), with_experts(shared_hidden_dim=0, top_k=2, **NORMALIZED)

    def stack(noise: float, seed: int = 0) -> Tensor:
        return (
            upcycle(dense, config, noise=noise, seed=seed).get_parameter("layers.1.ffn.experts.gate_up_proj").detach()
        )

    plain, noisy = stack(0.0), stack(0.1)
    assert torch.equal(plain[0], plain[1]) and not torch.equal(noisy[0], noisy[1])
    assert float((noisy - plain).std() / plain.std()) == pytest.approx(0.1, rel=0.03)
    assert torch.equal(noisy, stack(0.1)) and not torch.equal(noisy, stack(0.1, seed=1))
    with pytest.raises(ValueError, match=r"noise=-1: must be a number >= 0"):
        upcycle(dense, config, noise=-1)


def test_the_dense_model_is_left_as_it_is_and_shares_nothing() -> None:
    dense = dense_model()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    decoder = upcycle(dense, with_experts(hidden_dim=32))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], weight) for name, weight in dense.state_dict().items())


def test_a_dense_twin_becomes_the_model_that_it_is_the_twin_of() -> None:
    whole = with_experts(num_experts=4, hidden_dim=16, top_k=2, shared_hidden_dim=32)
    torch.manual_seed(0)
    twin = build_decoder(dataclasses.replace(whole, dense_twin=True, hidden_dim=24), dtype=torch.float64)
    decoder = upcycle(twin, dataclasses.replace(whole, hidden_dim=24))
    torch.testing.assert_close(decoder(TOKENS).logits, twin(TOKENS).logits, rtol=1e-11, atol=1e-11)


MIXED = (LayerConfig("chunked_rope", "moe"), LayerConfig("nope", "dense"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (llama4_toy(50, num_layers=2, dim=16), r"a dense model of another shape: model.dim: 32 there, 16 now$"),
        (llama4_toy(50, num_layers=4), r"model.num_layers: 2 there, 4 now"),
        (llama4_toy(51, num_layers=2), r"model.vocab_size: 50 there, 51 now"),
        (llama4_toy(50, num_layers=2, nope_layer_interval=0), None),
        (llama4_toy(50, num_layers=2, nope_layer_interval=2), r"layers.1.mixer: 'chunked_rope' there, 'nope' now"),
        (llama4_toy(50, num_layers=2, activation="gelu"), r"model.activation: 'silu' there, 'gelu' now"),
        (llama4_toy(50, num_layers=2, moe=None, interleave_moe_layer_step=0), r"model: no layer of it is MoE"),
        (llama4_toy(50, num_layers=2, hidden_dim=48), r"layers.0.ffn: dense of width 64 there, dense of width 48 now"),
        (with_experts(hidden_dim=24, shared_hidden_dim=0), r"hidden_dim=24: must divide 64, the width 64 of the dense"),
        (
            with_experts(),
            r"model.moe.shared_hidden_dim=64: must be less than 64, the width of the dense FFN of layer 1",
        ),
        (with_experts(hidden_dim=16, shared_hidden_dim=0), r"model.moe.top_k=1: must be a multiple of 4, as so many"),
        (
            with_experts(hidden_dim=16, shared_hidden_dim=16, num_experts=8, top_k=3),
            r"model.moe.num_experts=8: must be a multiple of 3, as so many experts of hidden_dim=16 make up the width "
            r"64 of the dense FFN of layer 1 less 16 of the shared expert",
        ),
        (
            with_experts(hidden_dim=32, latent_dim=16),
            r"layer 1 has experts of a latent width; must have swiglu experts",
        ),
        (with_experts(hidden_dim=32, identity_experts=1), r"layer 1 has FreeExperts; must have swiglu experts alone"),
        (with_experts(hidden_dim=32, router="hash"), r"HashRouter chooses otherwise than by rows alone; must be"),
        (with_experts(hidden_dim=32, expert_bias=True), r"model.moe.expert_bias=True: must be false, as it would"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_does_not_fit_is_refused_by_name(config: DecoderConfig, message: str | None) -> None:
    dense = dense_model(torch.float32)
    if message is None:
        upcycle(dense, config)
        return
    with pytest.raises(InputError, match=message):
        upcycle(dense, config)


def test_what_is_not_dense_is_refused() -> None:
    routed = build_decoder(llama4_toy(50, num_layers=2))
    with pytest.raises(InputError, match=r"layers.1.ffn: MoE there, MoE now; must be dense there"):
        upcycle(routed, routed.config)  # type: ignore[arg-type]
    swapped = llama4_toy(
        50, num_layers=2, pattern=MIXED, interleave_moe_layer_step=None, nope_layer_interval=None, hidden_dim=WIDTH
    )
    with pytest.raises(InputError, match=r"layers.1.mixer: 'chunked_rope' there, 'nope' now"):
        upcycle(routed, swapped)
    with pytest.raises(InputError, match=r"dtype=torch.float16: must have the range of float32"):
        upcycle(dense_model(torch.float16), with_experts(hidden_dim=32))
