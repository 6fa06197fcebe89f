"""How many processes share what, and which of it is refused."""

import dataclasses
import math

from moesaic.config import require
from moesaic.errors import InputError
from moesaic.models import DecoderConfig

__all__ = ["ParallelConfig", "require_degrees"]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share its model. All of them share every batch.

    Args:
        expert: ranks among which the experts are spread.
        tensor: ranks that share each matrix.
        shard: whether each rank keeps a part of every weight, gradient and moment (FSDP2), or a copy (DDP).
        sharded_checkpoints: whether each rank that keeps a part writes it, to a directory, or the first rank gathers
            all and writes one file.
    """

    expert: int = dataclasses.field(default=1, metadata={"most": 2**16})
    tensor: int = dataclasses.field(default=1, metadata={"most": 2**16})
    shard: bool = True
    sharded_checkpoints: bool = True

    def __post_init__(self) -> None:
        require(self, "expert", self.expert >= 1, "a number >= 1")
        require(self, "tensor", self.tensor == 1, "1: tensor parallelism is not there yet")
        if self.expert > 1 and not self.shard:
            raise ValueError(f"shard=false: must be true with expert={self.expert}")


def require_degrees(parallel: ParallelConfig, processes: int, batch_size: int, model: DecoderConfig) -> None:
    """Refuse what cannot be shared evenly.

    Args:
        processes: of the run.
        batch_size: sequences of a micro-batch, over all of them.

    Raises:
        InputError: it names the key, and the values that are allowed.
    """
    said = f"{processes} process{'' if processes == 1 else 'es'}"
    if processes % parallel.expert:
        raise InputError(
            f"parallel.expert={parallel.expert}: must divide the {said} of the run "
            f"(trainer.devices * trainer.num_nodes); allowed: {_listed(_divisors(processes))}"
        )
    if batch_size % processes:
        below = batch_size - batch_size % processes
        near = [each for each in (below, below + processes) if each]
        raise InputError(
            f"training.batch_size={batch_size}: counts the sequences of all {said}, and must be a multiple of "
            f"{processes}, such as {' or '.join(map(str, near))}; as it is, {_listed(_divisors(batch_size))} "
            "processes are allowed"
        )
    if parallel.expert > 1:
        _require_experts(parallel, processes, model)


def _require_experts(parallel: ParallelConfig, processes: int, model: DecoderConfig) -> None:
    moe = model.moe
    if moe is None or not any(layer.ffn == "moe" for layer in model.layers):
        raise InputError(f"parallel.expert={parallel.expert}: must be 1 for a model without MoE layers")
    for name in ("experts", "dispatcher"):
        if isinstance(custom := getattr(moe, name), dict):
            raise InputError(
                f"parallel.expert={parallel.expert}: must be 1 with model.moe.{name}={custom.get('type')}; only "
                "those of moesaic.layers can be spread over ranks"
            )
    if moe.num_experts % parallel.expert:
        allowed = _divisors(math.gcd(moe.num_experts, processes))
        raise InputError(
            f"parallel.expert={parallel.expert}: must divide model.moe.num_experts={moe.num_experts}; allowed with "
            f"{processes} processes: {_listed(allowed)}"
        )
    owners = processes // parallel.expert
    if (moe.num_experts // parallel.expert) % owners and (model.dim % owners or moe.hidden_dim % owners):
        raise InputError(
            f"parallel.expert={parallel.expert}: {owners} ranks would share each "
            f"{moe.num_experts // parallel.expert} experts; that number must be a multiple of {owners}, or model.dim "
            "and model.moe.hidden_dim must"
        )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
