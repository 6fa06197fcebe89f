"""Contrastive loss against a plain reference, pair by pair."""

import math

import pytest
import torch

from moesaic.losses import contrastive_loss


def plain(pictures: torch.Tensor, texts: torch.Tensor, scale: float, groups: list[int]) -> list[float]:
    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    n, found = len(pictures), []
    for i in range(n):
        others = [j for j in range(n) if j == i or groups[j] != groups[i]]
        right = scale * cosine(pictures[i], texts[i])
        of_picture = math.log(sum(math.exp(scale * cosine(pictures[i], texts[j])) for j in others)) - right
        of_text = math.log(sum(math.exp(scale * cosine(pictures[j], texts[i])) for j in others)) - right
        found.append((of_picture + of_text) / 2)
    return found


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [0] * 5])
def test_equals_a_plain_one(groups: list[int]) -> None:
    pictures, texts = torch.randn(2, 5, 7, dtype=torch.float64)
    found = contrastive_loss(pictures, texts, 3.0, torch.tensor(groups))
    torch.testing.assert_close(found, torch.tensor(plain(pictures, texts, 3.0, groups), dtype=torch.float64))


def test_one_pair_and_pairs_of_one_group_have_nothing_to_tell_apart() -> None:
    assert contrastive_loss(*torch.randn(2, 1, 3), 5.0).tolist() == [0.0]
    torch.testing.assert_close(contrastive_loss(*torch.randn(2, 4, 3), 5.0, torch.zeros(4).long()), torch.zeros(4))


def test_groups_of_their_own_are_no_groups() -> None:
    pictures, texts = torch.randn(2, 6, 3)
    assert torch.equal(contrastive_loss(pictures, texts, 2.0), contrastive_loss(pictures, texts, 2.0, torch.arange(6)))


def test_length_does_not_count_and_gradients_are_finite() -> None:
    pictures, texts = torch.randn(2, 4, 3, requires_grad=True)
    loss = contrastive_loss(pictures, texts, 2.0, torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(loss, contrastive_loss(3 * pictures, 0.5 * texts, 2.0, torch.tensor([0, 0, 1, 2])))
    [gradient] = torch.autograd.grad(loss.sum(), pictures)
    assert bool(gradient.isfinite().all())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="texts"):
        contrastive_loss(torch.randn(3, 2), torch.randn(4, 2), 1.0)
    with pytest.raises(TypeError, match="pictures"):
        contrastive_loss(torch.ones(3, 2, dtype=torch.int64), torch.randn(3, 2), 1.0)
    with pytest.raises(ValueError, match="groups"):
        contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), 1.0, torch.zeros(2).long())
