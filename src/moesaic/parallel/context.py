"""Context parallelism: each rank has a piece of every sequence, of as many tokens as the others.

Chunk-local layers need nothing of other ranks, because pieces end where chunks do. Full layers gather keys and values,
of which a query sees those before it. A short convolution gets the last tokens of the piece before.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from moesaic.errors import InputError
from moesaic.layers.attention import Attention, AttentionCache, ShortConvolution
from moesaic.models import Block, Decoder

__all__ = ["piece", "side_by_side", "spread_context"]


def spread_context(decoder: Decoder, group: ProcessGroup) -> list[RemovableHandle]:
    """Let a decoder, which is the same on all ranks, take `piece`s of sequences from now on. Every rank must call it.

    Its weights stay whole, so a gradient is the sum of those of the ranks. Its routings are of the rank's own tokens.
    Every rank takes part in every forward and backward, also under activation checkpointing.

    Returns:
        Handles; to remove them all undoes it.

    Raises:
        InputError: a mixer that is not `Attention`, or an FFN that mixes tokens: they may look at any token.
    """
    attentions = [_attention(i, block) for i, block in enumerate(decoder.layers)]
    handles = []
    for i, attention in enumerate(attentions):
        continued = partial(_continue, where=f"layer {i} mixer", group=group)
        handles.append(attention.register_forward_pre_hook(continued, with_kwargs=True))
        if attention.conv is not None and attention.conv.width > 1:
            handles.append(attention.conv.register_forward_pre_hook(partial(_give_tail, group=group)))
    return handles


def piece(decoder: Decoder, tokens: Tensor, group: ProcessGroup) -> Tensor:
    """(B, L) or (B, L, ...) -> (B, L / ranks, ...): this rank's tokens, those of rank 0 first.

    Labels are cut in the same way, after they were shifted.

    Raises:
        InputError: L cannot be cut so, because pieces must be equal and of whole chunks.
    """
    ranks, length = group.size(), tokens.size(1)
    own = length // ranks
    if length % ranks:
        raise InputError(f"sequences of {length} tokens: must be a multiple of the {ranks} ranks that share them")
    for i, block in enumerate(decoder.layers):
        _require_whole_chunks(f"layer {i} mixer", _attention(i, block), own)
    return tokens[:, group.rank() * own : (group.rank() + 1) * own].contiguous()


class _EarlierPieces(AttentionCache):
    """Keys and values of the pieces before this rank's, which stand where a cache would have those of the past."""

    def __init__(self, length: int, chunk: int | None, group: ProcessGroup) -> None:
        super().__init__(chunk)
        self.length = group.rank() * length  # from which positions are counted
        self._group = group

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.chunk is not None:
            return k, v
        visible = self.length + k.size(2)
        # rank 0 too takes part in what it does not need, as it must in backward
        keys_and_values = side_by_side(torch.cat((k, v), dim=-1), 2, self._group)[:, :, :visible]
        keys, values = keys_and_values.split((k.size(3), v.size(3)), dim=-1)
        return keys, values


def _continue(
    attention: Attention, arguments: tuple[Any, ...], named: dict[str, Any], where: str, group: ProcessGroup
) -> tuple[tuple[Tensor, AttentionCache], dict[str, Any]]:
    """Before `Attention.forward`: it continues the pieces of the ranks before this one.

    Raises:
        ValueError: a cache or a mask, which pieces cannot have; a piece that ends within a chunk.
    """
    x, *others = (*arguments, *named.values())
    if any(each is not None for each in others):
        raise ValueError(f"{where}: pieces of sequences have neither a cache nor an attention mask; must be None")
    length = x.size(1)
    _require_whole_chunks(where, attention, length)
    if attention.conv is not None and length < attention.conv.width - 1:
        raise ValueError(
            f"{where}: a piece of {length} tokens; must be {attention.conv.width - 1} or more, for conv_width"
        )
    return (x, _EarlierPieces(length, attention.attention_chunk_size, group)), {}


def _give_tail(
    convolution: ShortConvolution, arguments: tuple[Any, ...], group: ProcessGroup
) -> tuple[Tensor, Tensor, None]:
    """Before `ShortConvolution.forward`: the last tokens of the piece before, of which rank 0 has zeros."""
    x, before = arguments[0], convolution.width - 1
    tails = side_by_side(x[:, x.size(1) - before :], 1, group).split(before, dim=1)
    is_first = torch.tensor(group.rank() == 0, device=x.device)
    return x, tails[group.rank() - 1].masked_fill(is_first, 0), None  # not new zeros: rank 0 takes part in backward


def side_by_side(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """What all ranks have, side by side, rank 0 first. Its gradient is the sum of those of all ranks."""
    name = "all_gather_single_autograd"  # as torch 2.13 calls it
    gather = getattr(collectives, name, None) or collectives.all_gather_tensor_autograd
    gathered: Tensor = collectives.wait_tensor(gather(x.contiguous(), dim, group))
    return gathered


def _attention(i: int, block: Any) -> Attention:
    assert isinstance(block, Block)
    if type(block.mixer) is not Attention:
        raise InputError(
            f"layer {i} mixer: {type(block.mixer).__name__} cannot have pieces of a sequence; must be Attention"
        )
    if not getattr(block.ffn, "causal", True):
        raise InputError(
            f"layer {i} ffn: {type(block.ffn).__name__} mixes tokens and cannot have pieces of a sequence; must see one"
        )
    return block.mixer


def _require_whole_chunks(where: str, attention: Attention, length: int) -> None:
    chunk = attention.attention_chunk_size
    if chunk is not None and length % chunk:
        raise InputError(
            f"{where}: a piece of {length} tokens; must be a multiple of attention_chunk_size={chunk}, because a chunk "
            "is not shared by ranks"
        )
