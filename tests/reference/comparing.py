"""How tests compare a fast implementation with an oracle: outputs and every gradient, by name."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected|, relative to max |expected| (absolute where that is below 1)."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    scale = max(1.0, expected.abs().max().item())
    return (found.double() - expected.double()).abs().max().item() / scale


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    error = relative_error(found, expected)
    assert error <= tolerance, f"{name}: error {error:.2e} > {tolerance:.0e}"  # NaN fails as well


def assert_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    largest = max((g.abs().max().item() for g in expected.values() if g is not None and g.numel()), default=0.0) or 1.0
    wrong = []
    for name, oracle in expected.items():
        gradient = found[name]
        assert oracle is not None, f"the oracle gives {name} no gradient"
        assert gradient is not None, f"{name}: no gradient"
        assert gradient.shape == oracle.shape, f"gradient of {name}: shape {tuple(gradient.shape)}"
        if not oracle.numel():
            continue
        # relative to each tensor, so that a small gradient cannot hide behind a large one; one that is nothing but
        # rounding (the key bias of a layer without positions: softmax does not see it) must be as small in both
        scale = oracle.abs().max().item()
        if scale <= tolerance * largest:
            scale = largest
        error = (gradient.double() - oracle.double()).abs().max().item() / scale
        if not error <= tolerance:
            wrong.append(f"gradient of {name}: relative error {error:.2e} > {tolerance:.0e}")
    assert not wrong, "\n".join(wrong)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


@torch.no_grad()
def redraw(module: nn.Module) -> nn.Module:
    """Weights at a scale at which mistakes show: matrices ~ 1.4 / sqrt(fan_in), gains and biases away from 1 and 0.

    The fan-in is dim 1 of a Linear and of the stacked (E, in, out) experts.
    """
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.5)
        elif parameter.dim() == 1:
            parameter.normal_(std=0.25).add_(1)
        elif "embedding" in name:
            parameter.normal_()
        elif "conv" in name:
            parameter.normal_(std=0.3)
        else:
            parameter.normal_(std=1.4 * parameter.size(1) ** -0.5)
    return module


class OutputSizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation makes, and counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] = self.calls.get(func._schema.name, 0) + 1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.shapes.add(tuple(tensor.shape))
        return result


def run_with_gradients(function: Callable[[], Tensor], module: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output of `function`, and the gradients of `module` for a fixed random upstream gradient."""
    module.zero_grad()
    output = function()
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    output.backward(upstream.to(output.dtype))
    return output.detach(), gradients(module)
