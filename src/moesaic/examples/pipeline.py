"""Pipeline parallelism: the blocks of a decoder on several processes, by `torch.distributed.pipelining`; to copy from.

    torchrun --nproc-per-node=2 -m moesaic.examples.pipeline

Each process holds some of the blocks and the optimizer of their weights. The first has the embedding too, the last the
final norm and the head. Micro-batches follow each other through the stages, forward and backward.

Balance losses are in: each stage adds those of its own layers where their gradients arise. Their fractions are those of
a micro-batch. Not in it: the selection bias of routers, clipping over stages, tied embeddings and checkpoints.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from moesaic.losses import load_balance_loss
from moesaic.models import AttentionConfig, Block, Decoder, DecoderConfig, MoEConfig, build_decoder

__all__ = ["CONFIG", "AddLoss", "Stage", "Step", "batches", "cross_entropy", "main", "train_in_stages"]

CONFIG = DecoderConfig(
    vocab_size=64,
    dim=16,
    hidden_dim=32,
    num_layers=4,
    init_std=0.2,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, attention_chunk_size=8),
    nope_layer_interval=4,
    moe=MoEConfig(num_experts=4, hidden_dim=24),
    interleave_moe_layer_step=2,
)
SEQUENCES, LENGTH, MICRO_BATCHES = 8, 12, 4
LEARNING_RATE, BALANCE_WEIGHT = 1e-2, 0.1


class Step(NamedTuple):
    loss: float
    """Cross-entropy, the mean over micro-batches."""
    balance: float
    """Balance losses, the mean over micro-batches of their sum over layers."""


class AddLoss(torch.autograd.Function):
    """x as it is; `loss` joins whatever loss the gradient of x comes from, with factor 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class Stage(nn.Module):
    """Some blocks of a decoder; weights keep the names that they have in it."""

    def __init__(self, decoder: Decoder, blocks: range) -> None:
        super().__init__()
        if decoder.tie_embeddings:
            raise ValueError("tie_embeddings=True: must be False, because stages share no weight")
        for i, block in enumerate(decoder.layers):
            if getattr(block, "takes_token_ids", False) or getattr(block, "takes_router_state", False):
                raise ValueError(f"layer {i}: its router asks for more than x, which is all that travels here")
        is_first, is_last = blocks.start == 0, blocks.stop == len(decoder.layers)
        self.embedding = decoder.embedding if is_first else None
        self.layers = nn.ModuleDict({str(i): decoder.layers[i] for i in blocks})
        self.norm = decoder.norm if is_last else None
        self.head = decoder.head if is_last else None
        self.balance: list[Tensor] = []
        """What each micro-batch added since this was last emptied."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L) of the first stage, else (B, L, D) -> (B, L, D), or logits (B, L, V) of the last."""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.layers.values():
            assert isinstance(block, Block)
            x, routing = block(x)
            if routing is not None:
                loss = load_balance_loss(routing.logits, routing.expert_ids)
                self.balance.append(loss.detach())
                x = AddLoss.apply(x, BALANCE_WEIGHT * loss)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def train_in_stages(decoder: Decoder, data: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Step], Stage]:
    """Train on the ranks of the default process group, a stage each. Every rank is given the same decoder and data.

    Args:
        data: tokens (B, L) and labels (B, L) of each step.

    Returns:
        The numbers of each step, the same on all ranks, and the stage of this one.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    layers = len(decoder.layers)
    stage = Stage(decoder, range(rank * layers // ranks, (rank + 1) * layers // ranks))
    optimizer = torch.optim.AdamW(stage.parameters(), lr=LEARNING_RATE)
    tokens = data[0][0][: len(data[0][0]) // MICRO_BATCHES]
    # what travels: gradients go back for what requires them
    hidden, logits = (
        torch.empty(*tokens.shape, width, dtype=decoder.dtype, requires_grad=True)
        for width in (decoder.embedding.embedding_dim, decoder.vocab_size)
    )
    part = PipelineStage(
        stage,
        stage_index=rank,
        num_stages=ranks,
        device=decoder.device,
        input_args=tokens if rank == 0 else hidden,
        output_args=logits if rank == ranks - 1 else hidden,
    )
    schedule = Schedule1F1B(part, n_microbatches=MICRO_BATCHES, loss_fn=cross_entropy)  # gradients are means over them
    steps = []
    for tokens, labels in data:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        stage.balance.clear()
        if rank == 0:
            schedule.step(tokens, target=labels)
        else:
            schedule.step(target=labels, losses=losses)
        optimizer.step()
        numbers = torch.tensor([sum(map(Tensor.item, each)) for each in (losses, stage.balance)], dtype=torch.float64)
        distributed.all_reduce(numbers)
        steps.append(Step(*(numbers / MICRO_BATCHES).tolist()))
    return steps, stage


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(CONFIG.vocab_size, (SEQUENCES, LENGTH + 1), generator=draw) for _ in range(steps)]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in drawn]


def main() -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    steps, stage = train_in_stages(build_decoder(CONFIG), batches(5))
    if distributed.get_rank() == 0:
        for i, step in enumerate(steps):
            print(f"step {i}: loss {step.loss:.4f}, balance {step.balance:.4f}")
    print(f"rank {distributed.get_rank()} holds blocks {', '.join(stage.layers)}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
