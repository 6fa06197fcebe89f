"""The losses that make their gradients in the forward pass, under the transforms of torch.func."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from moesaic.losses import (
    DenseTargets,
    HeadTargets,
    codistillation_loss,
    linear_codistillation_loss,
    linear_cross_entropy,
)

T, D, V, B = 6, 8, 50, 3
Loss = Callable[..., Tensor]


def inputs(*batch: int) -> tuple[Tensor, ...]:
    """Hidden states, head, labels, and hidden states and head of a teacher; a batch of all but the heads."""
    torch.manual_seed(0)
    labels = torch.randint(V, (*batch, T))
    labels[..., 2] = -100
    hidden = [torch.randn(*batch, T, D, dtype=torch.float64) for _ in range(2)]
    heads = [torch.randn(V, D, dtype=torch.float64) for _ in range(2)]
    return hidden[0], heads[0], labels, hidden[1], heads[1]


def hard(h: Tensor, w: Tensor, y: Tensor, *_: Tensor) -> Tensor:
    return linear_cross_entropy(h, w, y, chunk_tokens=4)


def hard_of_logits(h: Tensor, w: Tensor, y: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(h @ w.T, y)


def soft(h: Tensor, w: Tensor, y: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    targets = HeadTargets(teacher, head)
    output = linear_codistillation_loss(h, w, y, targets, soft_weight=0.4, train_teacher=True, chunk_tokens=4)
    return output.loss + 2 * output.teacher_loss


def soft_of_logits(h: Tensor, w: Tensor, y: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    logits = teacher @ head.T
    output = codistillation_loss(h @ w.T, y, DenseTargets(logits), soft_weight=0.4)
    return output.loss + 2 * F.cross_entropy(logits, y)


LOSSES = {"hard": (hard, hard_of_logits, (0, 1)), "soft": (soft, soft_of_logits, (0, 1, 3, 4))}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
def test_grad_equals_autograd(name: str) -> None:
    loss, of_logits, places = LOSSES[name]
    arguments = inputs()
    found, value = torch.func.grad_and_value(loss, argnums=places)(*arguments)
    leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in arguments]
    expected_value = of_logits(*leaves)
    expected = torch.autograd.grad(expected_value, [leaves[i] for i in places])
    torch.testing.assert_close(value, expected_value.detach())
    torch.testing.assert_close(found, expected)


@every_loss
def test_vmap_and_gradients_per_sample(name: str) -> None:
    loss, of_logits, places = LOSSES[name]
    arguments, in_dims = inputs(B), (0, None, 0, 0, None)
    values = torch.vmap(loss, in_dims)(*arguments)
    gradients = torch.vmap(torch.func.grad(loss, argnums=places), in_dims)(*arguments)
    for i in range(B):
        one = [each if dim is None else each[i] for each, dim in zip(arguments, in_dims, strict=True)]
        torch.testing.assert_close(values[i], of_logits(*one))
        expected = torch.func.grad(of_logits, argnums=places)(*one)
        torch.testing.assert_close(tuple(each[i] for each in gradients), expected)


@every_loss
def test_autograd_through_vmap(name: str) -> None:
    loss, of_logits, _ = LOSSES[name]
    hidden, *others = inputs(B)
    found, expected = (
        torch.autograd.grad(torch.vmap(each, (0, None, 0, 0, None))(leaf, *others).sum(), leaf)[0]
        for each, leaf in ((loss, hidden.clone().requires_grad_()), (of_logits, hidden.clone().requires_grad_()))
    )
    torch.testing.assert_close(found, expected)


@every_loss
def test_a_second_derivative_is_refused_and_not_zero(name: str) -> None:
    loss = LOSSES[name][0]
    hidden, *others = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda h: torch.func.grad(loss)(h, *others).square().sum())(hidden)
    hidden.requires_grad_()
    for gradient in (
        torch.autograd.grad(loss(hidden, *others), hidden, create_graph=True)[0],
        torch.func.grad(loss)(hidden, *others),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            (gradient.square().sum() + hidden.sum()).backward()
    gradient = torch.autograd.grad(loss(hidden, *others), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), hidden)


def test_num_valid_of_the_whole_batch_makes_parts_add_up() -> None:
    hidden, weight, labels, *_ = inputs()
    whole = torch.func.grad_and_value(linear_cross_entropy)(hidden, weight, labels)
    count = (labels != -100).sum()
    for given in (count, int(count)):
        parts = [
            torch.func.grad_and_value(lambda h, y: linear_cross_entropy(h, weight, y, num_valid=given))(h, y)  # noqa: B023
            for h, y in zip(hidden.split(4), labels.split(4), strict=True)
        ]
        torch.testing.assert_close(torch.cat([gradient for gradient, _ in parts]), whole[0])
        torch.testing.assert_close(sum(value for _, value in parts), whole[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own formulas
@every_loss
def test_forward_mode_and_hessian(name: str) -> None:
    """All logits at once, which have every derivative."""
    loss, of_logits, _ = LOSSES[name]
    hidden, *others = inputs()
    tangent = torch.randn_like(hidden)
    found, expected = (torch.func.jvp(lambda h, f=f: f(h, *others), (hidden,), (tangent,)) for f in (loss, of_logits))
    torch.testing.assert_close(found, expected)
    found, expected = (torch.func.hessian(lambda h, f=f: f(h, *others))(hidden) for f in (loss, of_logits))
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(hidden, tangent), *others)
        assert forward_ad.unpack_dual(dual).tangent is not None


class OfLoss(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, hidden: Tensor, *others: Tensor) -> Tensor:
        return self.loss(hidden, *others)


@pytest.mark.slow_but_for("hard")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*")  # torch.export does
@every_loss
def test_export_serves_another_length(name: str) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=64)
    arguments = inputs()
    by_tokens = {0: tokens}
    shapes = (by_tokens, ({}, by_tokens, by_tokens, {}))
    exported = torch.export.export(OfLoss(LOSSES[name][0]), arguments, dynamic_shapes=shapes).module()
    longer = [torch.cat((each, each)) if each.size(0) == T else each for each in arguments]
    for given in (arguments, longer):
        torch.testing.assert_close(exported(*given), LOSSES[name][1](*given))


@pytest.mark.slow
@every_loss
def test_a_whole_graph_at_a_second_length(name: str) -> None:
    torch.compiler.reset()
    loss, of_logits, places = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = inputs()
    for given in (arguments, [torch.cat((each, each)) if each.size(0) == T else each for each in arguments]):
        gradients = []
        for function in (compiled, of_logits):
            leaves = [each.clone().requires_grad_(each.is_floating_point()) for each in given]
            gradients.append(torch.autograd.grad(function(*leaves), [leaves[i] for i in places]))
        torch.testing.assert_close(*gradients)
