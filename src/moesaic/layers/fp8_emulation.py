"""A whole model with its products in emulated FP8."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moesaic.layers.experts import Experts
from moesaic.layers.fp8 import Fp8Recipe, fp8_emulated, fp8_product
from moesaic.layers.part import parameter_kinds

__all__ = ["Fp8Linear", "emulating_fp8", "hidden_linears"]


class Fp8Linear(nn.Linear):
    """An `nn.Linear` that multiplies by `fp8_product`; parameters and state dict are the same."""

    recipe = Fp8Recipe()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the autocast dtype under autocast."""
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        y = fp8_product(x.reshape(-1, x.size(-1)), weight.t(), self.recipe).view(*x.shape[:-1], weight.size(0))
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextlib.contextmanager
def emulating_fp8(module: nn.Module, recipe: Fp8Recipe = Fp8Recipe()) -> Iterator[None]:  # noqa: B008  (frozen)
    """Round the operands of `hidden_linears` and of all `Experts` below `module` to FP8, until the end of the context.

    Parameters and their names stay as they are, so optimizers and checkpoints may be made before, within or after.
    """
    linears = [(part, part.__class__, part.__dict__.get("recipe")) for part in hidden_linears(module).values()]
    experts = [(part, part.backend) for part in module.modules() if isinstance(part, Experts)]
    try:
        for linear, _, _ in linears:
            linear.__class__ = Fp8Linear
            linear.__dict__["recipe"] = recipe
        for part, _ in experts:
            part.backend = functools.partial(fp8_emulated, recipe=recipe)
        yield
    finally:
        for linear, kind, outer in linears:
            linear.__class__ = kind
            linear.__dict__["recipe"] = outer
            if outer is None:
                del linear.__dict__["recipe"]
        for part, backend in experts:
            part.backend = backend


def hidden_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The `nn.Linear`s from hidden features to hidden features, by name: not heads, and not routers.

    `parameter_kinds` decides. Subclasses of others are left out, as they compute something else.
    """
    kinds = parameter_kinds(module)
    return {
        name: part
        for name, part in module.named_modules()
        if type(part) in (nn.Linear, Fp8Linear) and kinds[f"{name}.weight".lstrip(".")] == "matrix"
    }
