"""How Lightning runs several processes: a strategy of ours where the model is sharded, its own otherwise."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from moesaic.models import Decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.shards import load_shards, shard_like, whole

__all__ = ["ShardedStrategy", "strategy_options"]


def strategy_options(strategy: str, parallel: ParallelConfig, precision: str, processes: int) -> dict[str, Any]:
    """Keyword arguments of Lightning's Trainer: `strategy`, `precision`, and `plugins` where it needs one.

    Args:
        strategy: a name of Lightning's, or "auto" for what `parallel` says; Lightning makes that DDP.
    """
    if processes == 1 or strategy != "auto" or not parallel.shard:
        return {"strategy": strategy, "precision": precision}
    sharded = ShardedStrategy(parallel, processes)
    if precision == "64-true":  # which Lightning allows here as a plugin only
        return {"strategy": sharded, "plugins": [DoublePrecision()]}
    return {"strategy": sharded, "precision": precision}


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 and expert parallelism, whose gradients are sums over ranks.

    A checkpoint is one file of whole tensors, as that of one process: rank 0 writes it, and a run of any number of
    processes goes on from it.
    """

    def __init__(self, parallel: ParallelConfig, processes: int) -> None:
        # its own mesh is not used: all ranks share every batch
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.parallel = parallel

    def parallelize(self, decoder: Decoder) -> None:
        """Spread a decoder, the same on all ranks, over them in place."""
        from moesaic.parallel.apply import parallelize  # torch's FSDP2, which no other run needs

        narrow = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        parallelize(decoder.to(self.root_device), self.parallel, self.root_device, narrow)

    @staticmethod
    def gather(state: Any) -> Any:
        """Containers with whole tensors, on the CPU of rank 0; on the others with nothing. Every rank must ask."""
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if isinstance(state, Mapping):
            gathered = {key: ShardedStrategy.gather(value) for key, value in state.items()}
            return {key: value for key, value in gathered.items() if is_first or isinstance(value, (dict, list))}
        if isinstance(state, list):
            return [ShardedStrategy.gather(value) for value in state]
        if not isinstance(state, Tensor):
            return state
        complete = whole(state.detach())
        return complete.cpu() if is_first else None

    # ---- what Lightning saves and restores

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        gathered: dict[str, Any] = self.gather(self.lightning_module.state_dict())
        return gathered

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        gathered: dict[str, Any] = self.gather(getattr(optimizer, "_optimizer", optimizer).state_dict())
        return gathered if self.is_global_zero else {"state": {}, "param_groups": []}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_shards(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = getattr(optimizer, "_optimizer", optimizer)
            parameters = [each for group in own.param_groups for each in group["params"]]
            state = {
                i: {
                    name: shard_like(value, parameters[i]) if value.shape == parameters[i].shape else value
                    for name, value in values.items()
                }
                for i, values in stored["state"].items()
            }
            own.load_state_dict({**stored, "state": state})
