"""The sentences of a comparison, from numbers that are known."""

import dataclasses

import pytest

from moesaic.comparison.verdict import UNCHECKED, next_steps, seeds_to_see, sentence
from moesaic.statistics import Interval, interval, student_t
from moesaic.studies.config import StudyConfig
from moesaic.studies.plan import Tuning
from moesaic.studies.results import ArmResult, paired_difference


def study(**changed: object) -> StudyConfig:
    arms = {"baseline": {}, "Mine": {"model.moe.top_k": 2}}
    whole = StudyConfig(question="?", equal="tokens", baseline="baseline", arms=arms, seeds=(0, 1, 2))
    return dataclasses.replace(whole, **changed)


def result(values: list[float], baseline: list[float], *, at_edge: bool = False) -> ArmResult:
    ours, theirs = dict(enumerate(values)), dict(enumerate(baseline))
    return ArmResult(
        arm="Mine",
        axis=None,
        shown="Mine",
        baseline="baseline",
        rows=(),
        values=ours,
        missing=(),
        tuning=Tuning((0.5, 1.0, 2.0), 1.0, at_edge),
        tuning_cpu_seconds=0.0,
        level=interval(values),
        difference=paired_difference(ours, theirs),
        switched=None,
        verdict="",
    )


BETTER = result([1.40, 1.41, 1.42], [1.45, 1.462, 1.468])
UNKNOWN = result([1.40, 1.45, 1.50], [1.44, 1.43, 1.50])


def test_a_difference_is_told_with_its_interval_unit_and_price() -> None:
    text = sentence(study(), BETTER, ["22% fewer parameters", "1.30 times the seconds per step"])
    assert text == (
        "Mine is better than baseline by 0.0500 bits per byte (95% interval 0.0450 to 0.0550, 3 pairs of runs), "
        "with 22% fewer parameters and 1.30 times the seconds per step."
    )


def test_where_higher_is_better_a_higher_mean_wins() -> None:
    assert "Mine is worse" in sentence(study(higher_is_better=True), BETTER, [])
    assert "accuracy" in sentence(study(metric="recall/accuracy", higher_is_better=True), BETTER, [])


def test_an_interval_that_holds_zero_is_no_difference() -> None:
    text = sentence(study(), UNKNOWN, [])
    assert text.startswith("No difference seen between Mine and baseline: 95% interval -0.0")
    assert text.endswith("bits per byte, 3 pairs of runs.")


def test_one_seed_is_no_verdict() -> None:
    assert "so there is no verdict" in sentence(study(), result([1.4], [1.5]), [])


def test_a_leak_follows_the_name_and_takes_the_verdict_back() -> None:
    text = sentence(study(marks={"Mine": "sees later tokens"}), BETTER, [])
    assert text.startswith("Mine (sees later tokens) is better")
    assert text.endswith("It does not count: Mine sees later tokens, which no honest language model can.")


def test_seeds_to_see_are_as_many_as_make_the_interval_leave_zero_out() -> None:
    # two values one deviation around their mean; n = 4 such values have 1.155 / sqrt(4) * 3.182 = 1.84 deviations
    def two(mean: float) -> Interval:
        return interval([mean - 1, mean + 1])

    needed = {mean: seeds_to_see(two(mean)) for mean in (3.0, 2.0, 1.0, 0.1)}
    for mean, n in needed.items():
        if n is None:
            assert mean == 0.1
            continue
        assert student_t(n) * 2**0.5 / n**0.5 < mean
        assert n == 3 or student_t(n - 1) * 2**0.5 / (n - 1) ** 0.5 >= mean


