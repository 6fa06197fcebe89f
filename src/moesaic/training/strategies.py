"""How Lightning runs several processes: a strategy of ours where the model is sharded, its own otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from moesaic.errors import InputError
from moesaic.files import standing
from moesaic.models import Decoder
from moesaic.models.custom import custom_modules
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.manifest import map_tensors, read_manifest
from moesaic.parallel.shards import held, load_shards, shard_like, whole
from moesaic.training.meeting import meet

__all__ = ["ShardedStrategy", "is_sharded", "strategy_options"]


def is_sharded(strategy: str, parallel: ParallelConfig, processes: int) -> bool:
    """Whether the processes of a run hold parts of its model, by `ShardedStrategy`."""
    return processes > 1 and strategy == "auto" and parallel.shard


def strategy_options(strategy: str, parallel: ParallelConfig, precision: str, processes: int) -> dict[str, Any]:
    """Keyword arguments of Lightning's Trainer: `strategy`, `precision`, and `plugins` where it needs one.

    Args:
        strategy: a name of Lightning's, or "auto" for what `parallel` says.
    """
    if not is_sharded(strategy, parallel, processes):
        is_ours = processes > 1 and strategy == "auto"
        return {"strategy": CopiesStrategy() if is_ours else strategy, "precision": precision}
    sharded = ShardedStrategy(parallel, processes)
    if precision == "64-true":  # which Lightning allows here as a plugin only
        return {"strategy": sharded, "plugins": [DoublePrecision()]}
    return {"strategy": sharded, "precision": precision}


def _meet(strategy: DDPStrategy | ModelParallelStrategy) -> None:
    strategy.set_world_ranks()
    if strategy.root_device.type == "cpu" and strategy.cluster_environment is not None:
        meet(strategy.cluster_environment)


class CopiesStrategy(DDPStrategy):
    """DDP, where a rank that does not come is told of.

    Custom modules may leave out weights that no row needs, and so does an encoder on a rank without pictures.
    """

    def setup_environment(self) -> None:
        _meet(self)
        super().setup_environment()

    def configure_ddp(self) -> None:
        decoder = getattr(self.lightning_module, "decoder", None)
        if isinstance(decoder, Decoder):
            may_leave_out = decoder.config is None or bool(custom_modules(decoder.config))
            has_encoder = hasattr(self.lightning_module, "vision")
            self._ddp_kwargs["find_unused_parameters"] = may_leave_out or has_encoder
        super().configure_ddp()


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, tensor and expert parallelism, whose gradients are sums over ranks.

    A checkpoint is a directory to which every rank writes the parts that it holds, or one file of whole tensors, as
    that of one process, which rank 0 writes. A run of any number of processes goes on from either.
    """

    def __init__(self, parallel: ParallelConfig, processes: int) -> None:
        # its own mesh is not used: all ranks share every batch
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.parallel = parallel
        self.start = Path()
        """The checkpoint that the run goes on from, if it does."""
        self.rows_group: Any = None
        """Ranks that have other rows of a batch, this one among them, once a decoder is spread."""

    def setup_environment(self) -> None:
        _meet(self)
        super().setup_environment()

    def parallelize(self, decoder: Decoder) -> None:
        """Spread a decoder, the same on all ranks, over them in place."""
        from moesaic.parallel.apply import parallelize  # torch's FSDP2, which no other run needs

        narrow = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        mesh = parallelize(decoder.to(self.root_device), self.parallel, self.root_device, narrow)
        self.rows_group = mesh.get_group()

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
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state if self.parallel.sharded_checkpoints else dict(self.gather(state))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        if self.parallel.sharded_checkpoints:
            return state
        gathered = dict(self.gather(state))
        return gathered if self.is_global_zero else {"state": {}, "param_groups": []}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.parallel.sharded_checkpoints:
            from moesaic.parallel.shard_files import write_directory  # which needs torch's distributed checkpoints

            # ranks that somebody else has started do not know which directory rank 0 has made
            write_directory(Path(self.broadcast(str(filepath))), checkpoint)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self.start = standing(Path(checkpoint_path))
        loaded: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        stored = checkpoint["state_dict"]
        load_shards(self.lightning_module, stored)
        own = self.lightning_module.state_dict()
        self._read({f"state_dict.{name}": own[name] for name, weight in stored.items() if weight.is_meta})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for i, (optimizer, stored) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            self._restore(getattr(optimizer, "_optimizer", optimizer), stored, f"optimizer_states.{i}.state")

    def _restore(self, optimizer: Any, stored: Mapping[str, Any], key: str) -> None:
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        to_read: dict[str, Tensor] = {}

        def laid_out(place: str, value: Tensor) -> Tensor:
            parameter = parameters[int(place.partition(".")[0])]
            if value.is_meta:
                moment = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
                return to_read.setdefault(f"{key}.{place}", moment)
            return shard_like(value, parameter) if value.shape == parameter.shape else value

        state = map_tensors(stored["state"], laid_out)
        self._read(to_read)
        optimizer.load_state_dict({**stored, "state": state})

    def _read(self, tensors: dict[str, Tensor]) -> None:
        """Fill DTensors with what the checkpoint has of them. All ranks must ask, and all refuse what one does.

        Raises:
            InputError: a file cannot be read, or holds numbers that are not finite.
        """
        if not tensors:
            return
        from moesaic.parallel.shard_files import read_parts

        read_parts(self.start, read_manifest(self.start, checked=False), tensors)
        good = all(bool(held(each).isfinite().all()) for each in tensors.values())
        good &= all(bool((held(each) >= 0).all()) for key, each in tensors.items() if key.endswith("exp_avg_sq"))
        if not self.reduce_boolean_decision(good):
            raise InputError(f"checkpoint {self.start}: it holds numbers that are not finite, or negative squares")
