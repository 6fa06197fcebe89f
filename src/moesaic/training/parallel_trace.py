"""The default model on one process and on two that share its experts, step by step, up to the first other choice.

Sums of other lengths round otherwise. Where the two best logits of a token are nearly equal, another expert is chosen
then, and from there the two are different trainings. In fp64 that does not happen for long.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, distributed, nn

from moesaic.config import to_mapping
from moesaic.data import with_step_counts
from moesaic.layers import Routing
from moesaic.models.presets import small
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.workers import Workers
from moesaic.training.config import Precision, RunConfig, ScheduleConfig, TrainerConfig, TrainingConfig
from moesaic.training.coordinates import source_batches
from moesaic.training.module import LanguageModel
from moesaic.training.parallel_check import fit_on_standing, place

__all__ = ["Trace", "compare_traces"]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Two trainings beside each other."""

    precision: Precision
    steps: int
    changed_at: int | None
    """The first step, from 1, at which a token chose another expert; None if there was none."""
    changed: int
    """Tokens, counted in every layer, that did so at that step."""
    choices: int
    """Tokens times MoE layers of a step."""
    gap: float
    """The largest distance between their two best logits, on one process."""
    difference: float
    """The largest relative difference of losses before that step, or of all."""
    later_difference: float
    """The same from that step on; 0 if there is none."""

    @property
    def holds(self) -> bool:
        """Whether rounding explains it: in fp64 no other choice, in fp32 one where logits are nearly equal."""
        if self.precision == "64-true":
            return self.changed_at is None and self.difference <= 1e-8
        return self.difference <= 1e-4 and self.gap <= 1e-3

    def __str__(self) -> str:
        told = f"the default model, fp{self.precision.removesuffix('-true')}, one process beside parallel.expert=2: "
        if self.changed_at is None:
            return f"{told}losses of {self.steps} steps differ by at most {self.difference:.0e}, no choice of an expert"
        other = (
            f"{self.changed} of {self.choices:,} choices are other ones, between logits at most {self.gap:.0e} apart"
        )
        return (
            f"{told}losses differ by at most {self.difference:.0e} before step {self.changed_at}, where {other}; from "
            f"there losses differ by up to {self.later_difference:.0e}"
        )


def compare_traces(workers: Workers, precision: Precision, steps: int) -> Trace:
    """Train the default model by Muon on one process, and with `parallel.expert=2` on two."""
    config = RunConfig(
        training=TrainingConfig(steps=steps, log_every=1),
        schedule=ScheduleConfig(warmup_steps=min(50, steps)),
        trainer=TrainerConfig(precision=precision),
    )
    [alone] = workers.run(_train, 1, config)
    spread, _ = workers.run(_train, 2, dataclasses.replace(config, parallel=ParallelConfig(expert=2)))
    changed = [
        [here != there for here, there in zip(*layers, strict=True)]
        for layers in zip(alone.ids, spread.ids, strict=True)
    ]
    at = next((i for i, layers in enumerate(changed) if any(bool(each.any()) for each in layers)), None)
    differences = [
        abs(here - there) / abs(here) if math.isfinite(there) else math.inf
        for here, there in zip(alone.losses, spread.losses, strict=True)
    ]
    tokens = [] if at is None else [gap[each] for gap, each in zip(alone.gaps[at], changed[at], strict=True)]
    return Trace(
        precision=precision,
        steps=steps,
        changed_at=None if at is None else at + 1,
        changed=sum(each.numel() for each in tokens),
        choices=sum(each.numel() for each in alone.ids[0]),
        gap=max((float(each.max()) for each in tokens if each.numel()), default=0.0),
        difference=max(differences[:at], default=0.0),
        later_difference=0.0 if at is None else max(differences[at:]),
    )


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What a training was, step by step; choices and gaps of all tokens by layer."""

    losses: list[float]
    ids: list[list[Tensor]]
    gaps: list[list[Tensor]]


class _Losses(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.found.append(metrics["train/loss"])


def _train(config: RunConfig) -> _Steps:
    rank, ranks = place()
    torch.manual_seed(config.seed)
    module = LanguageModel(to_mapping(config), to_mapping(small(vocab_size=256)))
    routers = [each.router for each in module.decoder.modules() if hasattr(each, "forward_with_routing")]
    seen: list[tuple[Tensor, Tensor]] = []

    def note(router: nn.Module, inputs: Any, routing: Routing) -> None:
        best = routing.logits.detach().topk(2, dim=1).values
        seen.append((routing.expert_ids[:, 0].clone(), best[:, 0] - best[:, 1]))

    for router in routers:
        assert isinstance(router, nn.Module)
        router.register_forward_hook(note)
    losses = _Losses()
    fit_on_standing(module, _batches(config, rank, ranks), config.training.steps, config.trainer.precision, losses)
    if ranks > 1:
        seen = [(_of_all(ids, ranks), _of_all(gaps, ranks)) for ids, gaps in seen]
    by_step = [seen[i : i + len(routers)] for i in range(0, len(seen), len(routers))]
    return _Steps(losses.found, *([[each[part] for each in step] for step in by_step] for part in (0, 1)))


def _of_all(tensor: Tensor, ranks: int) -> Tensor:
    """What all ranks have, in their order, which is that of the rows."""
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _batches(config: RunConfig, rank: int, ranks: int) -> Iterator[dict[str, Tensor]]:
    training = config.training
    size = training.batch_size // ranks
    for batch in source_batches(training.steps, config.seed, training.batch_size, training.seq_len):
        mine = batch[rank * size : (rank + 1) * size]
        tokens, labels = mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
        yield from with_step_counts(
            [{"tokens": tokens, "labels": labels, "valid": torch.ones_like(labels, dtype=torch.bool)}]
        )
