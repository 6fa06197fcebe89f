"""How many processes share what, and which of it is refused."""

import dataclasses
import math

from moesaic.config import require
from moesaic.errors import InputError
from moesaic.models import DecoderConfig

__all__ = ["ParallelConfig", "require_degrees", "require_precision", "require_vocabulary"]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a run share its model. All of them share every batch.

    Args:
        expert: ranks among which the experts are spread.
        tensor: ranks that share each matrix, and have the same rows of a batch.
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
        require(self, "tensor", self.tensor >= 1, "a number >= 1")
        for name in ("expert", "tensor"):
            if getattr(self, name) > 1 and not self.shard:
                raise ValueError(f"shard=false: must be true with {name}={getattr(self, name)}")


def require_degrees(
    parallel: ParallelConfig, processes: int, batch_size: int, model: DecoderConfig, key: str = "model"
) -> None:
    """Refuse what cannot be shared evenly.

    Args:
        processes: of the run.
        batch_size: sequences of a micro-batch, over all of them.
        key: that of the model, for messages.

    Raises:
        InputError: it names the key, and the values that are allowed.
    """
    said = f"{processes} process{'' if processes == 1 else 'es'}"
    for name in ("expert", "tensor"):
        if processes % (degree := getattr(parallel, name)):
            raise InputError(
                f"parallel.{name}={degree}: must divide the {said} of the run "
                f"(trainer.devices * trainer.num_nodes); allowed: {_listed(_divisors(processes))}"
            )
    owners = processes // parallel.tensor
    if batch_size % owners:
        below = batch_size - batch_size % owners
        near = [each for each in (below, below + owners) if each]
        same = f", of which {parallel.tensor} each have the same ones" if parallel.tensor > 1 else ""
        raise InputError(
            f"training.batch_size={batch_size}: counts the sequences of all {said}{same}, and must be a multiple of "
            f"{owners}, such as {' or '.join(map(str, near))}; as it is, "
            f"{_listed([each * parallel.tensor for each in _divisors(batch_size)])} processes are allowed"
        )
    if parallel.expert > 1:
        _require_experts(parallel, processes, model, key)
    if parallel.tensor > 1:
        _require_matrices(parallel, processes, model, key)


def require_precision(parallel: ParallelConfig, precision: str) -> None:
    """Refuse products of 8 bits on shared matrices.

    Raises:
        InputError: it names both keys.
    """
    if parallel.tensor > 1 and precision == "fp8":
        raise InputError(
            f"trainer.precision='fp8': must be another with parallel.tensor={parallel.tensor}, as the numbers that "
            "share a scale would be on several ranks"
        )


def require_vocabulary(parallel: ParallelConfig, processes: int, model: DecoderConfig) -> None:
    """Refuse a vocabulary that the ranks of tensor parallelism cannot share evenly. Data may decide its size.

    Raises:
        InputError: it names the key, and the values that are allowed.
    """
    larger = math.ceil(model.vocab_size / parallel.tensor) * parallel.tensor
    _require_share(parallel, processes, {"model.vocab_size": model.vocab_size}, f"; or model.vocab_size={larger}")


def _require_matrices(parallel: ParallelConfig, processes: int, model: DecoderConfig, key: str) -> None:
    """Refuse heads and widths that cannot be shared evenly; custom modules are not shared."""
    if isinstance(model.attention.qk_norm, str):  # a rank would see the gradient of its own heads only
        raise InputError(
            f"parallel.tensor={parallel.tensor}: must be 1 with {key}.attention.qk_norm={model.attention.qk_norm}, "
            "whose gains the heads share"
        )
    if model.attention.sinks:
        raise InputError(
            f"parallel.tensor={parallel.tensor}: must be 1 with {key}.attention.sinks=True, which are whole on a rank"
        )
    if any(layer.mixer == "windowed_rope" for layer in model.layers):
        raise InputError(f"parallel.tensor={parallel.tensor}: must be 1 with windowed_rope layers in {key}.pattern")
    sizes: dict[str, int] = {}
    if model.attention.mla is None and any(isinstance(layer.mixer, str) for layer in model.layers):
        sizes[f"{key}.attention.num_heads"] = model.attention.num_heads
        sizes[f"{key}.attention.num_kv_heads"] = model.num_kv_heads
    ffns = {layer.ffn for layer in model.layers if isinstance(layer.ffn, str)}
    if "dense" in ffns:
        sizes[f"{key}.hidden_dim"] = model.hidden_dim
    if model.moe is not None and "dense_twin" in ffns:
        sizes["the width of the dense twin"] = model.moe.active_hidden_dim
    if model.moe is not None and "moe" in ffns and model.moe.shared_width:
        name = "hidden_dim" if model.moe.shared_hidden_dim is None else "shared_hidden_dim"
        sizes[f"{key}.moe.{name}"] = model.moe.shared_width
    _require_share(parallel, processes, sizes)


def _require_share(parallel: ParallelConfig, processes: int, sizes: dict[str, int], instead: str = "") -> None:
    for name, size in sizes.items():
        if size % parallel.tensor:
            allowed = _divisors(math.gcd(processes, *sizes.values()))
            raise InputError(
                f"parallel.tensor={parallel.tensor}: must divide {name}={size}; allowed with {processes} processes: "
                f"{_listed(allowed)}{instead}"
            )


def _require_experts(parallel: ParallelConfig, processes: int, model: DecoderConfig, key: str) -> None:
    moe = model.moe
    if moe is None or not any(layer.ffn == "moe" for layer in model.layers):
        raise InputError(f"parallel.expert={parallel.expert}: must be 1 for a model without MoE layers")
    for name in ("experts", "dispatcher"):
        if isinstance(custom := getattr(moe, name), dict):
            raise InputError(
                f"parallel.expert={parallel.expert}: must be 1 with {key}.moe.{name}={custom.get('type')}; only "
                "those of moesaic.layers can be spread over ranks"
            )
    if moe.experts == "normed_swiglu":
        raise InputError(f"parallel.expert={parallel.expert}: must be 1 with {key}.moe.experts={moe.experts}")
    for name in ("identity_experts", "skip_experts", "latent_dim"):
        if value := getattr(moe, name):
            raise InputError(f"parallel.expert={parallel.expert}: must be 1 with {key}.moe.{name}={value}")
    if moe.num_experts % parallel.expert:
        allowed = _divisors(math.gcd(moe.num_experts, processes))
        raise InputError(
            f"parallel.expert={parallel.expert}: must divide {key}.moe.num_experts={moe.num_experts}; allowed with "
            f"{processes} processes: {_listed(allowed)}"
        )
    owners = processes // parallel.expert
    if (moe.num_experts // parallel.expert) % owners and (model.dim % owners or moe.hidden_dim % owners):
        raise InputError(
            f"parallel.expert={parallel.expert}: {owners} ranks would share each "
            f"{moe.num_experts // parallel.expert} experts; that number must be a multiple of {owners}, or {key}.dim "
            f"and {key}.moe.hidden_dim must"
        )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
