"""What a reader gets: table, verdicts, notes, numbers and plots, from rows alone."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moesaic.errors import InputError
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import Job, row_key
from moesaic.studies.moving import moved_rates, plot_rates
from moesaic.studies.plots import plot_by_position, plot_curves, plot_effects, plot_parameters, total_flops
from moesaic.studies.report import write_study_report
from moesaic.studies.results import summarize_study

StudyOf = Callable[..., StudyConfig]


def loss(job: Job) -> float | None:
    if job.arm == "moe" and job.factor == 2.0:
        return None
    return 2.0 + 0.1 * job.seed + abs(job.factor - 0.1) - (0.2 if job.arm == "moe" else 0) + 0.001 * job.seed**2


def report(study: StudyConfig, base: dict[str, Any], rows: dict[str, Any], out: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    write_study_report(study, base, rows, out, "the command", console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn_by_position(
    study: StudyConfig, rows: dict[str, Any]
) -> dict[str, tuple[list[float], list[float], tuple[float, float]]]:
    """Positions, means over the seeds, and the ends of the band of each arm as trained, at a length of 16 tokens."""
    figure = plot_by_position(study, summarize_study(study, rows), 16)
    assert figure is not None
    panel = figure.axes[0]
    curves = [line for line in panel.lines if line.get_marker() == "o"]
    found = {}
    for line, band in zip(curves, panel.collections, strict=True):
        values = [y for x, y in band.get_paths()[0].vertices]
        found[str(line.get_label())] = (
            [float(x) for x in line.get_xdata()],
            [float(y) for y in line.get_ydata()],
            (min(values), max(values)),
        )
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("with_pictures")
def test_everything_is_written(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(also=["router/*/load"])
    printed = report(study, base, run_all(study, base, loss), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "**Question.** Is it better?" in table
    assert "**Command.** `the command`" in table
    assert "| arm | seeds | mean ± 95% | difference [95%] |" in table
    assert "| moe | 3 of 3 | 1.9267 ± " in table
    assert "-0.2000 [-0.2000, -0.2000] | 0.00125 (x0.125)† |" in table
    assert "- moe is better than dense by 0.2000 [0.2000, 0.2000] (3 pairs)" in table
    assert "† the best learning rate is at the edge of what was tried" in table
    assert "- diverged: moe, tune, seed 9, learning rate x2: the loss is nan" in table
    assert "moe is better than dense by 0.2000" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is True
    dense, moe = summary["results"]
    assert dense["difference"] is None
    assert moe["difference"]["mean"] == pytest.approx(-0.2)
    assert moe["factor_at_edge"] is True
    assert summary["cpu_seconds"] == 16 * 40
    for name in ("effect.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_interval_and_says_so(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(seeds=[0])
    printed = report(study, base, run_all(study, base, loss), tmp_path)
    assert "One seed: no interval." in printed
    assert "moe minus dense is -0.2000 on one seed: no interval, no verdict" in printed
    assert "-0.2000 (n=1)" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["results"][1]["difference"]["low"] is None


def test_unfinished_and_diverged_studies_are_reported_too(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of()
    whole = run_all(study, base, loss)
    printed = report(study, base, dict(list(whole.items())[:2]), tmp_path)
    assert "missing: moe, seed 0, 1, 2" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is False
    assert not (tmp_path / "effect.png").exists()
    broken = study_of(tune=None)
    printed = report(broken, base, run_all(broken, base, lambda job: None), tmp_path)
    assert "moe against dense: no pair of finished runs, no verdict; moe: 3 of 3 runs diverged" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("with_pictures")
def test_axes_and_variants_are_drawn(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], row_of: Callable[..., Any], tmp_path: Path
) -> None:
    values = {"2": {"model.moe.num_experts": 2}, "8": {"model.moe.num_experts": 8}}
    study = study_of(
        tune=None,
        axes={"experts": {"values": values, "fixed": ["dense"]}},
        variants={"hot": {"arm": "moe", "overrides": {"model.norm_eps": 0.1}}},
    )
    trained = study_of(tune=None, axes={"experts": {"values": values, "fixed": ["dense"]}})
    rows = run_all(trained, base, loss)
    for row in rows.values():
        row["metrics"]["parameters/total"] = {None: 100, "experts=2": 100, "experts=8": 400}[row["axis"]]
    for key, row in list(rows.items()):
        if row["arm"] == "moe":
            new = key.replace("moe", "hot").replace("measure", "variant")
            rows[new] = {**row, "arm": "hot", "purpose": "variant", "curve": {}}
    printed = report(study, base, rows, tmp_path)
    assert "hot (experts=8)" in printed
    assert "moe at experts=2 is better than dense by 0.2000" in printed
    assert "no correction for 6 comparisons" in printed, "two of them of hot to moe, its own arm"
    assert (tmp_path / "effect.png").stat().st_size > 5000
    assert (tmp_path / "parameters.png").stat().st_size > 5000
    figure = plot_parameters(study, summarize_study(study, rows))
    assert figure is not None
    sizes = sorted(x for line in figure.axes[0].lines for x in line.get_xdata())
    assert sizes == [100, 100, 400], "dense, moe at 2 and at 8 experts; what was switched has no size"
    assert not (tmp_path / "by_position.png").exists()


def test_what_a_study_no_longer_has_is_no_longer_drawn(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(tune=None)
    report(study, base, run_all(study, base, loss), tmp_path)
    alone = study_of(tune=None, arms={"dense": {}})
    report(alone, base, run_all(alone, base, loss), tmp_path)
    assert not (tmp_path / "effect.png").exists()
    assert "effect.png" not in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_the_variant_of_a_diverged_run_is_not_missing(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(tune=None, variants={"hot": {"arm": "moe", "overrides": {"model.norm_eps": 0.1}}})
    made = run_all(study_of(tune=None), base, lambda job: None if job.arm == "moe" else 1.0)
    printed = report(study, base, made, tmp_path)
    assert "missing" not in printed
    assert "hot: 3 of 3 runs diverged and count in no mean" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["complete"] is True


def test_fewer_seeds_than_have_rows_hide_none(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    rows = run_all(study_of(), base, loss)
    report(study_of(seeds=[1]), base, rows, tmp_path)
    assert "| moe | 3 of 3 | 1.9267 ± " in (tmp_path / "table.md").read_text()


def test_seconds_of_several_processors_are_not_compared(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(tune=None)
    rows = run_all(study, base, loss)
    for other, said in (("AVX2", False), ("AVX512", True)):
        for row in rows.values():
            row["processor"] = other if row["arm"] == "moe" else "AVX2"
        printed = report(study, base, rows, tmp_path)
        figure = plot_curves(study, summarize_study(study, rows))
        assert figure is not None
        drawn = [panel.get_title() for panel in figure.axes]
        assert ("Seconds of arms cannot be compared: processors with AVX2 and with AVX512." in printed) == said
        assert drawn == ["over tokens", *([] if said else ["over training seconds"]), "over active FLOPs"]


def test_models_of_one_size_are_not_drawn_over_parameters(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(tune=None)
    rows = run_all(study, base, loss)
    for size in (1000, 1011):
        for row in rows.values():
            row["metrics"]["parameters/total"] = size if row["arm"] == "moe" else 1000
        report(study, base, rows, tmp_path)
        assert (tmp_path / "parameters.png").exists() == (size == 1011)


@pytest.mark.usefixtures("with_pictures")
@pytest.mark.slow
def test_a_switch_is_compared_with_its_own_arm_and_drawn_by_position(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    """What the buckets of the loss by position hold is made up: seed 0, 1, 2 and 0.5 less for what is switched."""
    study = study_of(tune=None, variants={"hot": {"arm": "moe", "overrides": {"model.norm_eps": 0.1}}})
    rows = run_all(study_of(tune=None), base, loss)
    for key, row in list(rows.items()):
        row["metrics"] |= {f"loss_by_position/as_trained/loss/{a}-{a + 4}": 1.0 + row["seed"] for a in (0, 4, 8)}
        if row["arm"] == "moe":
            value = row["metrics"]["validation/bits_per_byte"] - 0.5 - 0.01 * row["seed"]
            hot = {**row["metrics"], "validation/bits_per_byte": value}
            new = key.replace("moe", "hot").replace("measure", "variant")
            rows[new] = {**row, "arm": "hot", "purpose": "variant", "curve": {}, "metrics": hot}
    printed = report(study, base, rows, tmp_path)
    assert (
        "- hot is better than moe by 0.5100 [0.4852, 0.5348] (3 pairs); hot is better than dense by 0.7100" in printed
    )
    table = (tmp_path / "table.md").read_text()
    assert "| to its own arm [95%] |" in table
    assert "-0.5100 [-0.5348, -0.4852]" in table
    hot = json.loads((tmp_path / "summary.json").read_text())["results"][-1]
    assert hot["to_its_own_arm"]["mean"] == pytest.approx(-0.51)
    assert "(by_position.png)" in table
    assert (tmp_path / "by_position.png").stat().st_size > 5000
    drawn = drawn_by_position(study, rows)["moe"]
    assert drawn[0] == pytest.approx([32**0.5, 96**0.5])
    assert drawn[1:] == ([2.0] * 2, (1.0, 3.0))
    for seed in (0, 1):  # a run that diverged has no buckets
        key = next(key for key, row in rows.items() if row["arm"] == "moe" and row["seed"] == seed)
        rows[key] |= {"status": "diverged", "metrics": {}}
        left = [s + 1.0 for s in range(seed + 1, 3)]
        assert drawn_by_position(study, rows)["moe"][1:] == ([sum(left) / len(left)] * 2, (min(left), max(left)))
    assert "moe: 2 of 3 runs diverged" in report(study, base, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("with_pictures")
def test_the_teachers_flops_are_counted(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of(
        tune=None,
        baseline="plain",
        prepare={"teacher": {"train": {}}, "few": {"cache": {"teacher": "teacher"}}},
        arms={
            "plain": {},
            "frozen": {"distillation": {"source": "frozen", "teacher": "prepared:teacher"}},
            "joint": {"distillation": {"source": "joint"}},
            "cached": {"distillation": {"source": "cached", "cache": "prepared:few"}},
        },
    )
    rows = run_all(study, base, loss)
    flops = {"plain": {}, "frozen": {"teacher_flops": 20.0}, "joint": {"teacher_flops": 60.0}}
    flops |= {"cached": {"teacher_flops": 0.0}, "teacher": {"active_flops": 1000.0}, "few": {"teacher_flops": 50.0}}
    for row in rows.values():
        row["metrics"] |= {**({} if row["arm"] == "few" else {"active_flops": 100.0}), **flops[row["arm"]]}
        if row["arm"] in ("frozen", "joint"):
            row["curve"]["teacher_flops"] = [1, 2]
    arms = summarize_study(study, rows)
    expected = {  # passes, and training, shared by ten
        **{"plain": (100, 100, 100), "frozen": (120, 1120, 100 + 20 + 100)},
        **{"joint": (160, 160, 100 + 6), "cached": (150, 1150, 100 + 5 + 100)},
    }
    for arm in arms:
        found = [
            total_flops(base, arm, rows, training=training, students=students)
            for training, students in ((False, 1), (True, 1), (True, 10))
        ]
        assert found == pytest.approx(expected[arm.arm]), arm.arm
    report(study, base, rows, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "- prepared: teacher in 40 CPU s (2.9000 bits per byte, 1e+03 FLOPs)" in table
    assert (tmp_path / "total_flops.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text())["prepared"] == {"teacher": 40.0, "few": 40.0}
    lacking = {key: row for key, row in rows.items() if row["arm"] != "teacher"}
    assert math.isnan(total_flops(base, summarize_study(study, lacking)[1], lacking, training=True, students=1))


def test_without_teachers_there_is_no_plot_of_their_flops(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of()
    report(study, base, run_all(study, base, loss), tmp_path)
    assert not (tmp_path / "total_flops.png").exists()


def test_a_mark_follows_its_arm_everywhere(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    variants = {"moe, cold": {"arm": "moe", "overrides": {"model.norm_eps": 0.1}}}
    study = study_of(marks={"moe": "sees later tokens"}, variants=variants)
    rows = run_all(study_of(), base, lambda job: loss(job) or 9.0)
    for row in list(rows.values()):
        if row["arm"] == "moe" and row["purpose"] == "measure":
            made = {**row, "arm": "moe, cold", "purpose": "variant"}
            rows[row_key(made)] = made
    printed = report(study, base, rows, tmp_path)
    table = (tmp_path / "table.md").read_text()
    named = "moe (sees later tokens)"
    assert f"| {named} |" in table
    assert "| moe, cold (sees later tokens) |" in table
    assert f"- {named} is " in table
    assert f"- {named} is " in printed
    assert "moe is " not in table
    marks = {each["arm"]: each.get("mark") for each in json.loads((tmp_path / "summary.json").read_text())["results"]}
    assert marks == {"dense": None, "moe": "sees later tokens", "moe, cold": "sees later tokens"}
    effects = plot_effects(study, summarize_study(study, rows))
    assert effects is not None
    assert [label.get_text() for label in effects.axes[0].get_yticklabels()] == [named, "moe, cold (sees later tokens)"]
    curves = plot_curves(study, summarize_study(study, rows))
    assert curves is not None
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["dense", named]
    baseline = study_of(marks={"dense": "leaks"})
    assert "than dense (leaks) by" in summarize_study(baseline, rows)[1].verdict

    marked = {key: {**row, "mark": "leaks"} if row["arm"] == "moe" else row for key, row in rows.items()}
    assert (
        "| moe (leaks) |"
        in report(study_of(variants=variants), base, marked, tmp_path) + (tmp_path / "table.md").read_text()
    ), "rows keep their mark, whatever the study says later"


def test_a_sample_of_windows_is_named_with_every_score(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    study = study_of()
    rows = run_all(study, base, loss)
    for row in rows.values():
        row["metrics"] |= {"validation/windows": 64, "validation/windows_in_split": 1234}
    printed = " ".join(report(study, base, rows, tmp_path).split())
    table = (tmp_path / "table.md").read_text()
    assert "validation/bits_per_byte on 64 of 1,234 windows, lower is better" in printed
    assert "validation/bits_per_byte on 64 of 1,234 windows, lower is better:" in table
    assert "- Scores are on 64 of 1,234 windows of the validation split, drawn with a fixed seed" in table
    effects = plot_effects(study, summarize_study(study, rows))
    assert effects is not None
    assert effects.axes[0].get_xlabel() == "validation/bits_per_byte on 64 of 1,234 windows\n(lower is better)"


WIDTHS = {"width": {"values": {"32": {}, "64": {"model.dim": 64, "model.moe.hidden_dim": 64}}}}


def test_a_rate_that_is_moved_along_an_axis_is_measured_and_its_cost_told(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    """The best factor of the dense arm halves with the width, where its first one costs 0.5 of 2 bits; moe's stays."""
    study = study_of(tune={"seed": 9, "factors": [0.25, 0.5, 1.0, 2.0, 4.0], "at": "both"}, axes=WIDTHS)

    def lost(job: Job) -> float:
        best = 2.0 if job.arm == "moe" or job.axis == "width=32" else 1.0
        return 2.0 + abs(job.factor - best) / 2

    rows = run_all(study, base, lost)
    measured = {(row["arm"], row["axis"], row["factor"]) for row in rows.values() if row["purpose"] == "measure"}
    assert {factor for arm, axis, factor in measured if (arm, axis) == ("dense", "width=64")} == {1.0, 2.0}
    assert len(measured) == 5
    dense, moe = moved_rates(study, rows)
    assert (dense.best, dense.moved, dense.cost.mean, dense.cost.n) == (1.0, 2.0, 25.0, 3)
    assert (moe.best, moe.moved, moe.cost.mean) == (2.0, 2.0, 0.0)
    printed = report(study, base, rows, tmp_path)
    assert "dense at width=64: x1 is best, and x2 at width=32; the latter costs 25.00% [25.00, 25.00] here" in printed
    assert "moe at width=64: x2 is best, as at width=32" in printed
    assert "rates.png" in (tmp_path / "table.md").read_text()
    assert len(json.loads((tmp_path / "summary.json").read_text())["moved_rates"]) == 2


