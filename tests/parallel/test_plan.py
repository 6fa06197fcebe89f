"""A plan is what a run does: its shards add up, its messages are those that ranks send, its bytes those of a step."""

import dataclasses
import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.errors import InputError
from moesaic.layers.work import Work
from moesaic.losses import linear_cross_entropy
from moesaic.models import build_decoder, llama4_behemoth_guess, llama4_maverick, llama4_scout, llama4_toy
from moesaic.models.memory import LiveBytes
from moesaic.models.shapes import num_parameters
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fitting import changes_that_fit
from moesaic.parallel.plan import Collective, Part, Setup, lay_out, plan
from moesaic.parallel.shards import held
from moesaic.parallel.workers import Workers
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizers import build_optimizer, orthogonalizer

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import peak_memory

GIB = 2**30


def setup_of(model: Any, ranks: int, expert: int = 1, tensor: int = 1, **changes: Any) -> Setup:
    given: dict[str, Any] = {"per_node": 8, "batch_size": ranks, "seq_len": 8192, "precision": "32-true"}
    given |= {"optimizer": "adamw", "checkpoint_activations": False, "parallel": ParallelConfig(expert, tensor)}
    return Setup(model=model, ranks=ranks, **{**given, **changes})


def here(setup: Setup) -> int:
    return sum(part.count * part.here for part in lay_out(setup))


# ---- against numbers from elsewhere


def test_maverick_on_256() -> None:
    """Numbers of an expert-parallel prototype of ours, which laid the whole model out."""
    found = plan(setup_of(llama4_maverick(), 256, 64))
    assert here(found.setup) == 1_565_349_780
    assert num_parameters(llama4_maverick()) == pytest.approx(400.71e9, rel=1e-5)
    assert num_parameters(llama4_maverick()) / here(found.setup) == pytest.approx(256, rel=1e-3)
    assert found.memory.state / GIB == pytest.approx(23.3, abs=0.05)
    assert plan(setup_of(llama4_maverick(), 512, 128)).memory.state / GIB == pytest.approx(11.7, abs=0.05)


def test_messages_of_maverick_by_hand() -> None:
    setup = setup_of(llama4_maverick(), 256, 64, precision="bf16-true")
    sent = {(each.operation, each.what, each.part.name, each.ranks): each for each in plan(setup).collectives}
    dim, wide, attention = 5120, 16384, 2 * 5120 * 5120 + 2 * 1024 * 5120
    dense = attention + 2 * dim + 3 * dim * wide
    gathered = sent["all-gather", "weights", "dense 16384", 256]
    assert (gathered.part.count, gathered.times, gathered.message) == (24, 2, 2 * dense)
    experts = sent["reduce-scatter", "gradients", "MoE", 4]
    assert (experts.nodes, experts.message) == (4, 2 * 2 * 3 * dim * 8192)
    assert experts.received == experts.network == 24 * experts.message * 3 / 4
    rows = sent["all-to-all", "rows to experts", "MoE", 64]
    assert (rows.times, rows.message, rows.nodes) == (2, 8192 * dim * 2, 8)
    assert rows.network == 24 * 2 * 8192 * dim * 2 * 56 / 64
    assert rows.nvlink == 24 * 2 * 8192 * dim * 2 * 7 / 64


@pytest.mark.parametrize(
    ("operation", "received", "network"),
    [("all-gather", 75, 25), ("reduce-scatter", 75, 25), ("all-reduce", 150, 50), ("all-to-all", 75, 50)],
)
def test_links(operation: Any, received: float, network: float) -> None:
    """With 4 ranks on 2 nodes, 50 of 100 gathered bytes enter each node, by the cards of its two ranks."""
    three = Part("", 3, (), 1, 1)
    found = Collective(operation, "it", three, times=1, message=100, ranks=4, nodes=2)
    assert (found.received, found.network, found.nvlink) == (3 * received, 3 * network, 3 * (received - network))


# ---- against ranks that really train

