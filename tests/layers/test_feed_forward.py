from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.layers import ACTIVATIONS, FeedForward

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x * (x > 0),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu2": lambda x: x * x * (x > 0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "linear": lambda x: x,
}


def test_every_activation_has_a_formula_here() -> None:
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", FORMULAS)
def test_by_token(activation: str) -> None:
    ffn = FeedForward(4, 6, activation=activation, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = ffn(x)
    for b in range(2):
        for t in range(3):
            gate, up = ffn.gate_proj.weight @ x[b, t], ffn.up_proj.weight @ x[b, t]
            expected = ffn.down_proj.weight @ (FORMULAS[activation](gate) * up)
            torch.testing.assert_close(y[b, t], expected, rtol=1e-12, atol=1e-12)


def test_silu_is_the_default_and_nothing_has_a_bias() -> None:
    ffn = FeedForward(4, 6)
    assert ffn.activation == "silu"
    assert {name: tuple(p.shape) for name, p in ffn.named_parameters()} == {
        "gate_proj.weight": (6, 4),
        "up_proj.weight": (6, 4),
        "down_proj.weight": (4, 6),
    }


def test_gradcheck() -> None:
    ffn = FeedForward(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(ffn, (torch.randn(2, 3, dtype=torch.float64, requires_grad=True),))


def test_bad_activation() -> None:
    with pytest.raises(ValueError, match="activation='swish': must be one of silu, gelu, relu"):
        FeedForward(4, 6, activation="swish")
