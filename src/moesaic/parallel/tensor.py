"""Tensor parallelism: ranks that have the same tokens share the matrices of a decoder, by torch's parallel styles."""

import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from moesaic.layers import Attention, FeedForward, MoE
from moesaic.layers.attention import ShortConvolution
from moesaic.layers.shared_tokens import SharedTokensDispatcher
from moesaic.models import Block, Decoder

__all__ = ["share_matrices"]


def share_matrices(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Leave each rank of a mesh its part of the matrices, in place: heads of attention, columns of FFNs, vocabulary.

    Between these parts every rank has whole activations, the same as the others. So what has no matrix to share is
    the same on all of them, and gets the same gradient: norms, routers, latent attention, custom modules. Experts are
    not shared here: each rank brings its share of the tokens to them.
    """
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        plan |= {f"layers.{i}.mixer.{name}": style for name, style in _of_mixer(block.mixer).items()}
        plan |= {f"layers.{i}.ffn.{name}": style for name, style in _of_ffn(block.ffn).items()}
        if isinstance(block.ffn, MoE):
            block.ffn.dispatcher = SharedTokensDispatcher(block.ffn.dispatcher, mesh)
    parallelize_module(decoder, mesh, plan, src_data_rank=None)
    if decoder.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight


def _of_mixer(mixer: nn.Module) -> dict[str, ParallelStyle]:
    if type(mixer) is not Attention:  # a subclass may compute anything
        return {}
    inner: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    if mixer.conv is not None:
        heads = (mixer.num_heads, mixer.num_kv_heads, mixer.num_kv_heads)
        inner["conv"] = _Channels([each * mixer.head_dim for each in heads])
    return {**inner, "o_proj": RowwiseParallel()}


def _of_ffn(ffn: nn.Module) -> dict[str, ParallelStyle]:
    if isinstance(ffn, MoE):
        return {f"shared_expert.{name}": style for name, style in _of_ffn(ffn.shared_expert or nn.Identity()).items()}
    if type(ffn) is not FeedForward:
        return {}
    return {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}


class _Channels(ParallelStyle):
    """Lets a short convolution work on the channels that its rank has. Its few weights stay on every rank.

    Args:
        sections: channels of queries, keys and values, each of which the ranks share evenly.
    """

    def __init__(self, sections: list[int]) -> None:
        super().__init__()
        self.sections = sections

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, ShortConvolution)
        ranks, rank = device_mesh.size(), device_mesh.get_local_rank()
        channels = torch.arange(sum(self.sections)).split(self.sections)
        here = torch.cat([each.chunk(ranks)[rank] for each in channels])
        module.take_channels = functools.partial(_taken, mesh=device_mesh, channels=here)
        return module


def _taken(weight: Tensor, mesh: DeviceMesh, channels: Tensor) -> Tensor:
    """Some columns of a weight that all ranks have; gradients of the others come from the other ranks."""
    alike = DTensor.from_local(weight, mesh, [Replicate()], run_check=False)
    return alike.to_local(grad_placements=[Partial()]).index_select(1, channels.to(weight.device))
