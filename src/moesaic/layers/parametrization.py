"""Rules by which weights are drawn and stepped: the standard one, and one under which learning rates transfer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import nn

from moesaic.layers.checks import require_numbers, require_sizes

__all__ = ["Fans", "ParameterKind", "Parametrization", "ScaledLogits", "Scales", "Transfer", "parameter_fans"]

ParameterKind = Literal["matrix", "output", "vector", "embedding"]
"""How a parameter is trained. "matrix": hidden features to hidden features, or a stack of such, decayed and stepped by
Muon where that is on. "output": logits from features (a head, a router), decayed, always stepped by AdamW. "vector" (a
gain, a bias, a short filter) and "embedding": AdamW without decay."""


class Fans(NamedTuple):
    """Sizes of the map that a matrix is, of each one in a stack."""

    fan_in: int
    """Features it reads."""
    fan_out: int
    """Features it gives."""
    active_in: int | None = None
    """Features that it and all maps read whose results are added to its own, for one token; None: it stands alone."""


class Scales(NamedTuple):
    """Factors on the settings of an optimizer for one parameter."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """The rule by which parameters are drawn and stepped, by kind and fans.

    This one is the standard parametrization: one standard deviation, one learning rate.

    Args:
        init_std: of every weight; None means 1 / sqrt(fan_in).
    """

    init_std: float | None = 0.02

    def __post_init__(self) -> None:
        if self.init_std is not None:
            require_numbers(above=True, init_std=self.init_std)

    @property
    def needs_fans(self) -> bool:
        """Whether `scales` looks at the fans of matrices and outputs."""
        return False

    @property
    def residual_scale(self) -> float:
        """The factor on what each mixer and feed-forward layer adds to the residual stream."""
        return 1.0

    def std(self, kind: ParameterKind, fan_in: int) -> float:
        """Standard deviation of a new weight; `fan_in` of an embedding is its width."""
        return self.init_std or fan_in**-0.5

    def std_in_sum(self, fans: Fans) -> float:
        """A factor on `std` for a map whose result is added to those of others."""
        return 1.0

    def scales(self, kind: ParameterKind, fans: Fans | None, *, in_block: bool, by_muon: bool) -> Scales:
        """Factors for a parameter.

        Args:
            fans: of a matrix or an output; None where `needs_fans` is false, and for the other kinds.
            in_block: whether it belongs to a block, and so stands behind `residual_scale`.
            by_muon: whether Muon steps it, by 0.2 sqrt(max(fan_in, fan_out)) times a matrix of norm 1.
        """
        return Scales()


@dataclasses.dataclass(frozen=True)
class ScaledLogits(Parametrization):
    """The standard rule with a multiplier of 1 / sqrt(width / 256) on the logits of head and routers.

    Public configurations of Meta's models after Llama 4 carry this number. Their rates are not public, so all else is
    as in the standard rule. The multiplier is in the weights: with a std and a rate that are as much smaller, decay and
    eps as much larger, AdamW takes the same steps. Only the norm that gradients are clipped by differs.

    Args:
        dim: width of the model.
    """

    dim: int = dataclasses.field(kw_only=True)

    @property
    def multiplier(self) -> float:
        return (self.dim / 256) ** -0.5

    def std(self, kind: ParameterKind, fan_in: int) -> float:
        return super().std(kind, fan_in) * (self.multiplier if kind == "output" else 1.0)

    def scales(self, kind: ParameterKind, fans: Fans | None, *, in_block: bool, by_muon: bool) -> Scales:
        factor = self.multiplier if kind == "output" else 1.0
        return Scales(factor, 1 / factor, 1 / factor)


@dataclasses.dataclass(frozen=True)
class Transfer(Parametrization):
    """The rule under which settings found at a base width and depth hold at others.

    With d and L the width and depth, d0 and L0 those of the base, m = d / d0 and l = L / L0:

    | kind | std | learning rate | weight decay | eps |
    |---|---|---|---|---|
    | embedding | s | 1 | | 1 / m |
    | matrix, by AdamW | s sqrt(d0 / fan_in) | d0 / fan_in | fan_in / d0 | 1 / (m l) |
    | matrix, by Muon | s sqrt(d0 / fan_in) | sqrt(d0 fan_out fan_in / max(fan_in, fan_out)) / fan_in | its inverse | |
    | output of a block (a router) | s d0 / fan_in | d0 / fan_in | fan_in / d0 | 1 / l |
    | output (the head) | s d0 / fan_in | d0 / fan_in | fan_in / d0 | 1 |
    | vector | | 1 | | 1 / (m l) in blocks, else 1 / m |

    What a block adds to the residual stream is multiplied by 1 / l. An output is written here without a multiplier: a
    factor 1 / m on logits, with the std, rate and eps that belong to it, is the same training. For Muon, 0.2
    sqrt(max) of the optimizer times the factor gives sqrt(fan_out / fan_in), whose steps do not depend on the width.

    Down projections of experts are added up, and so is what a step does to them, as the same gradient reaches them all.
    Where nothing stands under a root, their fan_in is therefore the active width: that of all experts which a token
    meets, the shared one included. So a mixture has the rates of the dense FFN of its active FLOPs (Complete-muE, Peng
    et al. 2026, arXiv 2605.23893). This takes scores for numbers of order 1, which normalized ones are not.

    Width: muP (Yang et al. 2021, arXiv 2203.03466), and for mixtures 2508.09752. Depth: CompleteP (Dey et al. 2025,
    arXiv 2505.01618, alpha = 1). Eps by group follows from them.

    Args:
        dim: d.
        num_layers: L.
        base_dim: d0.
        base_num_layers: L0.
    """

    dim: int = dataclasses.field(kw_only=True)
    num_layers: int = dataclasses.field(kw_only=True)
    base_dim: int = dataclasses.field(kw_only=True)
    base_num_layers: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(
            dim=self.dim,
            num_layers=self.num_layers,
            base_dim=self.base_dim,
            base_num_layers=self.base_num_layers,
        )

    @property
    def needs_fans(self) -> bool:
        return True

    @property
    def residual_scale(self) -> float:
        return self.base_num_layers / self.num_layers

    def std(self, kind: ParameterKind, fan_in: int) -> float:
        base_std = self.init_std or self.base_dim**-0.5
        if kind == "matrix":
            return base_std * math.sqrt(self.base_dim / fan_in)
        return base_std * self.base_dim / fan_in if kind == "output" else base_std

    def std_in_sum(self, fans: Fans) -> float:
        return math.sqrt(fans.fan_in / (fans.active_in or fans.fan_in))

    def scales(self, kind: ParameterKind, fans: Fans | None, *, in_block: bool, by_muon: bool) -> Scales:
        width, depth = self.dim / self.base_dim, self.num_layers / self.base_num_layers if in_block else 1.0
        if kind not in ("matrix", "output"):
            return Scales(eps=1 / (width * depth))
        assert fans is not None  # see `needs_fans`
        fan_in, fan_out, active_in = fans
        rate = self.base_dim / (active_in or fan_in)
        if by_muon:
            rate = math.sqrt(self.base_dim * fan_out * fan_in / max(fan_in, fan_out)) / (active_in or fan_in)
        return Scales(rate, 1 / rate, 1 / (width * depth) if kind == "matrix" else 1 / depth)


def parameter_fans(module: nn.Module) -> dict[str, Fans]:
    """Fans of parameters by their dotted name, names of tied parameters included.

    Linear layers have them, and what a part states by `fans()`. What an outer module says counts before an inner one.

    Raises:
        ValueError: a part names a parameter that it does not have.
    """
    found: dict[str, Fans] = {}
    for child_name, child in module.named_children():
        found |= {f"{child_name}.{name}": fans for name, fans in parameter_fans(child).items()}
    if isinstance(module, nn.Linear):
        found["weight"] = Fans(module.in_features, module.out_features)
    stated: Mapping[str, tuple[int, ...]] = getattr(module, "fans", dict)()
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if unknown := set(stated) - names:
        known = ", ".join(sorted(names))
        raise ValueError(f"{type(module).__name__}.fans: {min(unknown)!r}: must be one of its parameters ({known})")
    return found | {name: Fans(*fans) for name, fans in stated.items()}
