"""What a ladder costs is said before it runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.ladder.cost import cost_of
from moesaic.ladder.prediction import read_ladder
from moesaic.ladder.rungs import Rungs


def test_runs_flops_and_time_of_what_is_missing(
    rungs_of: Callable[..., Rungs], made_ladder: Callable[..., Path]
) -> None:
    ladder = read_ladder(made_ladder(rungs_of()))
    assert cost_of(ladder.rungs, ladder.study, ladder.base, ladder.rows).told(2) == "all runs are there"
    kept = {key: row for key, row in ladder.rows.items() if row["axis"] != "rung=1e13" or row["seed"] == 0}
    cost = cost_of(ladder.rungs, ladder.study, ladder.base, kept)
    assert cost.runs == {"1e13": 4}
    assert cost.flops == pytest.approx(4e13, rel=0.02)
    as_those_there = 2 * 1e13 / 1e9 + 2 * 1e13 / 0.8e9
    assert cost.seconds(2) == pytest.approx(as_those_there / 2, rel=0.02)


@pytest.mark.slow
def test_without_a_run_a_cpu_is_timed_and_a_gpu_is_not(rungs_of: Callable[..., Rungs]) -> None:
    rungs = rungs_of()
    study, base = rungs.study()
    cost = cost_of(rungs, study, base, {})
    assert cost.runs == {"1e11": 12, "3e11": 6, "1e12": 6, "3e12": 6, "1e13": 6}
    seconds = cost.seconds(1)
    assert seconds is not None and 60 < seconds < 1e6
    on_gpu = cost_of(rungs, study, {**base, "trainer": {**base["trainer"], "accelerator": "gpu"}}, {})
    assert on_gpu.seconds(1) is None and "known once some have ended" in on_gpu.told(1)