def test_a_moved_rate_at_which_runs_diverge_is_told(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any]
) -> None:
    study = study_of(tune={"seed": 9, "factors": [0.5, 1.0, 2.0, 4.0], "at": "both"}, axes=WIDTHS)

    def lost(job: Job) -> float | None:
        wide = job.axis == "width=64"
        return None if wide and job.factor == 2.0 else 2.0 + abs(job.factor - (1.0 if wide else 2.0))

    dense, _ = moved_rates(study, run_all(study, base, lost))
    assert dense.diverged == 3
    assert dense.sentence == "dense at width=64: x1 is best, and x2 at width=32; 3 runs at the latter diverged"


def test_curves_over_rates_have_a_line_for_each_value(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any]
) -> None:
    study = study_of(tune={"seed": 9, "factors": [0.5, 1.0, 2.0], "at": "both"}, axes=WIDTHS)
    figure = plot_rates(study, run_all(study, base, lambda job: 2.0 + abs(job.factor - 1.0)))
    assert figure is not None
    lines = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("width")]
    assert [line.get_label() for line in lines] == ["width 32", "width 64"]
    assert [list(map(float, line.get_ydata())) for line in lines] == [[2.5, 2.0, 3.0]] * 2
    assert plot_rates(study_of(axes=WIDTHS), {}) is None


