"""Optimizer groups, Muon for matrices beside AdamW for the rest, and learning-rate schedules."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import InputError
from moesaic.layers import ParameterKind, Parametrization, Scales, parameter_fans, parameter_kinds
from moesaic.layers.part import is_ours
from moesaic.parallel.shards import gather_matrices, held, held_slices, is_sharded, layout
from moesaic.training.config import OptimizerConfig, ScheduleConfig

__all__ = [
    "MuonAdamW",
    "apply_settings",
    "build_optimizer",
    "describe_groups",
    "learning_rate_factor",
    "orthogonalizer",
    "parameter_groups",
    "settings_of",
]

Group = dict[str, Any]

GROUPS: dict[ParameterKind, str] = {
    "matrix": "matrices",
    "output": "outputs",
    "vector": "vectors",
    "embedding": "embeddings",
}
"""Kinds of parameters in the order of their groups, which checkpoints rely on."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """Every trainable parameter once, in groups by the kind that its part states, see `moesaic.layers.part`.

    "matrices" and "outputs" are decayed, "vectors" and "embeddings" are not. With Muon the matrices take its steps; the
    outputs (routers, the head) stay with AdamW, because their results are not hidden features (Jordan et al. 2024).
    A kind is split where the model's `parametrization` scales settings apart.

    Raises:
        InputError: the parametrization has no rule for a matrix, because nothing states its fans.
    """
    kinds = parameter_kinds(model)
    parametrization: Parametrization = getattr(model, "parametrization", Parametrization())
    fans = parameter_fans(model) if parametrization.needs_fans else {}
    grouped: dict[tuple[ParameterKind, Scales], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = kinds[name]
        if parametrization.needs_fans and kind in ("matrix", "output") and name not in fans:
            raise InputError(
                f"{name} of shape {list(parameter.shape)} has no fan-in and fan-out, which transfer needs; the part "
                "must state them by a method fans() -> {name: (fan_in, fan_out)}, or hold it in a torch.nn.Linear"
            )
        by_muon = config.name == "muon" and kind == "matrix"
        scales = parametrization.scales(kind, fans.get(name), in_block=name.startswith("layers."), by_muon=by_muon)
        grouped.setdefault((kind, scales), []).append(parameter)
    groups = []
    for kind, name in GROUPS.items():
        for (found, scales), parameters in grouped.items():
            if found == kind:
                groups.append(_group(kind, name, scales, parameters, config))
    return groups


def _group(
    kind: ParameterKind, name: str, scales: Scales, parameters: list[nn.Parameter], config: OptimizerConfig
) -> Group:
    by_muon = config.name == "muon" and kind == "matrix"
    learning_rate = config.muon_learning_rate if by_muon else config.learning_rate
    said = [] if scales.learning_rate == 1 else [f"x{scales.learning_rate:.4g}"]
    if scales.eps != 1 and not by_muon:
        said.append(f"eps x{scales.eps:.4g}")
    group = {
        "name": " ".join((name, *said)),
        "params": parameters,
        "weight_decay": config.weight_decay * scales.weight_decay if kind in ("matrix", "output") else 0.0,
        "muon": by_muon,
        "lr": learning_rate * scales.learning_rate,
    }
    return group if scales.eps == 1 or by_muon else {**group, "eps": config.eps * scales.eps}


def describe_groups(model: nn.Module, config: OptimizerConfig) -> str:
    """One line per group: what steps its parameters, at what rate, and whose they are.

    Where many modules have them, only those of custom modules are named: what they state of themselves shows here.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    custom = tuple(f"{name}." for name, part in model.named_modules() if name and not is_ours(type(part).__module__))
    lines = []
    for group in parameter_groups(model, config):
        owned: dict[str, list[str]] = {}
        for name in (names[id(parameter)] for parameter in group["params"]):
            owned.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0]), []).append(name)
        shown = [
            owner for owner, held in owned.items() if len(owned) <= 6 or any(name.startswith(custom) for name in held)
        ]
        hidden = sum(len(held) for owner, held in owned.items() if owner not in shown)
        listed = ", ".join([*shown, *([f"{hidden} {'other ' if shown else ''}tensors"] if hidden else [])])
        how = f"{'muon' if group['muon'] else 'adamw'} at {group['lr']:g}, decay {group['weight_decay']:g}"
        lines.append(f"{group['name']}: {how}: {listed}")
    return "\n".join(lines)


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, beside: tuple[nn.Module, OptimizerConfig] | None = None
) -> torch.optim.AdamW:
    """One optimizer for a model, and for another `beside` it, which moves as if it had its own of the same betas, eps.

    The groups of the other one come last. No group holds parameters of both: nothing is stepped together.
    """
    groups = parameter_groups(model, config)
    if beside is not None:
        groups += [{**group, "name": f"teacher {group['name']}"} for group in parameter_groups(*beside)]
    return MuonAdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)