TOY = llama4_toy(num_layers=4)
SEVERAL = dataclasses.replace(
    TOY, moe=dataclasses.replace(TOY.moe, num_experts=2, top_k=2), interleave_moe_layer_step=1, tie_embeddings=True
)
LENGTH = 16


class Sent(TorchDispatchMode):
    """Bytes of whole messages by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        if name == "_allgather_base_":
            self.bytes["all-gather"] += tensors[0].nbytes
        elif name == "_reduce_scatter_base_":
            self.bytes["reduce-scatter"] += tensors[1].nbytes
        elif name == "all_gather_into_tensor":
            self.bytes["all-gather"] += result.nbytes
        elif name == "all_to_all_single":
            self.bytes["all-to-all"] += tensors[0].nbytes
        elif name in ("all_reduce", "allreduce_"):
            self.bytes["all-reduce"] += tensors[0].nbytes
        elif name == "reduce_scatter_tensor":
            self.bytes["reduce-scatter"] += tensors[0].nbytes
        elif "c10d" in func._schema.name and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise AssertionError(f"{func._schema.name}: nobody counts it")
        return result


def train(setup: Setup) -> dict[str, Any]:
    """One step on a rank: what it keeps, what it sent, and its peak of memory."""
    from moesaic.parallel.apply import parallelize

    torch.manual_seed(0)
    dtype = torch.bfloat16 if setup.precision == "bf16-true" else torch.float32
    decoder = build_decoder(setup.model, checkpoint_activations=setup.checkpoint_activations, dtype=dtype)
    if setup.ranks > 1:
        narrow = torch.bfloat16 if setup.precision == "bf16-mixed" else None
        parallelize(decoder, setup.parallel, torch.device("cpu"), narrow)
    optimizer = build_optimizer(decoder, OptimizerConfig(name=setup.optimizer))
    tokens = torch.randint(setup.model.vocab_size, (setup.batch_size // setup.owners, setup.seq_len + 1))

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16-mixed"):
            hidden, _ = decoder.hidden_states(tokens[:, :-1])
            loss = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens[:, 1:].flatten())
        loss.backward()

    warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # of experts, which nobody changes in place
    with Sent() as sent:
        passes()
        optimizer.step()
    state = sum(held(each).nbytes for state in optimizer.state.values() for each in state.values() if each.dim())
    optimizer.zero_grad()
    return {
        "here": sum(held(weight).numel() for weight in decoder.parameters()),
        "sent": sent.bytes,
        "state": state,
        "peak": peak_memory(passes, torch.device("cpu")),
    }


CASES = {
    "sharded": setup_of(TOY, 4),
    "experts": setup_of(TOY, 2, 2),
    "experts, each sharded": setup_of(TOY, 4, 2, optimizer="muon", checkpoint_activations=True),
    "within experts": setup_of(SEVERAL, 4, 1, optimizer="muon", precision="bf16-true"),
    "mixed": setup_of(SEVERAL, 4, 2, precision="bf16-mixed"),
    "mixed, checkpointed": setup_of(TOY, 2, 2, precision="bf16-mixed", checkpoint_activations=True),
    "matrices": setup_of(SEVERAL, 2, 1, 2),
    "matrices, each sharded": setup_of(TOY, 4, 2, 2, optimizer="muon", checkpoint_activations=True),
    "matrices, mixed": setup_of(
        dataclasses.replace(TOY, moe=dataclasses.replace(TOY.moe, shared_hidden_dim=0, top_k=2)),
        *(2, 1, 2),
        precision="bf16-mixed",
        checkpoint_activations=True,
    ),
    "one": setup_of(TOY, 1),
}


QUICK = ("matrices, each sharded",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_run_does_what_was_planned(workers: Workers, case: str) -> None:
    setup = dataclasses.replace(CASES[case], seq_len=LENGTH, batch_size=2 * CASES[case].ranks)
    ranks = workers.run(train, setup.ranks, setup)
    found = plan(setup)
    assert ranks[0]["here"] == here(setup)
    weights = [(part.count, weight) for part in found.parts for weight in part.weights]
    alike = sum(count * math.prod(each.shape) for count, each in weights if each.shared == 1 and len(each.shape) < 3)
    several = (setup.parallel.tensor - 1) * alike  # which those that share matrices have too
    assert sum(rank["here"] for rank in ranks) == num_parameters(setup.model) + several
    assert ranks[0]["state"] == found.memory.optimizer
    planned: Counter[str] = Counter()
    for each in found.collectives:
        planned[each.operation] += each.part.count * each.times * each.message
    if setup.parallel.expert > 1:  # rows come and go unevenly, but all ranks together send every row
        planned["all-to-all"] *= setup.ranks
        ranks[0]["sent"]["all-to-all"] = sum(rank["sent"]["all-to-all"] for rank in ranks)
    assert ranks[0]["sent"] == planned


@pytest.mark.slow_but_for("mixed, checkpointed")
@pytest.mark.parametrize("case", ["sharded", "experts, each sharded", "mixed", "mixed, checkpointed", "matrices"])
def test_a_step_needs_what_was_planned(workers: Workers, case: str) -> None:
    setup = dataclasses.replace(CASES[case], seq_len=128, batch_size=4 * CASES[case].ranks)
    peak = workers.run(train, setup.ranks, setup)[0]["peak"]
    memory = plan(setup).memory
    passes = memory.gradients + memory.gathered + memory.unsummed + memory.casts + memory.activations + memory.working
    assert peak < passes < 1.5 * peak


def cast(setup: Setup) -> int:
    """Bytes that the end of autocast lets go after a forward pass."""
    from moesaic.parallel.apply import parallelize

    warnings.filterwarnings("ignore", ".*returned a view tensor.*")
    decoder = build_decoder(setup.model, checkpoint_activations=setup.checkpoint_activations)
    if setup.parallel.shard:
        parallelize(decoder, setup.parallel, torch.device("cpu"), torch.bfloat16)
    tokens = torch.zeros(1, setup.seq_len, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        decoder.hidden_states(tokens)
    with LiveBytes([tokens]) as live:
        with torch.autocast("cpu", torch.bfloat16):
            kept = decoder.hidden_states(tokens)
            within = live.current
        let_go = within - live.current
        del kept
    return let_go


@pytest.mark.slow_but_for("False")
@pytest.mark.parametrize("shard", [True, False])
def test_autocast_keeps_a_copy_of_every_dense_matrix_that_is_not_sharded(workers: Workers, shard: bool) -> None:
    setup = dataclasses.replace(
        CASES["mixed, checkpointed"], seq_len=LENGTH, parallel=ParallelConfig(expert=2 if shard else 1, shard=shard)
    )
    found = workers.run(cast, setup.ranks, setup)
    assert found == [plan(setup).memory.casts] * setup.ranks
    assert (found[0] == 0) == shard


# ---- of any size

PRESETS = {"scout": llama4_scout, "maverick": llama4_maverick, "behemoth": llama4_behemoth_guess}


@pytest.mark.slow
@pytest.mark.slow_but_for("maverick-16-", "scout-256-", "behemoth-4096-")
@pytest.mark.parametrize(
    ("preset", "ranks", "expert"),
    [
        *[(preset, ranks, expert) for preset in PRESETS for ranks, expert in ((16, 16), (256, 16), (4096, 8))],
        ("scout", 16_384, 16),  # beyond that its experts cannot be split evenly
        ("maverick", 32_768, 128),
        ("behemoth", 32_768, 16),
    ],
)
def test_presets(preset: str, ranks: int, expert: int) -> None:
    setup = setup_of(PRESETS[preset](), ranks, expert, precision="bf16-mixed", checkpoint_activations=True)
    found = plan(setup)
    kept = here(setup)
    assert num_parameters(setup.model) / ranks <= kept < 1.3 * num_parameters(setup.model) / ranks
    assert found.memory.weights == 4 * kept and found.memory.optimizer == 8 * kept
    assert 0 <= found.padding < 0.8
    by_hand = setup.tokens * (found.account.training_flops + found.account.forward_flops)
    assert found.flops == by_hand
    assert found.network > 0 and found.nvlink > 0


def test_one_rank_sends_nothing() -> None:
    found = plan(setup_of(TOY, 1))
    assert found.collectives == [] and found.memory.gathered == found.memory.unsummed == 0
    assert found.memory.weights == 4 * num_parameters(TOY)


def test_copies_sum_all_gradients() -> None:
    found = plan(setup_of(TOY, 16, parallel=ParallelConfig(shard=False)))
    assert (
        found.memory.weights
        == 4 * num_parameters(TOY)
        == sum(each.part.count * each.message for each in found.collectives)
    )
    assert {(each.operation, each.ranks, each.nodes) for each in found.collectives} == {("all-reduce", 16, 2)}


def test_a_custom_module_is_laid_out_and_named() -> None:
    assert TOY.moe is not None
    router = {"type": "moesaic.examples.custom_modules.CosineRouter"}
    model = dataclasses.replace(TOY, moe=dataclasses.replace(TOY.moe, router=router))
    found = plan(setup_of(model, 4, 2))
    assert found.uncounted == (router["type"],)


def test_the_count_of_muon_is_that_of_its_products() -> None:
    found = plan(setup_of(TOY, 1, optimizer="muon"))
    flops = 0.0
    for part in found.parts:
        for weight in part.weights:
            if weight.kind == "matrix":
                gradient = torch.randn(math.prod(weight.shape[:-2]), *weight.shape[-2:])
                with Work() as work:
                    factor = orthogonalizer(gradient)
                    _ = gradient @ factor if gradient.size(1) > gradient.size(2) else factor @ gradient
                flops += part.count * work.flops
    assert found.optimizer_flops == flops


# ---- what would fit

WIDE = dataclasses.replace(TOY, dim=512, hidden_dim=2048)
ROOMY = dataclasses.replace(TOY, moe=dataclasses.replace(TOY.moe, num_experts=8))


@pytest.mark.slow_but_for("0.3")
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3, 0.15])
def test_changes_fit_and_are_the_smallest(share: float) -> None:
    setup = setup_of(ROOMY, 8, batch_size=64, seq_len=64)
    room = share * plan(setup).memory.total
    changes = changes_that_fit(setup, room)
    assert changes
    for keys, found in changes:
        assert found.memory.total <= room
        if batch := keys.get("training.batch_size"):
            more = dataclasses.replace(found.setup, batch_size=int(str(batch)) + found.setup.ranks)
            assert "devices" in keys or plan(more).memory.total > room
        if "devices" in keys and found.setup.ranks > 2 * setup.ranks:
            half = found.setup.ranks // 2
            fewer = dataclasses.replace(found.setup, ranks=half, batch_size=found.setup.batch_size // 2)
            assert plan(fewer).memory.total > room


def test_shared_matrices_are_among_what_would_fit() -> None:
    """A wide model: most of its memory is for blocks that are gathered, which no batch changes."""
    setup = setup_of(WIDE, 8, batch_size=8, seq_len=16, optimizer="adamw")
    assert plan(setup).memory.gathered > plan(setup).memory.activations
    room = 0.7 * plan(setup).memory.total
    found = {key: made for keys, made in changes_that_fit(setup, room) for key in keys}
    assert found["parallel.tensor"].memory.total <= room
    half = dataclasses.replace(found["parallel.tensor"].setup, parallel=ParallelConfig(tensor=1))
    assert plan(half).memory.total > room


def test_what_a_run_refuses_is_not_among_what_would_fit() -> None:
    setup = setup_of(WIDE, 8, batch_size=8, seq_len=16, optimizer="adamw", precision="fp8")
    room = 0.7 * plan(setup).memory.total
    assert all("parallel.tensor" not in keys for keys, _ in changes_that_fit(setup, room))
    with pytest.raises(InputError, match=r"must be another with parallel\.tensor=2"):
        plan(dataclasses.replace(setup, parallel=ParallelConfig(tensor=2)))


@pytest.mark.slow
def test_nothing_fits_in_nothing() -> None:
    assert changes_that_fit(setup_of(TOY, 2), 1000.0) == []
