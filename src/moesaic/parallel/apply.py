"""Lay a decoder out over the ranks of a process group: tensor parallelism, expert parallelism, then FSDP2."""

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard, distribute_tensor

from moesaic.layers import Experts, MoE
from moesaic.layers.all_to_all import AllToAllDispatcher
from moesaic.layers.fp8_emulation import hidden_linears
from moesaic.models import Block, Decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.shards import held, require_parts
from moesaic.parallel.tensor import share_matrices

__all__ = ["parallelize", "working_narrow"]


def parallelize(
    decoder: Decoder, config: ParallelConfig, device: torch.device, narrow: torch.dtype | None = None
) -> DeviceMesh:
    """Spread a decoder, which is the same on all ranks, over them in place. Every rank of the world must call it.

    Matrices are shared by `config.tensor` ranks next to each other, which have the same rows of a batch. Experts are
    spread over `config.expert` ranks next to each other, and their weights are sharded over the ranks that hold the
    same experts. All else is sharded over the ranks that have other rows. The decoder itself checkpoints blocks, around
    what happens here.

    Gradients are sums over ranks: a loss is each rank's sum over the count of the global batch. No gradient has a
    factor then, that of an expert neither, which sees rows of all ranks in one backward pass: each token once, as the
    ranks that have the same tokens bring each their share of them.

    Args:
        device: where the weights are.
        narrow: the dtype of autocast, in a mixed run. Weights of `working_narrow` are rounded to it, then gathered.
            Shards and sums of gradients stay in fp32.

    Returns:
        the ranks with other rows than this one, and this one, a mesh of one dimension.

    Raises:
        InputError: a weight has no dimension.
    """
    require_parts(decoder)
    ranks = get_world_size()
    mesh = init_device_mesh(device.type, (ranks // config.expert, config.expert), mesh_dim_names=("efsdp", "ep"))
    if config.tensor > 1:
        # a mesh of its own, so that the two degrees may be any divisors of the world, also of each other
        grid = init_device_mesh(device.type, (ranks // config.tensor, config.tensor), mesh_dim_names=("dp", "tp"))
        for each in (grid, mesh):
            each._flatten("all")  # a norm over both dimensions is then one message
        rows = grid["dp"]
    else:
        rows = mesh._flatten("dp")
    for block in decoder.layers:
        assert isinstance(block, Block)
        if config.expert > 1 and isinstance(block.ffn, MoE):
            _spread_experts(block.ffn, mesh["ep"])
    if config.tensor > 1:
        share_matrices(decoder, grid["tp"])
    apart = max(config.expert, config.tensor)
    for block in decoder.layers:
        assert isinstance(block, Block)
        if isinstance(block.ffn, MoE) and apart > 1:  # experts see rows of other ranks than the rest
            _shard([block.ffn.experts], mesh["efsdp"], narrow)
        if narrow is not None and (narrowed := working_narrow(block, apart)):
            _shard(narrowed, rows, narrow)
        _shard([block], rows)
    _shard([decoder], rows)
    register_fsdp_forward_method(decoder, "hidden_states")
    return rows


def _spread_experts(moe: MoE, mesh: DeviceMesh) -> None:
    """Leave each rank of a mesh its experts, and let rows travel."""
    for name, weight in list(moe.experts.named_parameters(recurse=False)):
        spread = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        moe.experts.register_parameter(name, nn.Parameter(spread, requires_grad=weight.requires_grad))
    moe.dispatcher = AllToAllDispatcher(mesh.get_group())


def working_narrow(block: Block, expert_ranks: int) -> list[nn.Module]:
    """What multiplies in the dtype of autocast alone, and so may get its weights in it: linear layers and experts.

    Norms, routers, convolutions and custom modules get theirs as they are; torchao's layers too, which round to 8 bits
    from fp32. Experts that are spread over ranks are left out, as they are gathered by themselves.
    """
    experts = [part for part in block.modules() if isinstance(part, Experts)] if expert_ranks == 1 else []
    return [*hidden_linears(block).values(), *experts]


def _shard(modules: list[nn.Module], mesh: DeviceMesh, narrow: torch.dtype | None = None) -> None:
    """Shard the weights of modules that are gathered together."""
    # inputs stay what they are: autocast rounds them, as in one process
    dtypes = MixedPrecisionPolicy(narrow, None if narrow is None else torch.float32, cast_forward_inputs=False)
    fully_shard(
        modules if len(modules) > 1 else modules[0],
        mesh=mesh,
        mp_policy=dtypes,
        shard_placement_fn=lambda weight: _placement(weight, mesh.size()),
    )
    for module in modules:
        assert isinstance(module, FSDPModule)
        # sums, not means. Forced, because torch would else multiply within the collective, which gloo cannot
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # a custom module may leave out a weight that no row of this rank needs, and another rank needs it
        module.set_reduce_scatter_unused_params(True)


def _placement(weight: nn.Parameter, ranks: int) -> Shard | None:
    """Along which dimension a weight is sharded: the first; where whole experts do not go round, within them."""
    if weight.dim() < 3 or held(weight).size(0) % ranks == 0 or weight.size(1) % ranks:
        return None
    return Shard(1)
