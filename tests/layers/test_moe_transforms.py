"""The mixture under vmap and torch.export: the default works, what cannot work says so."""

import pytest
import torch

from moesaic.layers import BACKENDS, MoE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*performance drop.*"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*"),  # torch.export does
]


def build(backend: str = "auto", dtype: torch.dtype = torch.float32) -> MoE:
    return MoE.build(16, 16, 4, top_k=2, backend=backend, dtype=dtype)


def test_vmap_of_the_default() -> None:
    moe, x = build(), torch.randn(3, 5, 16)
    torch.testing.assert_close(torch.vmap(moe)(x), moe(x), atol=1e-5, rtol=1e-5)


def test_gradients_per_sample() -> None:
    moe, x = build(), torch.randn(3, 5, 16)
    parameters = dict(moe.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(moe, parameters, (x,)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(moe(x[i]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"grouped"}))
def test_vmap_of_other_backends_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"backend='{backend}': under vmap it must be auto or grouped"):
        torch.vmap(build(backend))(torch.randn(3, 5, 16))


def test_vmap_of_a_dtype_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='auto': under vmap .*grouped_mm has no torch.float64 kernel"):
        torch.vmap(build(dtype=torch.float64))(torch.randn(3, 5, 16, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own formulas
@pytest.mark.parametrize("backend", ["auto", "padded"])
def test_forward_mode_gives_way_to_the_loop(backend: str) -> None:
    moe, x = build(backend, torch.float64), torch.randn(5, 16, dtype=torch.float64)
    tangent, step = torch.randn_like(x), 1e-6
    found = torch.func.jvp(moe, (x,), (tangent,))[1]
    expected = (moe(x + step * tangent) - moe(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_second_derivatives() -> None:
    """By torch.func.hessian with any backend; twice backward with the loop."""
    x = torch.randn(1, 16, dtype=torch.float64)
    default, loop = build("auto", torch.float64), build("loop", torch.float64)
    loop.load_state_dict(default.state_dict())
    hessian = torch.func.hessian(lambda x: default(x).square().sum())(x).flatten(0, 1).flatten(1)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(loop(leaf).square().sum(), leaf, create_graph=True)[0].flatten()
    rows = [torch.autograd.grad(each, leaf, retain_graph=True)[0].flatten() for each in gradient]
    torch.testing.assert_close(hessian, torch.stack(rows), atol=1e-9, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("backend", ["auto", "padded", "loop"])
def test_export(backend: str, strict: bool) -> None:
    torch.compiler.reset()
    moe, x = build(backend), torch.randn(5, 16)
    exported = torch.export.export(moe, (x,), strict=strict).module()
    for _ in range(3):
        torch.testing.assert_close(exported(x), moe(x), atol=1e-5, rtol=1e-5)
        x = torch.randn(5, 16)
