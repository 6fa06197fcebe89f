"""What is left to run of a ladder, and how long it will take: said before anything runs."""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from moesaic.ladder.rungs import AXIS, Rungs
from moesaic.losses.cross_entropy import linear_cross_entropy
from moesaic.models import build_decoder
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Row
from moesaic.studies.plan import tuning

__all__ = ["Cost", "cost_of"]

STEPS = 3
"""Steps that are timed where no run has told yet; the fastest counts."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Runs that are missing."""

    runs: dict[str, int]
    """By rung."""
    flops: float
    processor_seconds: float | None
    """Seconds of one process on one thread; None where nothing tells it."""

    def seconds(self, workers: int) -> float | None:
        return None if self.processor_seconds is None else self.processor_seconds / workers

    def told(self, workers: int) -> str:
        """One sentence for the console."""
        if not self.runs:
            return "all runs are there"
        parts = ", ".join(f"{count} at {rung}" for rung, count in self.runs.items())
        text = f"{sum(self.runs.values())} runs to do ({parts}): {self.flops:.3g} active FLOPs"
        if self.processor_seconds is None:
            return f"{text}; how long they take is known once some have ended"
        hours = self.processor_seconds / 3600
        return f"{text}, about {hours:.2g} core hours, {hours / workers:.2g} hours with workers={workers}"


def cost_of(
    rungs: Rungs,
    study: StudyConfig,
    base: Mapping[str, Any],
    rows: Mapping[str, Row],
    timed: dict[tuple[str, int], float] | None = None,
) -> Cost:
    """What is missing, with the speed of the runs that are there.

    Of a rung without any, a few steps of its model are timed here, if it is to run on a CPU. A grid of rates may still
    grow by two runs per arm.

    Args:
        timed: seconds per FLOP that were found before, by arm and width; what is found here is added.
    """
    timed = {} if timed is None else timed
    counts, flops, seconds = dict[str, int](), 0.0, 0.0
    is_known = base["trainer"]["accelerator"] == "cpu"
    for rung in (each for each in rungs.all if each.name in study.axes[AXIS].values):
        for arm in study.arms:
            cell = study.cell(arm, (AXIS, rung.name))
            tuned = tuning(study, cell, rows)
            there = [row for row in rows.values() if (row["arm"], row["axis"]) == (cell.arm, cell.axis)]
            runs = len(study.seeds) - sum(row["purpose"] == "measure" for row in there)
            if study.tune is not None and study.first_cell(cell) == cell:
                runs += len(tuned.factors) - sum(row["purpose"] == "tune" for row in there)
            if runs <= 0:
                continue
            of_run = rungs.flops_per_token(arm, rung.dim) * rung.tokens
            finished = [row["metrics"]["seconds"] for row in there if row["status"] == "finished"]
            if finished:
                seconds += runs * statistics.median(finished)
            elif is_known:
                if (arm, rung.dim) not in timed:
                    timed[arm, rung.dim] = _seconds_per_flop(rungs, arm, rung.dim, base["training"]["seq_len"])
                seconds += runs * timed[arm, rung.dim] * of_run
            counts[rung.name] = counts.get(rung.name, 0) + runs
            flops += runs * of_run
    return Cost(counts, flops, seconds if is_known else None)


def _seconds_per_flop(rungs: Rungs, arm: str, dim: int, seq_len: int) -> float:
    """Of training on one thread of this CPU, by a few steps on four sequences."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            decoder = build_decoder(rungs.model_at(arm, dim))
            tokens = torch.randint(rungs.vocab_size, (4, seq_len + 1))
            times = []
            for _ in range(STEPS):
                began = time.process_time()
                hidden, _ = decoder.hidden_states(tokens[:, :-1])
                linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens[:, 1:].flatten()).backward()
                times.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(times) / (rungs.flops_per_token(arm, dim) * 4 * seq_len)
