"""From minutes to steps and learning rates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.comparison.budget import Workload, choose_plan, estimate, parse_budget
from moesaic.errors import InputError

ARMS = {"baseline": Workload(0.1, 10, 20), "Mine": Workload(0.2, 10, 20)}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h30m", 5400), ("2h", 7200), ("0.5m", 30)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "10 m", "nan", "1e9h", "0s", "5m1h", "ten"])
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=r"budget=.*must be a duration such as 90s, 10m or 1h30m"):
        parse_budget(text)


@given(budget=st.floats(60, 10**5), num_seeds=st.integers(1, 8), workers=st.integers(1, 8))
def test_the_plan_is_the_longest_that_fits(budget: float, num_seeds: int, workers: int) -> None:
    try:
        plan = choose_plan(ARMS, budget=budget, num_seeds=num_seeds, workers=workers)
    except InputError as error:
        assert "must be longer" in str(error)
        return
    assert plan.seconds <= budget
    longer = estimate(ARMS, int(plan.steps * 1.12) + 2, plan.rates, num_seeds, workers)[0]
    assert longer > budget
    assert plan.at_most >= plan.seconds


def test_a_short_budget_gives_up_tuning_before_steps() -> None:
    assert choose_plan(ARMS, budget=2000, num_seeds=3, workers=2).rates == (0.5, 1.0, 2.0)
    assert choose_plan(ARMS, budget=100, num_seeds=3, workers=2).rates == (1.0,)


def test_what_the_person_sets_stays() -> None:
    plan = choose_plan(ARMS, budget=1, num_seeds=3, workers=1, steps=500, rates=(1.0, 3.0))
    assert (plan.steps, plan.rates) == (500, (1.0, 3.0))
    assert plan.seconds == pytest.approx(8 + 5 * (3 + 3 + 0.3 * 530))


def test_a_hopeless_budget_says_what_it_would_take() -> None:
    with pytest.raises(
        InputError, match=r"budget=20 s: 10 steps in every run take \d+ s on this machine; must be longer"
    ):
        choose_plan(ARMS, budget=20, num_seeds=3, workers=1)
