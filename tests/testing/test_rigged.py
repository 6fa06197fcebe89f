"""A layer in which nothing is wrong passes every check; each rigged one fails the check that is meant for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import rigged
from rigged import Good, describe
from torch import Tensor

from moesaic.testing import MoEUnderTest, Report, check_moe, dense_moe, moe_checks

NO_REFERENCE = {"reference": None, "replay_reference": None}
"""For layers of which the reference would say the same: it has the last word wherever it applies."""
NO_BIAS = {"expert_bias": None, "bias_step": None}


DEAR = {"compile", "expert-parallel"}


@dataclass(frozen=True)
class Rig:
    layer: type[Good]
    fails: set[str]
    unknown: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    def factory(self) -> Callable[[], MoEUnderTest]:
        return lambda: describe(self.layer(**self.arguments), **self.unknown)

    def __str__(self) -> str:
        return self.layer.__name__


EXACTLY_ONE = [
    Rig(rigged.NoiseInEvaluation, {"deterministic"}),
    Rig(rigged.ScoreBeforeExperts, {"outputs"}),
    Rig(rigged.BiasInScores, {"outputs"}),
    Rig(rigged.ExpertInputDetached, {"gradients"}),
    Rig(rigged.ScoresWithoutGradient, {"router-gradient"}, NO_REFERENCE),
    Rig(rigged.FirstTwoSwapped, {"permutation"}, NO_REFERENCE),
    Rig(rigged.CenteredOverBatch, {"batch-mates"}, NO_REFERENCE | NO_BIAS),
    Rig(rigged.CenteredOverLength, {"causality", "padding"}, NO_REFERENCE),
    Rig(rigged.TokensPerExpertTruncated, {"empty-experts"}),
    Rig(rigged.BufferOf128Rows, {"overloaded-expert"}),
    Rig(rigged.RecordsOfTheNextToken, {"replay-own"}),
    Rig(rigged.ReplaysTopScoresOnly, {"replay-gradient"}),
    Rig(rigged.ReplayCounted, {"replay-state"}),
    Rig(rigged.NoneIsTheLastExpert, {"variable-experts"}),
    Rig(rigged.NoneIsCounted, {"variable-experts"}),
    Rig(rigged.PaddingCounted, {"padding"}),
    Rig(rigged.BalanceDetached, {"balance-gradient"}),
    Rig(rigged.BalanceOfCounts, {"balance-gradient"}),
    Rig(rigged.ZLossDetached, {"z-gradient"}),
    Rig(rigged.VariationOfLoadTimesShare, {"perfect-balance"}),
    Rig(rigged.CosineRouter, {"zero-init"}, NO_REFERENCE),
    Rig(rigged.NaiveSoftmax, {"huge-logits"}),
    Rig(rigged.NaiveZLoss, {"huge-logits"}),
    Rig(rigged.FixedPointOutputs, {"scales"}),
    Rig(rigged.QuantizedByTheLargest, {"scales"}),
    Rig(rigged.RowsOfAnEarlierStep, {"dirty-memory"}),
    Rig(rigged.BiasNotSaved, {"bias-saved"}),
    Rig(rigged.BiasReplaced, {"bias-saved"}),
    Rig(rigged.EvaluationCounted, {"bias-evaluation"}),
    Rig(rigged.BiasMovesPerMicroBatch, {"bias-accumulation"}),
    Rig(rigged.RecomputationCounted, {"bias-checkpointing"}),
    Rig(rigged.UnusedParameter, {"ddp"}),
    Rig(rigged.CountsAsPythonNumbers, {"compile"}),
    Rig(rigged.GradientsOfRanksAveraged, {"expert-parallel"}),
    Rig(rigged.ExpertsOfAnotherRank, {"expert-parallel"}),
]

SEVERAL = [
    # the loss of the public bug: NaN at perfect balance, and a zero router is one
    Rig(rigged.VariationOfShare, {"perfect-balance", "zero-init"}),
    # skipping idle experts is a decision in Python, which the tracer cannot follow
    Rig(rigged.IdleExpertsSkipped, {"ddp", "compile"}, NO_REFERENCE),
    # whoever drops by order of arrival depends on what arrives
    Rig(
        rigged.CapacityOfABatch,
        {"permutation", "batch-mates", "causality", "overloaded-expert"},
        NO_REFERENCE,
    ),
    Rig(rigged.ExpertsChoose, {"batch-mates", "causality", "overloaded-expert"}, NO_REFERENCE),
    Rig(rigged.ScoresDetached, {"gradients", "router-gradient", "ddp"}),
    Rig(rigged.BiasMovesInForward, {"bias-accumulation", "bias-checkpointing"}),
    Rig(rigged.BiasNeverMoves, {"bias-saved", "bias-evaluation", "bias-accumulation", "bias-checkpointing"}),
]


def report_of(rig: Rig) -> Report:
    """Tracing and forking take most of the time, and only some rigs are about them."""
    checks = [check for check in moe_checks() if check.name not in DEAR or check.name in rig.fails]
    return Report(str(rig), tuple(check.run(rig.factory()) for check in checks))


def failed(report: Report) -> set[str]:
    return {row.check for row in report.failures}


@pytest.mark.slow
def test_every_check_applies_to_the_good_layer_and_passes() -> None:
    def factory(num_experts: int = 4) -> MoEUnderTest:
        return describe(Good(num_experts))

    report = check_moe(factory)
    assert report.ok, str(report)
    assert {row.status for row in report.rows} == {"pass"}, str(report)


@pytest.mark.slow_but_for("ScoreBeforeExperts", "BiasInScores")
@pytest.mark.parametrize("rig", EXACTLY_ONE, ids=str)
def test_a_rigged_layer_fails_exactly_the_check_meant_for_it(rig: Rig) -> None:
    report = report_of(rig)
    assert failed(report) == rig.fails, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("rig", SEVERAL, ids=str)
def test_bugs_that_break_several_properties(rig: Rig) -> None:
    report = report_of(rig)
    assert failed(report) == rig.fails, str(report)


def test_top_one_normalized_equals_its_reference_and_still_never_learns() -> None:
    def reference(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        def expert(e: int, rows: Tensor) -> Tensor:
            return (rows @ weights["up"][e]).relu() @ weights["down"][e]

        bias = weights["expert_bias"]
        return dense_moe(x, weights["router"], expert, top_k=1, normalize_scores=True, expert_bias=bias)

    report = report_of(
        Rig(
            rigged.TopOneNormalized,
            {"router-gradient"},
            # without any expert it would divide by a sum of none
            {"reference": reference, "replay_reference": None, "takes_no_expert": False},
            arguments={"top_k": 1},
        )
    )
    assert failed(report) == {"router-gradient"}, str(report)
    assert report["outputs"].status == report["gradients"].status == "pass"


@pytest.mark.slow
def test_a_dimension_lost_with_one_expert() -> None:
    def factory(num_experts: int = 4) -> MoEUnderTest:
        return describe(rigged.OneExpertSqueezed(num_experts))

    assert failed(check_moe(factory)) == {"single-expert"}


def test_every_check_has_a_rigged_layer_of_its_own() -> None:
    alone = {name for rig in EXACTLY_ONE for name in rig.fails} | {"single-expert"}
    assert alone == {check.name for check in moe_checks()}
