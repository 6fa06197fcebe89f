"""Experts on two ranks, blocks recomputed (all of them, or but for what is dear) or compiled: the same numbers."""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from reference.comparing import OutputSizes, assert_gradients
from torch import Tensor, distributed
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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


def compile_blocks(decoder: Decoder) -> None:
    for block in decoder.layers:
        block.compile(backend="aot_eager")  # as `trainer.compile` does, without C++


BEFORE: dict[str, Callable[[Decoder], None]] = {"compiled": compile_blocks}
AFTER: dict[str, Callable[[Decoder], None]] = {"selective": recompute_the_rest}


def on_a_rank(model: str, how: str) -> Learned:
    from moesaic.parallel.apply import parallelize
    from moesaic.parallel.shards import whole

    torch.manual_seed(0)
    decoder = build_decoder(MODELS[model], dtype=torch.float64, checkpoint_activations=how == "full").train()
    BEFORE.get(how, lambda decoder: None)(decoder)
    parallelize(decoder, ParallelConfig(expert=RANKS), torch.device("cpu"))
    AFTER.get(how, lambda decoder: None)(decoder)
    draw = torch.Generator().manual_seed(2)
    tokens, labels = (
        torch.randint(decoder.vocab_size, (SEQUENCES, LENGTH), generator=draw).chunk(RANKS)[distributed.get_rank()]
        for _ in range(2)
    )
    seen = OutputSizes() if how != "compiled" else None  # which would see what is compiled, and stop it
    with warnings.catch_warnings(), seen or contextlib.nullcontext():
        ignore_advice()
        warnings.filterwarnings("ignore", ".*is not a leaf Tensor is being accessed.*")  # by the tracer itself
        hidden, routing = decoder.hidden_states(tokens)
        loss = F.cross_entropy(decoder.head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
        loss.backward()
    gradients = {name: whole(each.grad).clone() for name, each in decoder.named_parameters() if each.grad is not None}
    counts = {name: each.tokens_per_expert for name, each in routing.items()}
    return Learned(loss.item(), counts, gradients, 0 if seen is None else seen.calls.get(SENT, 0))


_plain: dict[str, list[Learned]] = {}


def plain(workers: Workers, model: str) -> list[Learned]:
    if model not in _plain:
        _plain[model] = workers.run(on_a_rank, RANKS, model, "plain")
    return _plain[model]


@pytest.mark.slow_but_for(
    "Llama 4: top-1 sigmoid, shared expert-full", "Llama 4: top-1 sigmoid, shared expert-selective"
)
@pytest.mark.parametrize("how", ["full", "selective", "compiled"])
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