def settings_of(optimizer: torch.optim.Optimizer) -> list[Group]:
    """What a config says of each group: rates, betas, eps, decay."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, settings: list[Group]
) -> None:
    """Put a config's settings back after the state of a checkpoint brought its own along. Moments stay.

    Args:
        settings: see `settings_of`, taken when optimizer and scheduler were new.
    """
    scheduler.base_lrs = [group["initial_lr"] for group in settings]
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in rates]
    for group, wanted, rate in zip(optimizer.param_groups, settings, scheduler._last_lr, strict=True):
        group.update(wanted, lr=rate)


class MuonAdamW(torch.optim.AdamW):
    """Fused AdamW whose groups with `muon=True` take Muon steps instead (Jordan et al. 2024).

    One class rather than `torch.optim.Muon` beside AdamW, because `torch.optim.Muon` refuses stacked expert weights
    (E, in, out), which are E matrices, and because one optimizer keeps Lightning's accumulation, clipping and
    checkpoints. On 2-D weights it takes the steps of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` with
    Nesterov momentum 0.95, so learning rates have AdamW's scale.

    Where a run is sharded, parameters are DTensors, and each rank steps the part that it holds. AdamW looks at one
    number at a time, and Muon at one matrix. So whole experts stay where they are, and a matrix that is split over
    ranks is gathered to be orthogonalized.
    """

    momentum = 0.95

    def __init__(self, params: Iterable[Group], **defaults: Any) -> None:
        super().__init__(params, fused=True, **defaults)  # fused: about 6x faster than foreach on CPUs

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("muon"):
                self._muon_step(group)
        super().step()  # Muon's parameters have no gradient any more: AdamW leaves them alone
        return loss

    def _muon_step(self, group: Group) -> None:
        """Matrices of one shape and layout are orthogonalized as one batch: far fewer and larger products."""
        alike: dict[tuple[torch.Size, Any], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike.setdefault((parameter.shape[-2:], layout(parameter)), []).append(parameter)
        for (shape, _), parameters in alike.items():
            self._step_together(shape, parameters, group)

    def _step_together(self, shape: torch.Size, parameters: list[nn.Parameter], group: Group) -> None:
        slices = [held_slices(parameter) for parameter in parameters]
        sizes = [math.prod(each.stop - each.start for each in held_here[:-2]) for held_here in slices]
        # bf16 on GPUs, as in Jordan's; at least fp32 on CPUs, where small bf16 products are not faster
        of_cpu = torch.promote_types(torch.float32, parameters[0].dtype)
        dtype = torch.bfloat16 if parameters[0].is_cuda else of_cpu
        gradients = held(parameters[0]).new_empty(sum(sizes), *shape, dtype=dtype)
        for parameter, gradient in zip(parameters, gradients.split(sizes), strict=True):
            self._with_momentum(parameter, gradient)
        factors = orthogonalizer(gradients)
        decay, size = 1 - group["lr"] * group["weight_decay"], -group["lr"] * 0.2 * math.sqrt(max(shape))
        every = zip(parameters, slices, gradients.split(sizes), factors.split(sizes), strict=True)
        for parameter, (*_, rows, columns), gradient, factor in every:
            left, right = (gradient, factor) if shape[0] > shape[1] else (factor, gradient)
            left, right = left[:, rows], right[:, :, columns]  # the part of the product that is held here
            matrices = held(parameter).view(left.size(0), left.size(1), right.size(2))
            if left.dtype == matrices.dtype:  # in one pass over the weights
                matrices.baddbmm_(left, right, beta=decay, alpha=size)
            else:
                matrices.mul_(decay).add_((left @ right).to(matrices.dtype), alpha=size)
            parameter.grad = None

    def _with_momentum(self, parameter: nn.Parameter, out: Tensor) -> None:
        """Into `out` (N, m, n) the gradient looked at through Nesterov momentum, of whole matrices."""
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state when it loads a checkpoint
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        state["step"] += 1
        gradient, momentum = held(parameter.grad), held(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - self.momentum)
        if gradient.numel() != out.numel() or out.dtype != gradient.dtype:
            ahead = gradient.lerp(momentum, self.momentum)
            out.copy_((gather_matrices(ahead, parameter) if is_sharded(parameter) else ahead).reshape(out.shape))
        else:
            torch.lerp(gradient, momentum, self.momentum, out=out.view_as(gradient))

    def _init_group(self, group: Group, *lists: Any) -> bool:
        """The tensors of a group that AdamW steps, of which it sees what is held here: fused, on any layout."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [held(tensor) for tensor in tensors]
        return bool(has_complex)


def orthogonalizer(gradient: Tensor, steps: int = 5) -> Tensor:
    """What makes each matrix g of (N, m, n) roughly the nearest (semi-)orthogonal one: five Newton-Schulz iterations.

    Coefficients of Keller Jordan's Muon, chosen for the slope at zero: singular values end in about [0.7, 1.2].

    Returns:
        symmetric q, (N, k, k) with k = min(m, n): q @ g is that matrix, and where m > n, g @ q.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    # x_k = q_k x_0 with q_k a polynomial in gram_0 = x_0 x_0^T, so the iteration runs on (k, k) matrices alone: half
    # of the work for the four times wider matrices of an FFN
    gram = gradient.mT @ gradient if gradient.size(1) > gradient.size(2) else gradient @ gradient.mT
    # x_0 = g / |g|, whose square is the trace
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None].clamp(min=1e-14)
    gram = gram / squared_norm
    q = None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        q = polynomial if q is None else polynomial @ q
        if step + 1 < steps:
            gram = polynomial @ gram @ polynomial
    assert q is not None
    return q / squared_norm.sqrt()


def learning_rate_factor(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """The multiplier of the learning rate before optimizer step i (from 0) of `steps`."""
    warmup = min(config.warmup_steps, steps)

    def factor(i: int) -> float:
        if i < warmup:
            return (i + 1) / warmup
        if config.name == "constant":
            return 1.0
        if config.name == "cosine":
            progress = (i - warmup) / max(1, steps - warmup)
            shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        else:  # wsd: stable, then linear to the end over the last decay_fraction of the run
            decay = max(1, round(config.decay_fraction * steps))
            shape = min(1.0, max(0.0, (steps - i) / decay))
        return config.final_factor + (1 - config.final_factor) * shape

    return factor
