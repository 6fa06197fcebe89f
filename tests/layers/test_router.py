import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.layers import LocalDispatcher, Routing, TopKRouter, UniformRouter, count_tokens


def router_of(logits: Tensor, **arguments: object) -> tuple[TopKRouter, Tensor]:
    """A router, and its input, for which the logits are exactly `logits` (T, E)."""
    experts = logits.size(1)
    router = TopKRouter(experts, experts, dtype=logits.dtype, **arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router, logits


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_scores_and_order_by_hand(score_function: str, top_k: int) -> None:
    router, x = router_of(torch.tensor([[0.5, -1.0, 2.0, 0.0]]), top_k=top_k, score_function=score_function)
    routing = router(x)
    odds = torch.exp(x[0])
    probabilities = odds / (1 + odds) if score_function == "sigmoid" else odds / odds.sum()
    order = [2, 0, 3, 1][:top_k]
    assert routing.expert_ids.tolist() == [order]
    torch.testing.assert_close(routing.scores, probabilities[order][None])
    torch.testing.assert_close(routing.logits, x)
    assert routing.tokens_per_expert.tolist() == [int(e in order) for e in range(4)]


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_normalized_scores_sum_to_one(score_function: str) -> None:
    router = TopKRouter(6, 5, top_k=3, score_function=score_function, normalize_scores=True)
    x = torch.randn(7, 6)
    plain = TopKRouter(6, 5, top_k=3, score_function=score_function)
    plain.load_state_dict(router.state_dict())
    scores, unnormalized = router(x).scores, plain(x).scores
    torch.testing.assert_close(scores.sum(-1), torch.ones(7))
    torch.testing.assert_close(scores, unnormalized / unnormalized.sum(-1, keepdim=True))


def test_normalized_scores_stay_finite_when_every_sigmoid_underflows() -> None:
    router, x = router_of(torch.tensor([[-120.0, -130.0, -110.0]]), top_k=2, normalize_scores=True)
    x.requires_grad_()
    scores = router(x).scores
    assert scores.isfinite().all(), scores
    scores.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_logits_are_still_ranked(dtype: torch.dtype, top_k: int) -> None:
    """Every one of these sigmoids is exactly 1: ranking scores would pick whatever a tie gives."""
    values = [20.0, 30.0, 40.0, 50.0]
    router, x = router_of(torch.tensor(list(itertools.permutations(values)), dtype=dtype), top_k=top_k)
    routing = router(x)
    assert (routing.scores == 1).all()
    assert x.gather(1, routing.expert_ids).tolist() == [[50.0, 40.0, 30.0][:top_k]] * 24


def test_expert_bias_changes_the_selection_and_not_the_scores() -> None:
    router, x = router_of(torch.tensor([[2.0, 1.0, -3.0]]), top_k=1, expert_bias=True)
    assert router.expert_bias is not None
    assert router(x).expert_ids.tolist() == [[0]]
    router.expert_bias[2] = 1.0  # 0.047 + 1 > 0.881
    routing = router(x)
    assert routing.expert_ids.tolist() == [[2]]
    torch.testing.assert_close(routing.scores, torch.sigmoid(x[:, 2:]))
    torch.testing.assert_close(routing.logits, x)
    router.expert_bias[2] = 0.8  # 0.847: it is added to the score, not to the logit, where -2.2 would lose anyway
    assert router(x).expert_ids.tolist() == [[0]]
    router.expert_bias[2] = 0.84  # 0.887 > 0.881, though as a logit it would lose
    assert router(x).expert_ids.tolist() == [[2]]


def test_expert_bias_is_saved_and_moved_by_nobody() -> None:
    router = TopKRouter(4, 3, expert_bias=True)
    assert "expert_bias" in router.state_dict()
    assert "expert_bias" not in TopKRouter(4, 3).state_dict()
    assert {name for name, _ in router.named_parameters()} == {"weight"}
    router.train()
    router(torch.randn(20, 4)).scores.sum().backward()
    assert router.expert_bias is not None and not router.expert_bias.any()


def test_expert_bias_is_fp32_in_a_bf16_router() -> None:
    router = TopKRouter(4, 3, expert_bias=True, dtype=torch.bfloat16)
    assert router.expert_bias is not None and router.expert_bias.dtype == torch.float32


@pytest.mark.parametrize("router_type", [TopKRouter, UniformRouter])
def test_gradient_reaches_weight_and_input(router_type: type[TopKRouter]) -> None:
    router = router_type(4, 3, top_k=2)
    x = torch.randn(5, 4, requires_grad=True)
    routing = router(x)
    routing.scores.square().sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0
    assert x.grad is not None and (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_logits_are_not_rounded_under_autocast(x_dtype: torch.dtype) -> None:
    router = TopKRouter(16, 8, top_k=2)
    x = torch.randn(9, 16).to(x_dtype)
    expected = x.float() @ router.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, expected)
    assert routing.scores.dtype == x_dtype


def test_scores_are_computed_in_fp32_in_a_bf16_model() -> None:
    router, x = router_of(torch.randn(200, 3).bfloat16(), top_k=3, normalize_scores=True)
    routing = router(x)
    chosen = x.gather(1, routing.expert_ids)
    wide, narrow = torch.sigmoid(chosen.float()), torch.sigmoid(chosen)
    expected = (wide / wide.sum(1, keepdim=True)).bfloat16()
    assert not torch.equal(expected, narrow / narrow.sum(1, keepdim=True)), "this input cannot tell them apart"
    assert torch.equal(routing.scores, expected)


@given(tokens=st.integers(0, 17), experts=st.integers(1, 9), data=st.data())
def test_uniform_router_is_balanced(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    router = UniformRouter(3, experts, top_k=top_k)
    x = torch.randn(tokens, 3)
    routing = router(x)
    counts = routing.tokens_per_expert
    assert counts.sum() == tokens * top_k
    assert counts.max() - counts.min() <= 1
    assert all(len(set(ids)) == top_k for ids in routing.expert_ids.tolist())
    torch.testing.assert_close(routing.scores, torch.sigmoid((x @ router.weight.T).gather(1, routing.expert_ids)))


@given(experts=st.integers(1, 6), tokens=st.integers(0, 12), data=st.data())
def test_top_k_invariants(experts: int, tokens: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    routing = TopKRouter(4, experts, top_k=top_k)(torch.randn(tokens, 4))
    assert routing.scores.shape == routing.expert_ids.shape == (tokens, top_k)
    assert (routing.scores.diff(dim=1) <= 0).all(), "best first"
    chosen = routing.logits.gather(1, routing.expert_ids)
    kept = torch.zeros_like(routing.logits, dtype=torch.bool).scatter_(1, routing.expert_ids, True)
    assert (kept.sum(1) == top_k).all()
    for row in range(tokens):
        left = routing.logits[row][~kept[row]]
        assert not left.numel() or chosen[row].min() >= left.max()
    assert torch.equal(routing.tokens_per_expert, torch.bincount(routing.expert_ids.flatten(), minlength=experts))


@given(experts=st.integers(1, 6), ids=st.lists(st.integers(0, 5), max_size=20), data=st.data())
def test_count_tokens(experts: int, ids: list[int], data: st.DataObject) -> None:
    expert_ids = torch.tensor([i % experts for i in ids], dtype=torch.int64).view(-1, 1).expand(-1, 2)
    valid = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    for mask, kept in ((None, [True] * len(ids)), (torch.tensor(valid, dtype=torch.bool), valid)):
        counts = count_tokens(expert_ids, experts, mask)
        expected = [2 * sum(k for i, k in zip(ids, kept, strict=True) if i % experts == e) for e in range(experts)]
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected


@given(tokens=st.integers(0, 9), experts=st.integers(1, 5), data=st.data())
def test_dispatch_sorts_by_expert_and_combine_undoes_it(tokens: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    order = st.permutations(range(experts)).map(lambda p: p[:top_k])
    ids = torch.tensor(data.draw(st.lists(order, min_size=tokens, max_size=tokens)), dtype=torch.int64)
    ids = ids.view(tokens, top_k)
    scores = torch.rand(tokens, top_k)
    x = torch.randn(tokens, 3)
    dispatcher = LocalDispatcher()
    rows, context = dispatcher.dispatch(
        x, Routing(torch.zeros(tokens, experts), scores, ids, count_tokens(ids, experts))
    )

    expected = [(e, t, k) for t in range(tokens) for k, e in enumerate(ids[t].tolist())]
    expected.sort(key=lambda slot: slot[0])  # stable: by token within an expert
    assert context.rows_per_expert.tolist() == [sum(slot[0] == e for slot in expected) for e in range(experts)]
    assert torch.equal(rows, x[[t for _, t, _ in expected]].view(-1, 3))
    assert context.row_scores.flatten().tolist() == [scores[t, k].item() for _, t, k in expected]
    torch.testing.assert_close(dispatcher.combine(rows * context.row_scores, context), x * scores.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts=0: must be a number >= 1"),
        ({"top_k": 0}, "top_k=0: must be a number >= 1"),
        ({"top_k": 5}, "top_k=5: must be 1 to num_experts=4"),
        ({"normalize_scores": True}, "normalize_scores=True: with top_k=1 every score is 1"),
        ({"score_function": "tanh"}, "score_function='tanh': must be one of sigmoid, softmax"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKRouter(**{"dim": 8, "num_experts": 4, **arguments})  # type: ignore[arg-type]


def test_expert_bias_stays_in_fp32_when_the_model_is_cast() -> None:
    router = TopKRouter(8, 4, expert_bias=True).to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias is not None
    assert router.expert_bias.dtype == torch.float32
    assert "expert_bias" in router.state_dict()
    assert router(torch.randn(3, 8, dtype=torch.bfloat16)).scores.dtype == torch.bfloat16
