"""What a model costs: counted while a training step of it runs, and held against what its parts say of themselves."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moesaic.devices import machine_memory, require_memory
from moesaic.layers.part import Flops, flops_per_token, num_parameters
from moesaic.layers.work import Work
from moesaic.losses.cross_entropy import linear_cross_entropy, token_cross_entropy
from moesaic.models.accounting import Account, account
from moesaic.models.config import DecoderConfig
from moesaic.models.custom import custom_modules
from moesaic.models.decoder import Block, Decoder, build_decoder
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory

__all__ = ["Candidate", "Costs", "forward_costs", "measure_costs", "time_steps"]

MOST_COUNTED = 2 * 10**10
"""FLOPs of the step that is counted, at most: some seconds on two cores. Beyond it fewer sequences are counted."""

TOLERANCE = 0.02
"""Relative difference between what a part says and what is counted that is not worth a word."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A decoder and how it is trained."""

    model: DecoderConfig
    batch_size: int
    seq_len: int
    optimizer: str
    """adamw or muon, for `estimate_memory`."""
    make_optimizer: Callable[[Decoder], torch.optim.Optimizer]
    checkpoint_activations: bool = False


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a model costs. FLOPs are per token, a multiply-add is two; bytes are those of fp32 training."""

    parameters: int
    active_parameters: int
    """What one token meets, with as many experts as the router of the new model gives it."""
    forward_flops: float
    """The active FLOPs, head included."""
    training_flops: float
    """Forward and backward, with what activation checkpointing repeats; without the optimizer."""
    weight_bytes: int
    optimizer_bytes: int
    """State of the optimizer after its first step."""
    activation_bytes: int
    """What the forward pass keeps for the backward up to the loss: each tensor once, parameters left out."""
    booked_flops: float
    """Forward FLOPs that runs book in their rows: what `moesaic.models.account` adds up from the parts."""
    flops_source: Literal["counted", "formula"]
    """"formula": the model is too large to run here, so `account` and the memory formulas speak."""
    step_seconds: float | None = None
    """Median seconds of a whole step, see `time_steps`; None if it was not timed."""
    unknown_operators: tuple[str, ...] = ()
    """Operators that took matrices and that nobody counts: their FLOPs are in no number."""
    notes: tuple[str, ...] = ()
    """Plain sentences: how it was counted, and which part says something else of itself."""


def measure_costs(candidate: Candidate) -> Costs:
    """The costs of a candidate, counted on a new model, on random tokens, in fp32 on the CPU.

    Work that is really done counts, such as padded rows or the whole (L, L) of a product that is masked afterwards.
    Causal attention counts as far as its diagonal. A step of the default model takes a second or two.
    """
    accounted = account(candidate.model, candidate.seq_len)
    sequences = _affordable(candidate, accounted)
    if not sequences:
        return _by_formula(
            candidate, accounted, "The model is too large to run here, so its costs are those of formulas."
        )
    try:
        counted = _count_step(candidate, sequences)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # what torch's counter has no answer to
        reason = str(error).partition("\n")[0]
        return _by_formula(
            candidate, accounted, f"Torch cannot count a step of this model ({reason}), so formulas speak."
        )
    notes = [*_about_the_sample(candidate, sequences), *_disagreements(candidate, counted, accounted)]
    if counted.unknown:
        notes.append(f"FLOPs of {', '.join(counted.unknown)} are not counted: torch has no formula for them.")
    return Costs(
        parameters=num_parameters(counted.decoder),
        active_parameters=_active_parameters(counted, accounted),
        forward_flops=counted.forward,
        training_flops=counted.training,
        weight_bytes=sum(parameter.nbytes for parameter in counted.decoder.parameters()),
        optimizer_bytes=counted.optimizer_bytes,
        activation_bytes=_of_whole_batch(candidate, sequences, counted.activation_bytes),
        booked_flops=accounted.forward_flops,
        flops_source="counted",
        unknown_operators=counted.unknown,
        notes=tuple(notes),
    )


def forward_costs(candidate: Candidate) -> tuple[float, int]:
    """Forward FLOPs per token and parameters alone, as `measure_costs` counts them, in a fraction of its time."""
    accounted = account(candidate.model, candidate.seq_len)
    sequences = _affordable(candidate, accounted)
    if sequences:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                step = _Step(candidate, sequences)
                with Work() as work, torch.no_grad():
                    step(nullcontext())
            return work.flops / step.tokens.numel(), num_parameters(step.decoder)
        except (RuntimeError, TypeError, NotImplementedError):
            pass
    return accounted.forward_flops, accounted.parameters


class _Step(nn.Module):
    """A whole step as one module, so that torch's counter names the modules within by their place."""

    def __init__(self, candidate: Candidate, sequences: int) -> None:
        super().__init__()
        self.decoder = build_decoder(candidate.model, checkpoint_activations=candidate.checkpoint_activations)
        vocabulary, shape = candidate.model.vocab_size, (sequences, candidate.seq_len + 1)
        drawn = torch.randint(vocabulary, shape)
        self.tokens, self.labels = drawn[:, :-1], drawn[:, 1:].flatten()
        self.routed: dict[str, Any] = {}

    def forward(self, watched: AbstractContextManager[Any]) -> Tensor:
        """The loss.

        Args:
            watched: a context for what comes before the loss.
        """
        with watched:
            hidden, self.routed = self.decoder.hidden_states(self.tokens)
        loss = linear_cross_entropy if torch.is_grad_enabled() else token_cross_entropy
        return loss(hidden.flatten(0, 1), self.decoder.head.weight, self.labels).mean()


