"""What a study consists of: bad input by name, learning rates tuned by one rule for all, and what is missing."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import InputError
from moesaic.overrides import apply_overrides
from moesaic.studies.config import Cell, StudyConfig
from moesaic.studies.jobs import (
    Job,
    Row,
    canonical,
    config_hash,
    fingerprint,
    job_hash,
    job_of,
    prepare_job,
    prepared_names,
    resolve,
    validate,
)
from moesaic.studies.plan import plan, score, tuning

StudyOf = Callable[..., StudyConfig]


def frozen(name: str) -> dict[str, Any]:
    return {"source": "frozen", "teacher": f"prepared:{name}"}


def cached(name: str) -> dict[str, Any]:
    return {"source": "cached", "cache": f"prepared:{name}"}


PREPARED: dict[str, Any] = {
    "tune": None,
    "seeds": [0],
    "prepare": {
        "teacher": {"train": {"model.dim": 32}},
        "other": {"train": {}},
        "few": {"cache": {"teacher": "teacher"}},
    },
    "baseline": "plain",
    "arms": {
        "plain": {},
        "frozen": {"distillation": frozen("teacher")},
        "cached": {"distillation": cached("few")},
        "third": {"distillation": frozen("other")},
    },
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "sparse"}, "study.baseline='sparse': unknown arm; must be one of dense, moe"),
        ({"marks": {"hot": "leaks"}}, "study.marks.hot: unknown arm; must be one of dense, moe"),
        ({"marks": {"moe": " "}}, "study.marks.moe=' ': must be a few words on one line"),
        ({"seeds": []}, "study.seeds=[]: must be one or more different integers"),
        ({"seeds": [1, 1]}, "study.seeds=[1, 1]: must be"),
        ({"seeds": [-1, 1]}, "study.seeds=[-1, 1]: must be one or more different integers >= 0"),
        ({"tune": {"seed": -2}}, "study.tune.seed=-2: must be an integer >= 0"),
        ({"seeds": [9]}, "study.tune.seed=9: it must not be one of seeds=[9]"),
        ({"tune": {"seed": 9, "factors": [1.0]}}, "study.tune.factors=[1.0]: must be two or more"),
        ({"variants": {"hot": {"arm": "x", "overrides": {}}}}, "study.variants.hot.arm='x': unknown arm"),
        ({"variants": {"moe": {"arm": "moe", "overrides": {}}}}, "study.variants.moe: an arm has this name"),
        (
            {"variants": {"hot": {"arm": "moe", "overrides": {"training.steps": 1}}}},
            "study.variants.hot.overrides.training.steps: must be keys of the model",
        ),
        ({"axes": {"experts": {"values": {}, "fixed": ["x"]}}}, "study.axes.experts.fixed: unknown arm 'x'"),
        ({"prepare": {"a": {}}}, "study.prepare.a.train, cache: give one of the two"),
        ({"prepare": {"a": {"train": {}, "cache": {"teacher": "a"}}}}, "study.prepare.a.train, cache: give one of"),
        (
            {"prepare": {"a": {"cache": {"teacher": "b"}}, "b": {"train": {}}}},
            "study.prepare.a.cache.teacher='b': must be the prepared runs above it: none",
        ),
        (
            {"prepare": {"b": {"train": {}}, "a": {"cache": {"teacher": "b", "k": 0}}}},
            "study.prepare.a.cache.k=0: must be a number >= 1",
        ),
        ({"arm": {}}, "study.arm: unknown key (did you mean study.arms?)"),
        ({"question": None}, "study.question: found None (NoneType); must be a string"),
    ],
)
def test_a_bad_study_is_refused(study_of: StudyOf, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        study_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"dense": {"model.dense_twn": True}, "moe": {}}},
            "study.arms.dense.model.dense_twn: the run config has no such key (did you mean model.dense_twin?)",
        ),
        ({"arms": {"dense": {"model.moe.top_k": 5}}}, "study.arms.dense: model.moe.top_k=5: must be 1 to"),
        ({"arms": {"dense": {"training.steps": "many"}}}, "study.arms.dense: training.steps: found 'many' (str)"),
        (
            {"axes": {"experts": {"values": {"2": {"model.experts": 2}}}}},
            "study.axes.experts.values.2.model.experts: the run config has no such key",
        ),
        (
            {"axes": {"experts": {"values": {"0": {"model.moe.num_experts": 0}}}}},
            "study.arms.dense at experts=0: model.moe.num_experts=0",
        ),
        (
            {"variants": {"hot": {"arm": "dense", "overrides": {"evaluation_options.needle.window": 8}}}},
            "study.variants.hot.overrides.evaluation_options.needle.window: the study has no such key",
        ),
        (
            {"variants": {"hot": {"arm": "dense", "overrides": {"model.dim": -1}}}},
            "study.variants.hot: model.dim=-1: must be a number > 0",
        ),
        ({"evaluations": ["moesaic.nothing.here"]}, "study.evaluations='moesaic.nothing.here' cannot be imported"),
        ({"evaluations": ["moesaic.__doc__"]}, "study.evaluations: 'moesaic.__doc__' is not a function"),
        ({"tune": {"seed": 9, "keys": ["optimizer.rate"]}}, "study.tune.keys: 'optimizer.rate' is no number"),
        (
            {"prepare": {"a": {"train": {"model.depth": 1}}}},
            "study.prepare.a.train.model.depth: the run config has no such key",
        ),
        ({"prepare": {"a": {"train": {"model.dim": -1}}}}, "study.prepare.a: model.dim=-1: must be"),
        (
            {"prepare": {"a": {"train": {}}}, "arms": {"dense": {"distillation": frozen("b")}}},
            "study.arms.dense: distillation.teacher='prepared:b': must here be one of prepared:a",
        ),
        (
            {"prepare": {"a": {"train": {}}}, "arms": {"dense": {"distillation": cached("a")}}},
            "study.arms.dense: distillation.cache='prepared:a': must here be one of nothing is prepared for it",
        ),
        (
            {"arms": {"dense": {"distillation": {"source": "joint", "teacher_model": {"dim": 0}}}}},
            "study.arms.dense: distillation.teacher_model.dim=0: must be",
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused_first_and_by_name(
    study_of: StudyOf, base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    study = study_of(**changes)
    with pytest.raises(InputError, match=re.escape(message)):
        validate(study, base)


def test_runs_of_several_processes_are_refused(study_of: StudyOf, base: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"trainer\.devices=2: a run of a study is one process, not 2; must be 1"):
        validate(study_of(), {**base, "trainer": {"devices": 2}})


def test_a_good_study_is_not_refused(study_of: StudyOf, base: dict[str, Any]) -> None:
    validate(study_of(evaluations=["moesaic.config.flatten"]), base)
    with pytest.raises(InputError, match=r"workers=100000000 runs at a time, each \(weights .*or fewer workers"):
        validate(study_of(), base, workers=10**8)


def test_overrides_leave_the_original_alone(base: dict[str, Any]) -> None:
    changed = apply_overrides(base, {"model.moe.num_experts": 9, "seed": 3}, "here")
    assert (changed["model"]["moe"]["num_experts"], changed["seed"]) == (9, 3)
    assert (base["model"]["moe"]["num_experts"], base["seed"]) == (4, 0)


def test_the_hash_knows_what_a_run_computes_and_not_where(base: dict[str, Any]) -> None:
    first = config_hash(base)
    for key, value in {"name": "other", "trainer.threads": 3, "data.cache_dir": "elsewhere"}.items():
        section = base
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    assert config_hash(base) == first
    base["training"]["accumulate"] = 1  # as by default
    assert config_hash(base) == first
    assert config_hash({**base, "finish": "score"}) == first
    assert "training.score_windows" not in canonical(base), "at its default, hashes of older rows hold"
    assert config_hash({**base, "training": {**base["training"], "score_windows": 64}}) != first
    for key, value in {"training.steps": 5, "seed": 1, "model.dense_twin": True}.items():
        assert config_hash(apply_overrides(base, {key: value}, "")) != first, key
    assert canonical(base)["model.moe.top_k"] == 1, "defaults are filled in"


def loss_with_best_at(best: float) -> Callable[[Job], float]:
    return lambda job: 1.0 + abs(job.factor - best)


@pytest.mark.parametrize(
    ("best", "tried", "at_edge"),
    [
        (1.0, (0.5, 1.0, 2.0), False),
        (4.0, (0.5, 1.0, 2.0, 4.0, 8.0), False),
        (2.0, (0.5, 1.0, 2.0, 4.0), False),
        (0.125, (0.125, 0.25, 0.5, 1.0, 2.0), True),
        (64.0, (0.5, 1.0, 2.0, 4.0, 8.0), True),
    ],
)
def test_the_grid_is_extended_at_most_twice(
    study_of: StudyOf,
    base: dict[str, Any],
    run_all: Callable[..., Any],
    best: float,
    tried: tuple[float],
    at_edge: bool,
) -> None:
    study = study_of()
    rows = run_all(study, base, loss_with_best_at(best))
    for cell in study.cells:
        found = tuning(study, cell, rows)
        assert found.factors == tried
        assert found.best == min(tried, key=lambda factor: abs(factor - best))
        assert found.at_edge == at_edge
    measured = [row for row in rows.values() if row["purpose"] == "measure"]
    assert {row["factor"] for row in measured} == {found.best}
    assert all(row["overrides"]["optimizer.learning_rate"] == 0.01 * found.best for row in measured)
    assert all(row["overrides"]["optimizer.muon_learning_rate"] == 0.001 * found.best for row in measured)
    assert {row["seed"] for row in rows.values() if row["purpose"] == "tune"} == {9}


def test_diverged_runs_lose_the_tuning(study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any]) -> None:
    study = study_of()
    rows = run_all(study, base, lambda job: None if job.factor >= 1 else 1.0 - job.factor)
    found = tuning(study, study.cells[0], rows)
    assert found.factors == (0.25, 0.5, 1.0, 2.0)
    assert (found.best, found.at_edge) == (0.5, False)


def test_of_equal_rates_the_middle_is_taken(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any]
) -> None:
    study = study_of()
    for losses, best in (({0.5: 1, 1: 1, 2: 1}, 1), ({0.5: 1, 1: 1, 2: 2}, 1), ({0.5: 2, 1: 1, 2: 1, 4: 1}, 2)):
        rows = run_all(study, base, lambda job, losses=losses: float(losses.get(job.factor, 9)))
        assert tuning(study, study.cells[0], rows).best == best
    rows = run_all(study, base, lambda job: None)  # nothing but lower ones may help
    found = tuning(study, study.cells[0], rows)
    assert found.factors == (0.125, 0.25, 0.5, 1.0, 2.0)
    assert found.failed and found.best is None
    assert {row["purpose"] for row in rows.values()} == {"tune"}, "nothing is measured at a rate that does not hold"
    assert plan(study, base, rows).missing == [] and not plan(study, base, rows).may_grow


def test_higher_may_be_better(study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any]) -> None:
    study = study_of(higher_is_better=True)
    rows = run_all(study, base, lambda job: -abs(job.factor - 1))
    assert tuning(study, study.cells[0], rows).best == 1.0
    row = next(iter(rows.values()))
    assert score(study, {**row, "metrics": {"validation/bits_per_byte": 2.0}}) == -2.0


def test_without_tuning_there_are_only_measured_runs(study_of: StudyOf, base: dict[str, Any]) -> None:
    study = study_of(tune=None)
    todo = plan(study, base, {})
    assert [job.key for job in todo.missing[:2]] == [
        "dense, measure, seed 0, learning rate x1",
        "dense, measure, seed 1, learning rate x1",
    ]
    assert (todo.done, todo.total) == (0, 6)
    assert todo.missing[0].overrides == {"model.dense_twin": True, "seed": 0}


def test_tuning_comes_first_and_decides(study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any]) -> None:
    study = study_of()
    todo = plan(study, base, {})
    assert {job.purpose for job in todo.missing} == {"tune"}
    assert (len(todo.missing), todo.done, todo.total) == (6, 0, 12)
    rows = run_all(study, base, loss_with_best_at(1.0))
    assert plan(study, base, rows).missing == []
    del rows["moe, measure, seed 1, learning rate x1"]
    todo = plan(study, base, rows)
    assert [job.key for job in todo.missing] == ["moe, measure, seed 1, learning rate x1"]
    assert (todo.done, todo.total) == (11, 12)


def test_a_run_is_missing_until_its_variants_are_there(
    study_of: StudyOf, base: dict[str, Any], row_of: Callable[..., Any]
) -> None:
    variants = {"hot": {"arm": "moe", "overrides": {"model.norm_eps": 0.1}}}
    study = study_of(tune=None, seeds=[0], variants=variants, arms={"dense": {}, "moe": {}})
    _, job = plan(study, base, {}).missing
    rows = {job.key: row_of(job, 1.0)}
    assert [found.arm for found in plan(study, base, rows).missing] == ["dense", "moe"]
    diverged = {job.key: row_of(job, 1.0, "diverged")}
    assert [found.arm for found in plan(study, base, diverged).missing] == ["dense"]
    rows["hot, variant, seed 0, learning rate x1"] = row_of(job, 2.0)
    assert [found.arm for found in plan(study, base, rows).missing] == ["dense"]


def test_where_arm_and_axis_set_the_same_key_the_arm_wins(study_of: StudyOf) -> None:
    study = study_of(
        arms={"dense": {"seed": 1}, "moe": {}}, axes={"x": {"values": {"a": {"seed": 2, "training.steps": 3}}}}
    )
    assert study.cells == [
        Cell("dense", "x=a", {"seed": 1, "training.steps": 3}),
        Cell("moe", "x=a", {"seed": 2, "training.steps": 3}),
    ]


def missing_of(study: StudyConfig, base: dict[str, Any], rows: dict[str, Any], prepared: tuple[str, ...]) -> list[str]:
    return [job.arm for job in plan(study, base, rows, prepared).missing]


def test_what_is_missing_waits_for_what_it_needs_and_only_that_is_prepared(
    study_of: StudyOf, base: dict[str, Any], row_of: Callable[..., Any]
) -> None:
    study = study_of(**PREPARED)
    rows: dict[str, Any] = {}

    def add(*names: str) -> None:
        for job in plan(study, base, rows, tuple(study.prepare)).missing:
            rows.update({job.key: row_of(job, 1.0)} if job.arm in names else {})

    assert missing_of(study, base, rows, ()) == ["teacher", "other", "plain"], "the others would have no teacher"
    assert (plan(study, base, rows).done, plan(study, base, rows).total) == (0, 7)
    add("teacher")
    assert missing_of(study, base, rows, ("teacher",)) == ["few", "other", "plain", "frozen"]
    assert plan(study, base, rows, ("teacher",)).done == 1
    assert missing_of(study, base, rows, ()) == ["teacher", "other", "plain"], "its row is there, its file is not"
    add("few", "other", "plain", "frozen")
    assert missing_of(study, base, rows, ("teacher", "other", "few")) == ["cached", "third"]
    assert missing_of(study, base, rows, ("other", "few")) == ["cached", "third"], "the cache needs no teacher any more"
    assert missing_of(study, base, rows, ("other",)) == ["teacher", "third"], "for the cache"
    add("cached", "third")
    assert missing_of(study, base, rows, ()) == []
    assert (plan(study, base, rows).done, plan(study, base, rows).total) == (7, 7)


def test_what_is_prepared_has_the_seed_of_tuning(study_of: StudyOf, base: dict[str, Any]) -> None:
    study = study_of(**{**PREPARED, "tune": {"seed": 9}})
    assert prepare_job(study, base, "teacher").overrides == {"model.dim": 32, "seed": 9}
    few = prepare_job(study, base, "few")
    assert few.overrides == {
        **{"cache.kind": "top_k", "cache.temperature": 1.0, "cache.k": 32, "cache.teacher": "prepared:teacher"}
    }
    assert few.key == "few, prepare, seed 9, learning rate x1"
    validate(study, base)


def test_another_teacher_means_another_run_below_the_same_config(study_of: StudyOf, base: dict[str, Any]) -> None:
    study = study_of(**PREPARED)
    prepare = {**PREPARED["prepare"], "teacher": {"train": {"model.dim": 64}}}
    other = study_of(**{**PREPARED, "prepare": prepare})
    for arm, changes in {"plain": False, "frozen": True, "cached": True, "third": False}.items():
        job = job_of(study, base, study.cell(arm, None), "measure", 0, 1.0)
        assert job_hash(study, base, job) == job_hash(other, base, job)
        assert (fingerprint(study, base, job) != fingerprint(other, base, job)) == changes, arm
        assert (fingerprint(study, base, job) == job_hash(study, base, job)) == (arm == "plain")


def test_placeholders_become_paths_wherever_they_stand() -> None:
    config = {"a": {"b": ["prepared:x", 1]}, "c": "prepared:y y", "d": "not prepared:x", "e": None}
    assert prepared_names(config) == ["x", "y y"]
    paths = {"x": Path("there/x"), "y y": Path("y")}
    assert resolve(config, paths) == {"a": {"b": ["there/x", 1]}, "c": "y", "d": "not prepared:x", "e": None}


def test_tuned_at_the_first_value_the_others_take_its_factor(
    base: dict[str, Any], study_of: Callable[..., StudyConfig], row_of: Callable[..., Row]
) -> None:
    values = {"small": {"training.steps": 4}, "large": {"training.steps": 8}}
    study = study_of(tune={"seed": 9, "at": "first"}, axes={"size": {"values": values}})
    first = plan(study, base, {})
    assert {(job.axis, job.purpose) for job in first.missing} == {("size=small", "tune")}
    assert first.total == 2 * 3 + 2 * 2 * 3
    rows = {job.key: row_of(job, abs(job.factor - 1.0)) for job in first.missing}
    then = plan(study, base, rows)
    assert {(job.axis, job.purpose, job.factor) for job in then.missing} == {
        ("size=small", "measure", 1.0),
        ("size=large", "measure", 1.0),
    }
    large = next(job for job in then.missing if job.axis == "size=large")
    assert large.overrides["training.steps"] == 8
    assert large.overrides["optimizer.learning_rate"] == base["optimizer"]["learning_rate"]


def test_an_arm_may_have_keys_of_its_own_at_a_value(study_of: Callable[..., StudyConfig]) -> None:
    axis = {"values": {"a": {"training.steps": 4}, "b": {}}, "of_arm": {"moe": {"a": {"model.hidden_dim": 48}}}}
    study = study_of(axes={"size": axis})
    assert study.cell("moe", ("size", "a")).overrides == {"training.steps": 4, "model.hidden_dim": 48}
    assert study.cell("dense", ("size", "a")).overrides == {"training.steps": 4, "model.dense_twin": True}
    for wrong, said in (
        ({"sparse": {}}, "unknown arm 'sparse'"),
        ({"moe": {"c": {}}}, "unknown value 'c'; must be one of a, b"),
    ):
        with pytest.raises(InputError, match=said):
            study_of(axes={"size": {**axis, "of_arm": wrong}})
