"""What batch and tokens do to the settings of an optimizer, where settings are to transfer from a base shape."""

import dataclasses

from moesaic.config import require

__all__ = ["TransferBase", "TransferConfig", "settings_at"]


@dataclasses.dataclass(frozen=True)
class TransferBase:
    """The training at which the settings of the optimizer are what the config says."""

    dim: int = dataclasses.field(default=96, metadata={"most": 2**20})
    num_layers: int = dataclasses.field(default=4, metadata={"most": 2**10})
    batch: int = dataclasses.field(default=2048, metadata={"most": 2**40})  # tokens of an optimizer step
    tokens: int = dataclasses.field(default=2_457_600, metadata={"most": 10**15})  # of the whole training

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "batch", "tokens"):
            require(self, name, getattr(self, name) >= 1, "a number >= 1")


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """Read where model.parametrization=transfer."""

    base: TransferBase = dataclasses.field(default_factory=TransferBase)
    proxy: bool = False  # run at the base: model, batch, tokens and warm-up of this config as they are there


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of AdamW and Muon that depend on batch and tokens."""

    rate: float
    """Factor on learning rates and on weight decay."""
    eps: float
    """Factor on eps."""
    forgetting: float
    """Factor on 1 - beta."""


def settings_at(base: TransferBase, batch: int, tokens: int) -> Settings:
    """Factors for a training on `tokens` tokens, with steps of `batch` tokens.

    With b and t the ratios to the base and k = b / t: learning rate and weight decay sqrt(k), eps 1 / sqrt(b), 1 - beta
    k. Adam's steps then follow the same stochastic differential equation over the share of the training that is done
    (Malladi et al. 2022, arXiv 2205.10287, with the horizon of 2512.22382). Trust it for a few-fold changes only.
    """
    batch_ratio = batch / base.batch
    k = batch_ratio / (tokens / base.tokens)
    return Settings(rate=k**0.5, eps=batch_ratio**-0.5, forgetting=k)