class _Counted(NamedTuple):
    """A step, counted. FLOPs are per token."""

    decoder: Decoder
    forward: float
    by_part: dict[str, float]
    """Forward FLOPs by name of the part, "layers.0.mixer"."""
    training: float
    activation_bytes: int
    optimizer_bytes: int
    experts_per_token: dict[str, float]
    """By name of the MoE layer."""
    unknown: tuple[str, ...]


def _count_step(candidate: Candidate, sequences: int) -> _Counted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        step = _Step(candidate, sequences)
        decoder, tokens = step.decoder, sequences * candidate.seq_len
        with Work() as forward, torch.no_grad():
            step(nullcontext())
        routed = {name: routing.tokens_per_expert.sum().item() / tokens for name, routing in step.routed.items()}
        saved = _Saved([*decoder.parameters(), *decoder.buffers()])
        with Work() as training:
            loss = saved.run(step)
            loss.backward()
        optimizer = candidate.make_optimizer(decoder)
        optimizer.step()
    state = [x for x in tree_leaves(dict(optimizer.state)) if isinstance(x, Tensor)]
    names = [name for name, _ in decoder.named_modules()]
    by_part = {name: forward.flops_of(f"_Step.decoder.{name}") / tokens for name in names}
    for i in range(len(decoder.layers)):  # a MoE layer is asked for its routing too, and not called as a module
        by_part[f"layers.{i}.ffn"] = by_part[f"layers.{i}"] - by_part[f"layers.{i}.mixer"]
    return _Counted(
        decoder=decoder,
        forward=forward.flops / tokens,
        by_part=by_part,
        training=training.flops / tokens,
        activation_bytes=saved.nbytes,
        optimizer_bytes=sum(x.nbytes for x in state),
        experts_per_token=routed,
        unknown=tuple(sorted({*forward.unknown, *training.unknown})),
    )


