"""Experts on two ranks, blocks recomputed whole, or but for what is dear: the same numbers. What compiled code sees."""

import warnings
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference.comparing import OutputSizes, assert_gradients
from torch import Tensor, distributed
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moesaic.layers.experts import held
from moesaic.models import Decoder, build_decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.workers import Workers
from moesaic.training.lightning_options import ignore_advice
from moesaic.training.parallel_check import MODELS

RANKS, SEQUENCES, LENGTH = 2, 4, 12
SENT = "_c10d_functional::all_to_all_single"
KEPT = (torch.ops._c10d_functional.all_to_all_single.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Learned(NamedTuple):
    loss: float
    counts: dict[str, Tensor]
    """Tokens per expert of each layer."""
    gradients: dict[str, Tensor]
    sent: int
    """All-to-alls, forward and backward."""


def keep_what_is_dear(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_the_rest(decoder: Decoder) -> None:
    # FSDP2 notes its own work for the profiler, other work in a recomputation: torch counts these notes as operations
    notes = torch.ops.profiler
    SAC_IGNORED_OPS.update((notes._record_function_enter_new.default, notes._record_function_exit._RecordFunction))
    contexts = partial(create_selective_checkpoint_contexts, keep_what_is_dear)
    for block in decoder.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def on_a_rank(model: str, how: str) -> Learned:
    from moesaic.parallel.apply import parallelize
    from moesaic.parallel.shards import whole

    torch.manual_seed(0)
    decoder = build_decoder(MODELS[model], dtype=torch.float64, checkpoint_activations=how == "full").train()
    parallelize(decoder, ParallelConfig(expert=RANKS), torch.device("cpu"))
    if how == "selective":
        recompute_the_rest(decoder)
    draw = torch.Generator().manual_seed(2)
    tokens, labels = (
        torch.randint(decoder.vocab_size, (SEQUENCES, LENGTH), generator=draw).chunk(RANKS)[distributed.get_rank()]
        for _ in range(2)
    )
    with warnings.catch_warnings(), OutputSizes() as seen:
        ignore_advice()
        hidden, routing = decoder.hidden_states(tokens)
        loss = F.cross_entropy(decoder.head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
    gradients = {name: whole(each.grad).clone() for name, each in decoder.named_parameters() if each.grad is not None}
    counts = {name: each.tokens_per_expert for name, each in routing.items()}
    return Learned(loss.item(), counts, gradients, seen.calls.get(SENT, 0))


_plain: dict[str, list[Learned]] = {}


def plain(workers: Workers, model: str) -> list[Learned]:
    if model not in _plain:
        _plain[model] = workers.run(on_a_rank, RANKS, model, "plain")
    return _plain[model]


@pytest.mark.slow_but_for(
    "Llama 4: top-1 sigmoid, shared expert-full", "Llama 4: top-1 sigmoid, shared expert-selective"
)
@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("model", list(MODELS))
def test_the_numbers_are_those_of_a_plain_pass(workers: Workers, model: str, how: str) -> None:
    moe = MODELS[model].moe
    assert moe is not None
    wanted, found = plain(workers, model), workers.run(on_a_rank, RANKS, model, how)
    for one, other in zip(found, wanted, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-12)
        assert_gradients(one.gradients, other.gradients, 1e-12)
        assert one.counts.keys() == other.counts.keys()
        for name, counts in one.counts.items():
            assert torch.equal(counts, other.counts[name]), name
            assert counts.sum() == SEQUENCES // RANKS * LENGTH * moe.top_k, "no token counts twice"
        if how == "full":
            assert one.sent > other.sent > 0, "rows travel again"
        if how == "selective":
            assert one.sent == other.sent, "what has arrived is kept"


def compiled_part() -> tuple[int, ...]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (RANKS,)), [Shard(0)], src_data_rank=None)
    double = torch.compile(lambda weight: 2 * held(weight), backend="eager")
    assert torch.equal(double(torch.ones(4, 3)), torch.full((4, 3), 2.0)), "a plain tensor is all of it"
    return tuple(double(weight).shape)


@pytest.mark.slow
def test_compiled_code_takes_the_part_of_a_weight_that_is_here(workers: Workers) -> None:
    """The tracer once took the whole, because it finds no method of a tensor that plain tensors do not have."""
    assert workers.run(compiled_part, RANKS) == [(2, 3)] * RANKS
