import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.losses import load_balance_loss, router_z_loss, update_expert_bias


def draw(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(tokens, experts)
    return logits.requires_grad_(), logits.topk(top_k).indices


def test_by_hand() -> None:
    """Two tokens on expert 0, one on expert 1: E * (2/3 P_0 + 1/3 P_1)."""
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(4.0), 0.0], [0.0, 0.0]])
    expert_ids = torch.tensor([[0], [0], [1]])
    p_0 = (3 / 4 + 4 / 5 + 1 / 2) / 3
    assert load_balance_loss(logits, expert_ids).item() == pytest.approx(2 * (2 / 3 * p_0 + 1 / 3 * (1 - p_0)))


@given(experts=st.integers(1, 8), repeats=st.integers(1, 4), data=st.data())
def test_one_when_balanced(experts: int, repeats: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    slots = torch.arange(experts * repeats * top_k) % experts
    logits = torch.randn(experts * repeats, experts)  # any: balanced counts alone make it 1
    assert load_balance_loss(logits, slots.view(-1, top_k)).item() == pytest.approx(1, abs=1e-5)


def test_num_experts_when_collapsed() -> None:
    logits = torch.zeros(6, 5)
    logits[:, 3] = 100
    assert load_balance_loss(logits, torch.full((6, 1), 3)).item() == pytest.approx(5)


def test_gradient_reaches_the_logits_and_lowers_the_crowded_expert() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    load_balance_loss(logits, torch.zeros(4, 1, dtype=torch.int64)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 1e-2).all() and (logits.grad[:, 1:] < -1e-2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.zeros(4, 4), id="zero initialization"),
        pytest.param(torch.eye(4) * 5, id="perfect balance"),
        pytest.param(torch.eye(4) * 3e4, id="huge"),
        pytest.param(-torch.eye(4) * 3e38, id="largest"),
    ],
)
def test_gradients_are_finite(logits: Tensor, dtype: torch.dtype) -> None:
    logits = logits.to(dtype, copy=True).requires_grad_()
    loss = load_balance_loss(logits, logits.detach().topk(1).indices)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_z_loss_gradient_is_finite_for_huge_logits() -> None:
    logits = (torch.eye(4) * 1e4).requires_grad_()
    loss = router_z_loss(logits)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None and logits.grad.isfinite().all()


@given(valid=st.lists(st.booleans(), min_size=1, max_size=12), top_k=st.integers(1, 3))
def test_padding_counts_in_nothing(valid: list[bool], top_k: int) -> None:
    mask = torch.tensor(valid)
    logits, expert_ids = draw(len(valid), 4, top_k)
    kept = logits.detach()[mask].requires_grad_()
    if not mask.any():
        return
    padded = load_balance_loss(logits, expert_ids, mask) + router_z_loss(logits, mask)
    plain = load_balance_loss(kept, expert_ids[mask]) + router_z_loss(kept)
    torch.testing.assert_close(padded, plain)
    padded.backward()
    plain.backward()
    assert logits.grad is not None and kept.grad is not None
    torch.testing.assert_close(logits.grad[mask], kept.grad)
    assert not logits.grad[~mask].any()


def test_nothing_valid_gives_zero_with_a_graph() -> None:
    logits, expert_ids = draw(5, 4, 2)
    none = torch.zeros(5, dtype=torch.bool)
    loss = load_balance_loss(logits, expert_ids, none) + router_z_loss(logits, none)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None and not logits.grad.any()


def test_load_of_the_global_batch() -> None:
    """f comes from `load`, P from this micro-batch; the load's own scale does not matter."""
    logits, expert_ids = draw(6, 3, 1)
    load = torch.tensor([10, 0, 30])
    mean = logits.softmax(-1).mean(0)
    expected = 3 * (0.25 * mean[0] + 0.75 * mean[2])
    torch.testing.assert_close(load_balance_loss(logits, expert_ids, load=load), expected)
    torch.testing.assert_close(load_balance_loss(logits, expert_ids, load=7 * load), expected)
    own = torch.bincount(expert_ids.flatten(), minlength=3)
    torch.testing.assert_close(load_balance_loss(logits, expert_ids, load=own), load_balance_loss(logits, expert_ids))


def test_load_and_padding_together() -> None:
    logits, expert_ids = draw(6, 3, 1)
    mask = torch.tensor([True, True, False, True, False, False])
    load = torch.tensor([1, 2, 3])
    torch.testing.assert_close(
        load_balance_loss(logits, expert_ids, mask, load),
        load_balance_loss(logits[mask], expert_ids[mask], None, load),
    )


def test_the_mean_of_micro_batches_is_the_loss_of_the_batch_if_the_load_is_global() -> None:
    logits, expert_ids = draw(8, 4, 2)
    load = torch.bincount(expert_ids.flatten(), minlength=4)
    halves = [load_balance_loss(logits[part], expert_ids[part], load=load) for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, load_balance_loss(logits, expert_ids))


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), math.log(5.0)]], requires_grad=True)
    loss = router_z_loss(logits)
    assert loss.item() == pytest.approx((math.log(2) ** 2 + math.log(8) ** 2) / 2)
    loss.backward()
    assert logits.grad is not None  # 2 * logsumexp * softmax / T
    expected = [[math.log(2) / 2, math.log(2) / 2], [math.log(8) * 3 / 8, math.log(8) * 5 / 8]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))


def test_update_expert_bias_by_hand() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    same = bias
    update_expert_bias(bias, torch.tensor([4, 0, 1, 3]), rate=0.125)  # mean 2
    assert bias is same
    assert bias.tolist() == [0.375, 0.125, -0.125, -0.125]


def test_a_balanced_load_does_not_move_the_bias() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25])
    update_expert_bias(bias, torch.tensor([7, 7, 7]), rate=0.1)
    assert bias.tolist() == [0.5, 0.0, -0.25]


@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=6), rate=st.sampled_from([1e-3, 0.1]))
def test_the_bias_moves_towards_balance(counts: list[int], rate: float) -> None:
    bias = torch.zeros(len(counts))
    update_expert_bias(bias, torch.tensor(counts), rate)
    mean = sum(counts) / len(counts)
    for moved, count in zip(bias.tolist(), counts, strict=True):
        if abs(count - mean) > 1:  # nearer, fp32 cannot tell
            assert moved == pytest.approx(math.copysign(rate, mean - count))


def test_what_stands_in_padding_reaches_no_gradient() -> None:
    mask = torch.tensor([True, False, True])
    found = []
    for content in (0.0, math.inf, math.nan):
        logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).masked_fill(~mask[:, None], content)
        logits.requires_grad_()
        loss = load_balance_loss(logits, torch.tensor([[0], [1], [2]]), mask) + router_z_loss(logits, mask)
        found.append((loss, torch.autograd.grad(loss, logits)[0]))
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], atol=0, rtol=0)


def test_an_expert_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"load_balance_loss: expert_ids has 9; must be 0 to 3, or 4 for none"):
        load_balance_loss(torch.randn(5, 4), torch.full((5, 1), 9))