class _Saved:
    """Counts the bytes of tensors that autograd saves for the backward, each memory once.

    Args:
        outside: tensors that do not count.
    """

    def __init__(self, outside: Sequence[Tensor]) -> None:
        self.nbytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self._held: list[Any] = []  # so that no address is used twice

    def run(self, step: _Step) -> Tensor:
        """The loss of a step, whose forward pass is watched up to the loss."""
        decoder = step.decoder
        handles = [
            block.register_forward_pre_hook(lambda _, inputs: self.add(inputs[0]))
            for block in decoder.layers
            if decoder.checkpoint_activations  # it keeps their inputs by itself
        ]
        loss = step(torch.autograd.graph.saved_tensors_hooks(self.add_saved, lambda x: x))
        for handle in handles:
            handle.remove()
        return loss

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._held.append(storage)
            self.nbytes += storage.nbytes()

    def add_saved(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor


def _of_whole_batch(candidate: Candidate, sequences: int, counted: int) -> int:
    """Activations of all sequences, from those of some and of half: part of them, such as joined weights, is fixed."""
    if sequences == candidate.batch_size or sequences == 1:
        return counted * candidate.batch_size // sequences
    half = sequences // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        step = _Step(candidate, half)
        saved = _Saved([*step.decoder.parameters(), *step.decoder.buffers()])
        saved.run(step)
    of_each = (counted - saved.nbytes) / (sequences - half)
    return round(counted + of_each * (candidate.batch_size - sequences))


def _affordable(candidate: Candidate, accounted: Account) -> int:
    """Number of sequences whose step may be counted here: within `MOST_COUNTED` and half of the memory; maybe 0."""
    model, seq_len = candidate.model, candidate.seq_len

    def memory(sequences: int) -> int:
        return _memory_of(dataclasses.replace(candidate, batch_size=sequences)).total

    room = machine_memory()[0] // 2
    if memory(1) > room:
        return 0
    dense = 6 * seq_len * (4 * seq_len * model.dim * model.num_layers)  # what a custom mixer may do at most
    booked = 3 * seq_len * accounted.forward_flops
    of_one = max(booked, dense if custom_modules(model) else 0)
    sequences = min(candidate.batch_size, int(MOST_COUNTED / of_one))
    while sequences > 1 and memory(sequences) > room:
        sequences //= 2
    return sequences


def _about_the_sample(candidate: Candidate, sequences: int) -> list[str]:
    if sequences == candidate.batch_size:
        return []
    return [
        f"Counted on {sequences} of {candidate.batch_size} sequences of {candidate.seq_len} tokens; activations are "
        "extrapolated to all of them."
    ]


def _active_parameters(counted: _Counted, accounted: Account) -> int:
    """All, less those of a part that a token does not meet: for MoE layers by what their routers really gave."""
    total = num_parameters(counted.decoder)
    for i, (layer, block) in enumerate(zip(accounted.layers, counted.decoder.layers, strict=True)):
        assert isinstance(block, Block)
        experts, chosen = getattr(block.ffn, "experts", None), counted.experts_per_token.get(f"layers.{i}.ffn")
        num_experts = getattr(experts, "num_experts", None)
        if chosen is not None and isinstance(experts, nn.Module) and num_experts:
            total -= round((1 - chosen / num_experts) * num_parameters(experts))
        else:
            total -= layer.parameters - layer.active_parameters
    return total


def _disagreements(candidate: Candidate, counted: _Counted, accounted: Account) -> list[str]:
    """Sentences about the parts that say other FLOPs of themselves than were counted, and about the whole."""
    seq_len, dim = candidate.seq_len, candidate.model.dim
    found: dict[tuple[Any, ...], list[str]] = {}
    said: dict[tuple[str, str, int], Flops] = {}
    for i, (layer, block) in enumerate(zip(candidate.model.layers, counted.decoder.layers, strict=True)):
        assert isinstance(block, Block)
        parts: dict[str, tuple[Any, tuple[int, ...]]] = {
            "mixer": (block.mixer, (1, seq_len, dim)),
            "ffn": (block.ffn, (1, seq_len, dim)),
            "ffn.router": (getattr(block.ffn, "router", None), (seq_len, dim)),
        }
        for place, (part, shape) in parts.items():
            if part is None:
                continue
            measured = counted.by_part[f"layers.{i}.{place}"]
            key = (repr(layer), place, round(measured))
            if key not in said:
                said[key] = flops_per_token(part, seq_len, *shape)
            per_token, source = said[key]
            if _differ(per_token, measured):
                what = (type(part).__name__, source, per_token, measured)
                found.setdefault(what, []).append(f"layers.{i}.{place}")
    notes = []
    for (name, source, per_token, measured), places in found.items():
        where = places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        says = {"declared": "declares", "measured": "runs alone with", "assumed": "is assumed to have"}[source]
        notes.append(
            f"{where} ({name}) {says} {_flops(per_token)} per token, forward; {_flops(measured)} were counted, which "
            "is what is compared."
        )
    if _differ(accounted.forward_flops, counted.forward):
        notes.append(
            f"The rows of a run book {_flops(accounted.forward_flops)} per token, forward; "
            f"{_flops(counted.forward)} were counted."
        )
    return notes


def _differ(said: float, measured: float) -> bool:
    return not math.isclose(said, measured, rel_tol=TOLERANCE, abs_tol=1)


def _flops(number: float) -> str:
    return f"{number:,.0f} FLOP" if number < 1e5 else f"{number / 1e6:,.3f} MFLOP"


def _by_formula(candidate: Candidate, accounted: Account, note: str) -> Costs:
    """By formula; the memory of custom modules is counted on tensors without memory (seconds)."""
    if custom_modules(candidate.model):
        memory = trace_memory(
            candidate.model,
            batch_size=candidate.batch_size,
            seq_len=candidate.seq_len,
            make_optimizer=candidate.make_optimizer,
            checkpoint_activations=candidate.checkpoint_activations,
        )
    else:
        memory = _memory_of(candidate)
    return Costs(
        parameters=accounted.parameters,
        active_parameters=accounted.active_parameters,
        forward_flops=accounted.forward_flops,
        training_flops=accounted.training_flops,
        weight_bytes=memory.weights,
        optimizer_bytes=memory.optimizer,
        activation_bytes=memory.activations,
        booked_flops=accounted.forward_flops,
        flops_source="formula",
        notes=(note,),
    )


def _memory_of(candidate: Candidate) -> MemoryEstimate:
    """By formula, without custom modules."""
    return estimate_memory(
        candidate.model,
        batch_size=candidate.batch_size,
        seq_len=candidate.seq_len,
        optimizer=candidate.optimizer,
        checkpoint_activations=candidate.checkpoint_activations,
    )


def time_steps(candidates: Sequence[Candidate], *, rounds: int = 7, device: str = "cpu") -> list[float]:
    """Median seconds of a whole step in fp32: forward, cross-entropy, backward, optimizer. Balance losses are left out.

    One step of each in turn per round, beginning with another one each time, after two rounds to warm up. All models
    are in memory together. Every step sees other random tokens, so experts get other numbers of rows.
    On one thread of a CPU the ratios are those of CPU seconds, which other processes hardly change.

    Raises:
        InputError: the models do not fit in memory together.
    """
    require_memory(
        f"timing {len(candidates)} models side by side",
        sum(_memory_of(candidate).total for candidate in candidates),
        "gpu" if device == "cuda" else "cpu",
        "must be smaller models, batch_size or seq_len",
    )
    steps = [_step_of(candidate, device) for candidate in candidates]
    samples: list[list[float]] = [[] for _ in candidates]
    in_cpu: list[list[float]] = [[] for _ in candidates]
    for i in range(-2, rounds):
        for j in range(len(candidates)):
            which = (i + j) % len(candidates)
            began, cpu = time.perf_counter(), time.process_time()
            steps[which]()
            if i >= 0:
                samples[which].append(time.perf_counter() - began)
                in_cpu[which].append(time.process_time() - cpu)
    if device != "cpu" or torch.get_num_threads() > 1:
        return [statistics.median(found) for found in samples]
    busy = max(1.0, math.fsum(map(math.fsum, samples)) / math.fsum(map(math.fsum, in_cpu)))  # others were on the CPU
    return [busy * statistics.median(found) for found in in_cpu]


def _step_of(candidate: Candidate, device: str) -> Callable[[], None]:
    decoder = build_decoder(candidate.model, checkpoint_activations=candidate.checkpoint_activations, device=device)
    optimizer = candidate.make_optimizer(decoder)
    shape = (candidate.batch_size, candidate.seq_len + 1)

    def step() -> None:
        tokens = torch.randint(candidate.model.vocab_size, shape, device=device)
        hidden, _ = decoder.hidden_states(tokens[:, :-1])
        loss = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step
