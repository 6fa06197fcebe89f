"""`trainer.precision=fp8`: by which products a run trains, and the decoders that multiply by them.

Embedding, norms, routers, softmax, losses and head stay in the precision around: autocast to bf16 on a GPU, fp32 on a
CPU. Weights, gradients and what the optimizer keeps are fp32.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from moesaic.errors import InputError
from moesaic.layers import Experts, emulating_fp8
from moesaic.layers.fp8 import Fp8Recipe
from moesaic.layers.fp8_emulation import hidden_linears
from moesaic.layers.fp8_kernels import MULTIPLE, cannot_run_fp8
from moesaic.training.config import TrainerConfig

__all__ = ["Fp8Plan", "lightning_precision", "multiplying_in_fp8", "plan_fp8", "torchao_linears"]


class Fp8Plan(NamedTuple):
    """How a run multiplies in FP8, and why so."""

    emulated: bool
    why: str


def plan_fp8(trainer: TrainerConfig) -> Fp8Plan:
    """Whether precision=fp8 is emulated here.

    Raises:
        InputError: on MPS, which has no FP8; a GPU that has it, without torchao.
    """
    if _is_mps(trainer):
        raise InputError("trainer.precision='fp8': torch has no FP8 on MPS; must be 32-true there, or on the CPU fp8")
    rounded = f"{', '.join(trainer.fp8.operands)} rounded to 8 bits by {trainer.fp8.scaling} scales"
    if not _is_gpu(trainer):
        return Fp8Plan(True, f"emulated, as a CPU has no FP8: {rounded}; all else is fp32")
    if trainer.fp8 != Fp8Recipe():
        return Fp8Plan(True, f"emulated, as kernels have the recipe rowwise for all operands only: {rounded}")
    if obstacle := cannot_run_fp8(torch.device("cuda"), torch.bfloat16, MULTIPLE, MULTIPLE):
        return Fp8Plan(True, f"emulated, because {obstacle}: {rounded}")
    if importlib.util.find_spec("torchao") is None:
        raise InputError("trainer.precision='fp8': on a GPU it needs torchao, pip install 'moesaic[fp8]'")
    return Fp8Plan(False, f"linear layers by torchao, experts by scaled_grouped_mm: {rounded}; all else is bf16-mixed")


def lightning_precision(trainer: TrainerConfig) -> str:
    """The precision of all that is not multiplied in FP8, as Lightning names it."""
    if trainer.precision != "fp8":
        return trainer.precision
    return "bf16-mixed" if _is_gpu(trainer) else "32-true"


@contextlib.contextmanager
def multiplying_in_fp8(trainer: TrainerConfig, network: nn.Module) -> Iterator[None]:
    """Let all decoders below `network` multiply in FP8 within the context, if precision=fp8 asks for it.

    Parameters, their names and what checkpoints hold are those of any other run. Outside of the context the same
    weights are used in full precision, as by `moesaic evaluate`.
    """
    if trainer.precision != "fp8":
        yield
    elif plan_fp8(trainer).emulated:
        with emulating_fp8(network, trainer.fp8):
            yield
    else:
        with torchao_linears(network), _fp8_experts(network):
            yield


@contextlib.contextmanager
def torchao_linears(network: nn.Module) -> Iterator[None]:
    """Exchange the hidden linear layers for torchao's, by its recipe "rowwise", within the context.

    Layers with a size that is no multiple of 16 stay as they are, as the kernels want it.
    """
    import torchao.float8 as float8

    linears = {
        name: linear
        for name, linear in hidden_linears(network).items()
        if not (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE)
    }
    recipe: Any = float8.Float8LinearConfig.from_recipe_name("rowwise")
    float8.convert_to_float8_training(network, config=recipe, module_filter_fn=lambda _, name: name in linears)
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.register_parameter(
                "weight", network.get_parameter(f"{name}.weight")
            )  # FSDP2 has given the layer another one
            network.set_submodule(name, linear)


@contextlib.contextmanager
def _fp8_experts(network: nn.Module) -> Iterator[None]:
    """Let the experts whose sizes the kernel takes run on the backend "fp8" within the context."""
    sizes = (torch.device("cuda"), torch.bfloat16)
    stacks = [part for part in network.modules() if isinstance(part, Experts)]
    before = [(part, part.backend) for part in stacks if not cannot_run_fp8(*sizes, part.dim, part.hidden_dim)]
    try:
        for part, _ in before:
            part.backend = "fp8"
        yield
    finally:
        for part, backend in before:
            part.backend = backend


def _is_gpu(trainer: TrainerConfig) -> bool:
    return trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and torch.cuda.is_available())


def _is_mps(trainer: TrainerConfig) -> bool:
    return trainer.accelerator == "mps" or (trainer.accelerator == "auto" and torch.backends.mps.is_available())