@pytest.mark.usefixtures("with_pictures")
def test_another_metric_is_judged_against_an_arm_of_its_own(
    study_of: StudyOf, base: dict[str, Any], run_all: Callable[..., Any], tmp_path: Path
) -> None:
    arms = {"text": {}, "pairs": {"seed": 1}, "both": {"seed": 2}}
    study = study_of(arms=arms, baseline="text", tune=None, variants={}, judged={"names": "pairs"})
    rows = run_all(study, base, lambda job: 2.0 + 0.1 * job.seed)
    for row in rows.values():
        if row["arm"] != "text":
            row["metrics"]["names"] = 0.5 + 0.1 * row["seed"] + (0.02 if row["arm"] == "both" else 0)
    printed = report(study, base, rows, tmp_path)
    assert "- names: both is worse than pairs by 0.0200 [0.0200, 0.0200] (3 pairs)\n" in printed
    assert "names: text" not in printed  # it has none
    assert "names: both is worse" in (tmp_path / "table.md").read_text()
    (stored,) = json.loads((tmp_path / "summary.json").read_text())["judged"]
    assert (stored["metric"], stored["arm"], round(stored["difference"]["mean"], 9)) == ("names", "both", 0.02)


def test_a_metric_is_judged_against_an_arm_that_exists(study_of: StudyOf) -> None:
    with pytest.raises(InputError, match=r"judged.names: unknown arm 'pears'; must be one of dense, moe"):
        study_of(judged={"names": "pears"})
