import dataclasses
from typing import Any

import pytest
import torch
from custom_samples import BottomKRouter, LinearRouter, RunningMean, TwoMatrices
from hypothesis import given
from hypothesis import strategies as st
from reference.comparing import OutputSizes, assert_close, assert_gradients, gradients, redraw
from torch import Tensor

from moesaic.errors import InputError
from moesaic.layers import Attention, Experts, MoE, TopKRouter
from moesaic.models import Decoder, DecoderConfig, LayerConfig, build_decoder, llama4_toy

VOCAB, LENGTH = 19, 13


def pattern(*layers: tuple[Any, Any]) -> dict[str, Any]:
    entries = tuple(LayerConfig(mixer, ffn) for mixer, ffn in layers)
    return {"pattern": entries, "interleave_moe_layer_step": None, "nope_layer_interval": None}


def config(attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> DecoderConfig:
    toy = llama4_toy(vocab_size=VOCAB, dim=16, hidden_dim=24)
    assert toy.moe is not None
    small = {"attention_chunk_size": 4, "head_dim": 6}
    return dataclasses.replace(
        toy,
        attention=dataclasses.replace(toy.attention, **{**small, **(attention or {})}),
        moe=dataclasses.replace(toy.moe, **{"hidden_dim": 12, **(moe or {})}),
        **changes,
    )


OWN_MIXER = {"type": "custom_samples.RunningMean", "scale": 3.0}
OWN_FFN = {"type": "custom_samples.TwoMatrices", "hidden_dim": 10}

CONFIGS = {
    "llama 4": config(),
    "every mixer": config(
        **pattern(("chunked_rope", "dense"), ("rope", "moe"), ("nope", "dense_twin"), ("chunked_nope", "moe"))
    ),
    "top 3, softmax, score after": config(
        moe={
            "top_k": 3,
            "score_function": "softmax",
            "normalize_scores": True,
            "score_before_experts": False,
            "expert_bias": True,
        }
    ),
    "convolution and biases": config({"conv_width": 3, "bias": True}),
    "custom modules": config(**pattern((OWN_MIXER, "moe"), ("chunked_rope", OWN_FFN)), num_layers=2),
}


def build(config: DecoderConfig, **arguments: Any) -> Decoder:
    return redraw(build_decoder(config, dtype=torch.float64, **arguments))  # type: ignore[return-value]


def text(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB, (rows, length))


@pytest.mark.slow_but_for("custom modules")
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_causality(name: str) -> None:
    decoder, tokens = build(CONFIGS[name]), text(1)
    logits = decoder(tokens).logits
    for t in range(LENGTH):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        difference = (decoder(changed).logits - logits).abs().amax(dim=(0, 2))
        assert t == 0 or difference[:t].max() <= 1e-10, f"token {t} is seen before it comes"
        assert difference[t] > 1e-3
        shorter = decoder(tokens[:, : t + 1]).logits
        assert_close(shorter, logits[:, : t + 1], 1e-10, f"logits of the first {t + 1} tokens")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_do_not_depend_on_batch_mates(name: str) -> None:
    decoder, tokens = build(CONFIGS[name]), text(3)
    together = decoder(tokens).logits
    for row in range(3):
        assert_close(decoder(tokens[row : row + 1]).logits, together[row : row + 1], 1e-10, f"row {row}")
    assert_close(decoder(tokens.flip(0)).logits.flip(0), together, 1e-10, "other order")


@given(splits=st.lists(st.integers(1, 6), min_size=1, max_size=6), name=st.sampled_from(list(CONFIGS)[:-1]))
@torch.no_grad()
def test_cached_equals_uncached(splits: list[int], name: str) -> None:
    decoder, tokens = build(CONFIGS[name]), text(length=sum(splits))
    cache = decoder.make_cache()
    assert cache is not None
    pieces = [decoder(piece, cache).logits for piece in tokens.split(splits, dim=1)]
    assert_close(torch.cat(pieces, dim=1), decoder(tokens).logits, 1e-10, "logits")


@torch.no_grad()
def test_the_four_mixers_differ_in_positions_and_reach() -> None:
    """One layer: does token 0 reach token 6 (chunks of 4)? Does the order of tokens 4 and 5 matter to it?"""
    found = {}
    for mixer in ("chunked_rope", "rope", "nope", "chunked_nope"):
        decoder = build(config({"temperature": None}, num_layers=1, **pattern((mixer, "dense"))))
        tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
        changed, swapped = tokens.clone(), tokens.clone()
        changed[0, 0] = 9
        swapped[0, 4:6] = tokens[0, [5, 4]]
        last = decoder(tokens).logits[0, 6]
        reach, order = ((decoder(other).logits[0, 6] - last).abs().max() > 1e-6 for other in (changed, swapped))
        found[mixer] = (bool(reach), bool(order))
    assert found == {
        "chunked_rope": (False, True),
        "rope": (True, True),
        "nope": (True, False),
        "chunked_nope": (False, False),
    }


def test_routing_comes_by_module_name() -> None:
    decoder = build(CONFIGS["every mixer"])
    output = decoder(text())
    assert list(output.routing) == ["layers.1.ffn", "layers.3.ffn"]
    for name, routing in output.routing.items():
        assert isinstance(decoder.get_submodule(name), MoE)
        assert routing.logits.shape == (2 * LENGTH, 4)
        assert routing.tokens_per_expert.sum() == 2 * LENGTH
    assert build(config(interleave_moe_layer_step=0))(text()).routing == {}


def test_hidden_states_are_what_the_head_sees() -> None:
    decoder, tokens = build(CONFIGS["llama 4"]), text()
    hidden, routing = decoder.hidden_states(tokens)
    assert_close(hidden @ decoder.head.weight.T, decoder(tokens).logits, 1e-12, "logits")
    assert routing.keys() == decoder(tokens).routing.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_activations_changes_nothing(name: str) -> None:
    tokens = text()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        decoder = build(CONFIGS[name], checkpoint_activations=checkpointed).train()
        calls: list[int] = []
        decoder.layers[0].register_forward_pre_hook(lambda module, inputs, calls=calls: calls.append(1))
        logits, routing = decoder(tokens)
        loss = logits.square().mean() + sum(r.logits.square().mean() for r in routing.values())
        loss.backward()
        assert len(calls) == 1 + checkpointed, "a block runs again in backward if and only if it is checkpointed"
        results.append((loss.detach(), routing, gradients(decoder)))
    (loss, routing, expected), (loss_again, routing_again, found) = results
    assert_close(loss_again, loss, 1e-14, "loss")
    assert_gradients(found, expected, 1e-12)
    assert list(routing_again) == list(routing)
    for key in routing:
        assert torch.equal(routing_again[key].tokens_per_expert, routing[key].tokens_per_expert), key


def test_every_parameter_gets_a_gradient() -> None:
    """Even with one token, where most experts are idle."""
    for name, each in CONFIGS.items():
        decoder = build(each)
        decoder(text(1, 2)).logits.square().sum().backward()
        assert [key for key, p in decoder.named_parameters() if p.grad is None] == [], name


def test_tied_head() -> None:
    decoder = build(config(tie_embeddings=True))
    assert decoder.head.weight is decoder.embedding.weight
    assert "head.weight" not in dict(decoder.named_parameters())
    copy = build(config(tie_embeddings=True))
    copy.load_state_dict(decoder.state_dict())
    assert copy.head.weight is copy.embedding.weight
    tokens = text()
    assert torch.equal(copy(tokens).logits, decoder(tokens).logits)


def test_meta_device_and_dtype_reach_every_part() -> None:
    for name, each in CONFIGS.items():
        meta = build_decoder(each, device="meta", dtype=torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters()), name
        output = build_decoder(each, dtype=torch.bfloat16)(text())
        assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all(), name


def test_selection_bias_stays_fp32_in_a_bf16_decoder() -> None:
    decoder = build_decoder(CONFIGS["top 3, softmax, score after"], dtype=torch.bfloat16)
    assert {buffer.dtype for buffer in decoder.buffers()} == {torch.float32}
    assert sum("expert_bias" in key for key in decoder.state_dict()) == 2


def test_one_seed_one_initialization() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build_decoder(CONFIGS["llama 4"]).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


@pytest.mark.parametrize("init_std", [0.02, None])
def test_initial_scale(init_std: float | None) -> None:
    wide = config(
        {"head_dim": 24, "num_heads": 4, "num_kv_heads": 2, "bias": True, "conv_width": 2},
        dim=64,
        hidden_dim=128,
        vocab_size=128,
        init_std=init_std,
        num_layers=2,
    )
    decoder = build_decoder(wide)
    checked = 0
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or "conv" in name:
            assert (parameter == 0).all(), name
        else:
            fan_in = parameter.size(1)  # also of (E, in, out); an embedding takes 1 / sqrt(dim)
            expected = init_std or fan_in**-0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name
            checked += 1
    assert checked == 2 + 2 * 4 + 3 + 6


def test_dense_twin_is_built() -> None:
    twin = build(config(dense_twin=True, moe={"top_k": 2, "shared_hidden_dim": 5}))
    assert twin(text()).routing == {}
    assert twin.get_submodule("layers.1.ffn.up_proj").out_features == 2 * 12 + 5
    assert twin.get_submodule("layers.0.ffn.up_proj").out_features == 24


def test_options_of_the_moe_reach_it() -> None:
    decoder = build(CONFIGS["top 3, softmax, score after"])
    moe = decoder.get_submodule("layers.1.ffn")
    assert isinstance(moe, MoE) and isinstance(moe.router, TopKRouter) and isinstance(moe.experts, Experts)
    assert (moe.router.top_k, moe.router.score_function, moe.router.normalize_scores) == (3, "softmax", True)
    assert moe.router.expert_bias is not None and moe.score_before_experts is False
    uniform = build(config(moe={"router": "uniform", "backend": "padded"}))
    counts = uniform(text(2, 8)).routing["layers.1.ffn"].tokens_per_expert
    assert counts.tolist() == [4, 4, 4, 4]
    assert uniform.get_submodule("layers.1.ffn.experts").backend == "padded"


def test_custom_modules_by_dotted_path() -> None:
    decoder = build_decoder(CONFIGS["custom modules"], dtype=torch.float64)
    first, second = decoder.layers
    assert isinstance(first.mixer, RunningMean) and first.mixer.scale == 3.0
    assert isinstance(second.ffn, TwoMatrices) and second.ffn.up.out_features == 10
    assert isinstance(second.mixer, Attention) and isinstance(first.ffn, MoE)
    assert first.mixer.out.weight.dtype == torch.float64
    assert decoder.make_cache() is None
    assert list(decoder(text()).routing) == ["layers.0.ffn"]


@pytest.mark.parametrize(("name", "router"), [("LinearRouter", LinearRouter), ("BottomKRouter", BottomKRouter)])
def test_own_router_by_dotted_path(name: str, router: type) -> None:
    decoder = build(config(moe={"router": {"type": f"custom_samples.{name}"}, "top_k": 2}))
    moe = decoder.get_submodule("layers.1.ffn")
    assert type(moe.router) is router
    routing = decoder(text()).routing["layers.1.ffn"]
    assert routing.expert_ids.shape == (2 * LENGTH, 2)
    chosen = routing.logits.gather(1, routing.expert_ids).amax(1)
    best = routing.logits.amax(1)
    assert (chosen == best).all() if router is LinearRouter else (chosen < best).all()


def test_custom_modules_keep_their_initialization() -> None:
    own = config(
        moe={"router": {"type": "custom_samples.LinearRouter"}},
        num_layers=2,
        **pattern(("chunked_rope", "moe"), ("chunked_rope", OWN_FFN)),
    )
    decoder = build_decoder(own)
    assert (decoder.get_submodule("layers.1.ffn").down.weight == 0.5).all(), "ffn"
    assert (decoder.get_submodule("layers.0.ffn.router").linear.weight == 0.25).all(), "router inside our MoE"
    assert (decoder.get_submodule("layers.0.ffn.router").linear.bias == 0.125).all(), "router inside our MoE"


def test_an_own_subclass_of_our_router_keeps_its_initialization() -> None:
    decoder = build_decoder(config(moe={"router": {"type": "custom_samples.BottomKRouter"}}))
    assert (decoder.get_submodule("layers.1.ffn.router").weight == 0.25).all()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "no_such_package.Part"}, r"layer 0 mixer: type='no_such_package\.Part' cannot be imported"),
        (
            {"type": "custom_samples.Absent"},
            r"layer 0 mixer: type='custom_samples\.Absent' cannot be imported",
        ),
        ({"type": "NoDots"}, r"layer 0 mixer: type='NoDots': must be package.module.name"),
        (
            {"type": "custom_samples.RunningMean", "sclae": 2},
            r"layer 0 mixer: custom_samples\.RunningMean\(dim, sclae\) failed: .*sclae",
        ),
        (
            {"type": "custom_samples.Refusing"},
            r"layer 0 mixer: custom_samples\.Refusing\(dim\) failed: dim=16",
        ),
        (
            {"type": "custom_samples.not_a_module"},
            r"layer 0 mixer: custom_samples\.not_a_module made a list; it must be a torch\.nn\.Module",
        ),
    ],
)
def test_bad_custom_modules(part: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_decoder(config(**pattern((part, "dense"))))


def test_bad_own_ffn_and_router_say_where() -> None:
    with pytest.raises(InputError, match=r"layer 1 ffn: custom_samples\.TwoMatrices\(dim\) failed: .*hidden_dim"):
        build_decoder(
            config(**pattern(("chunked_rope", "dense"), ("chunked_rope", {"type": "custom_samples.TwoMatrices"})))
        )
    with pytest.raises(InputError, match=r"layer 1 router: type='custom_samples\.Absent' cannot be imported"):
        build_decoder(config(moe={"router": {"type": "custom_samples.Absent"}}))


def test_hidden_states_build_no_logits() -> None:
    decoder = build_decoder(config(vocab_size=1000))
    tokens = torch.randint(1000, (2, LENGTH))
    with OutputSizes() as sizes:
        decoder.hidden_states(tokens)
    assert sizes.largest < 2 * LENGTH * 1000


@pytest.mark.slow_but_for("None")
@pytest.mark.parametrize("pieces", [None, [5, 1, 1, 6], [1] * LENGTH])
def test_padding_changes_no_logit_and_counts_nowhere(pieces: list[int] | None) -> None:
    decoder = build(config({"conv_width": 3, "bias": True, "temperature": None}))  # which counts padding
    tokens, padding = text(2), 5
    alone, routing = decoder(tokens[:1, padding:])
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :padding] = 0
    for content in (0, VOCAB - 1):
        tokens[0, :padding] = content
        logits, counts, end, cache = [], torch.zeros(4, dtype=torch.int64), 0, decoder.make_cache()
        for piece in pieces or [LENGTH]:
            begin, end = end, end + piece
            found = decoder(tokens[:, begin:end], cache if pieces else None, mask[:, :end])
            logits.append(found.logits)
            counts = counts + found.routing["layers.1.ffn"].tokens_per_expert
        assert_close(torch.cat(logits, dim=1)[:1, padding:], alone, 1e-6, "logits")
        mate = decoder(tokens[1:]).routing["layers.1.ffn"].tokens_per_expert
        assert counts.tolist() == (routing["layers.1.ffn"].tokens_per_expert + mate).tolist()


def test_a_custom_module_of_ours_is_counted_before_it_takes_memory() -> None:
    part = {"type": "moesaic.layers.FeedForward", "hidden_dim": 10**12}
    with pytest.raises(InputError, match=r"moesaic.layers.FeedForward needs .* of memory, but"):
        build_decoder(config(**pattern(("rope", part))))