def test_next_steps_name_seeds_checks_edges_and_untuned_rates() -> None:
    assert any("seeds=" in text or "more than 30 seeds" in text for text in next_steps(study(), [UNKNOWN], {}))
    assert next_steps(study(marks={"Mine": "sees later tokens"}), [BETTER], {"Mine": ["causality"]}) == [
        "Mend Mine first: it fails causality."
    ]
    for best, given in ((2.0, "rates=[0.5,1,2,4]"), (0.5, "rates=[0.25,0.5,1,2]")):
        at_edge = dataclasses.replace(BETTER, tuning=Tuning((0.5, 1.0, 2.0), best, True))
        assert any(
            f"at the edge of what was tried: give {given} and another results_dir." in text
            for text in next_steps(study(), [at_edge], {})
        )
    assert "Learning rates were not tuned: give a longer budget and another results_dir." in next_steps(
        study(), [BETTER], {}, "a longer budget"
    )
    assert not any("tuned" in text for text in next_steps(study(), [BETTER], {}))
    assert "Give seeds=3 for an interval." in next_steps(study(seeds=(0,)), [result([1.4], [1.5])], {})


@pytest.mark.parametrize("higher", [True, False])
def test_the_sentence_and_the_interval_agree(higher: bool) -> None:
    worse = result([1.6, 1.7, 1.65], [1.4, 1.49, 1.45])
    assert ("better" in sentence(study(higher_is_better=higher), worse, [])) == higher


def test_a_baseline_that_leaks_is_said_too() -> None:
    marked = study(marks={"baseline": "sees later tokens"})
    text = sentence(study(marks={"Mine": UNCHECKED}), BETTER, [])
    assert text.endswith("It does not count: Mine could not be checked for leaks.")
    text = sentence(marked, BETTER, [])
    assert "better than baseline (sees later tokens) by" in text
    assert text.endswith("It does not count: baseline sees later tokens, which no honest language model can.")
    baseline = dataclasses.replace(BETTER, arm="baseline", shown="baseline", difference=None)
    found = next_steps(marked, [baseline, BETTER], {"baseline": ["causality"]})
    assert found[0] == "Mend baseline first: it fails causality."


def test_runs_that_are_in_no_mean_are_said_after_the_verdict() -> None:
    rows = tuple({"seed": seed, "status": "diverged" if seed == 3 else "finished", "metrics": {}} for seed in range(4))
    ours = dataclasses.replace(BETTER, rows=rows)
    theirs = dataclasses.replace(BETTER, arm="baseline", shown="baseline", rows=rows[:2], missing=(2, 3))
    text = sentence(study(), ours, [], theirs)
    assert text.endswith(
        "3 pairs of runs). Left out: 1 of 4 runs of Mine, diverged. Left out: 2 of 4 runs of baseline, without a score."
    )
    theirs = dataclasses.replace(theirs, difference=None)
    assert "Repeat the command: 2 runs of baseline must still end." in next_steps(study(), [theirs, ours], {})


def test_a_baseline_at_the_edge_of_its_learning_rates_is_said_too() -> None:
    tuned = Tuning((0.5, 1.0, 2.0), 2.0, True)
    baseline = dataclasses.replace(BETTER, arm="baseline", shown="baseline", difference=None, tuning=tuned)
    first = next_steps(study(), [baseline, BETTER], {})[0]
    assert first.startswith("The best learning rate of baseline is at the edge")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.07, 0.06, 0.065], "No arm answers more than chance, 0.0625: give more training.steps"),
        ([1.0, 1.0, 1.0], "All arms answer nearly everything: a harder data.task"),
        ([0.5, 0.5, 0.5], "Look for what keeps Mine at the score of baseline"),
    ],
)
def test_ties_and_accuracies_that_compare_nothing_are_said(values: list[float], said: str) -> None:
    recall = study(metric="recall/accuracy", higher_is_better=True)
    rows = tuple({"seed": seed, "status": "finished", "metrics": {"recall/chance": 0.0625}} for seed in range(3))
    tie = dataclasses.replace(result(values, values), rows=rows)
    assert sentence(recall, tie, []) == "Mine and baseline have the same score in all 3 pairs of runs."
    found = next_steps(recall, [tie], {})
    assert found[0].startswith(said)
    assert not any("seeds" in text for text in found)


def test_scores_of_few_windows_are_said_to_be_of_little_text() -> None:
    rows = tuple({"seed": seed, "status": "finished", "metrics": {"validation/windows": 3}} for seed in range(3))
    first = next_steps(study(), [dataclasses.replace(BETTER, rows=rows)], {})[0]
    assert first == "Scores are of 3 windows of text, which says little of any other: give more data."
