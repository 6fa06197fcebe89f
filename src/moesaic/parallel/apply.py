"""Lay a decoder out over the ranks of a process group: expert parallelism, then FSDP2."""

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor

from moesaic.layers import MoE
from moesaic.layers.all_to_all import AllToAllDispatcher
from moesaic.models import Block, Decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.shards import held

__all__ = ["parallelize"]


def parallelize(decoder: Decoder, config: ParallelConfig, device: torch.device) -> None:
    """Spread a decoder, which is the same on all ranks, over them in place. Every rank of the world must call it.

    Experts are spread over `config.expert` ranks, and their weights are sharded over the ranks that hold the same
    experts. All else is sharded over all ranks. The decoder itself checkpoints blocks, around what happens here.

    Gradients are sums over ranks: a loss is each rank's sum over the count of the global batch. No gradient has a
    factor then, that of an expert neither, which sees rows of all ranks in one backward pass.

    Args:
        device: where the weights are.
    """
    ranks = get_world_size()
    mesh = init_device_mesh(device.type, (ranks // config.expert, config.expert), mesh_dim_names=("efsdp", "ep"))
    everyone = mesh._flatten("dp")
    for block in decoder.layers:
        assert isinstance(block, Block)
        if config.expert > 1 and isinstance(block.ffn, MoE):
            _spread_experts(block.ffn, mesh["ep"])
            _shard(block.ffn.experts, mesh["efsdp"])
        _shard(block, everyone)
    _shard(decoder, everyone)
    register_fsdp_forward_method(decoder, "hidden_states")


def _spread_experts(moe: MoE, mesh: DeviceMesh) -> None:
    """Leave each rank of a mesh its experts, and let rows travel."""
    for name, weight in list(moe.experts.named_parameters(recurse=False)):
        spread = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        moe.experts.register_parameter(name, nn.Parameter(spread, requires_grad=weight.requires_grad))
    moe.dispatcher = AllToAllDispatcher(mesh.get_group())


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda weight: _placement(weight, mesh.size()))
    assert isinstance(module, FSDPModule)
    # sums, not means. Forced, because torch would else multiply within the collective, which gloo cannot
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _placement(weight: nn.Parameter, ranks: int) -> Shard | None:
    """Along which dimension a weight is sharded: the first; where whole experts do not go round, within them."""
    if weight.dim() < 3 or held(weight).size(0) % ranks == 0 or weight.size(1) % ranks:
        return None
    return Shard(1)
