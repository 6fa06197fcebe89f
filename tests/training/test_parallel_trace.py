"""The default model on one process and on two, step by step."""

import pytest

from moesaic.parallel.workers import Workers
from moesaic.training.config import Precision
from moesaic.training.parallel_trace import Trace, compare_traces


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_losses_and_choices_are_those_of_one_process(precision: Precision) -> None:
    workers = Workers(count=2)
    try:
        found = compare_traces(workers, precision, 4)
    finally:
        workers.close()
    assert found.holds
    assert found.choices == 2 * 8 * 256
    assert str(found).endswith("no choice of an expert")


def test_a_choice_of_another_expert_is_told_with_its_logits() -> None:
    found = Trace("32-true", 50, 29, 2, 4096, 3e-7, 1e-6, 1e-3)
    assert found.holds
    assert str(found) == (
        "the default model, fp32, one process beside parallel.expert=2: losses differ by at most 1e-06 before step 29, "
        "where 2 of 4,096 choices are other ones, between logits at most 3e-07 apart; from there losses differ by up "
        "to 1e-03"
    )
    assert not Trace("32-true", 50, 29, 2, 4096, 0.1, 1e-6, 1e-3).holds, "no rounding is as large"
    assert not Trace("64-true", 50, 29, 2, 4096, 1e-12, 0.0, 1e-3).holds
