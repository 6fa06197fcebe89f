"""Plots are drawn for every shape of input that runs produce."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from moesaic.evaluation.plots import (
    plot_curves,
    plot_drift,
    plot_expert_load,
    plot_loss,
    plot_loss_by_position,
    read_columns,
)
from moesaic.evaluation.plotting import draw_by_layer, new_card


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, instead of files."""
    found: list[Figure] = []
    monkeypatch.setattr("moesaic.evaluation.plots.save_figure", lambda figure, out: found.append(figure))
    return found


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def metrics(path: Path, rows: int, bits: bool = True) -> Path:
    lines = ["step,train/loss,validation/loss,validation/bits_per_byte"]
    for i in range(1, rows + 1):
        lines.append(f"{i},{5 / i},,")
        if i % 5 == 0 or i == rows:
            lines.append(f"{i},,{4 / i},{3 / i if bits else ''}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow_but_for("False-7")
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("bits", [True, False])
def test_loss(tmp_path: Path, rows: int, bits: bool) -> None:
    baselines = {"byte unigram": 4.5, "gzip -9": 1.9, "xz -9e": 1.6}
    plot_loss(metrics(tmp_path / "m.csv", rows, bits), tmp_path / "plots" / "loss.png", baselines, final=0.1)
    assert is_png(tmp_path / "plots" / "loss.png")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"], "no temporary file is left"


@pytest.mark.slow_but_for("2-8-30")
@pytest.mark.parametrize(("layers", "experts", "steps"), [(1, 2, 1), (2, 8, 30), (24, 16, 5)])
def test_expert_load(tmp_path: Path, layers: int, experts: int, steps: int) -> None:
    lines = ["step,layer,expert,load"]
    for step in range(1, steps + 1):
        lines += [f"{step},layers.{j}.ffn,{e},{e / experts * 2}" for j in range(layers) for e in range(experts)]
    (tmp_path / "routing.csv").write_text("\n".join(lines) + "\n")
    assert plot_expert_load(tmp_path / "routing.csv", tmp_path / "load.png")
    assert is_png(tmp_path / "load.png")


def test_expert_load_of_a_dense_model_is_no_plot(tmp_path: Path) -> None:
    (tmp_path / "routing.csv").write_text("step,layer,expert,load\n")
    assert not plot_expert_load(tmp_path / "routing.csv", tmp_path / "load.png")
    assert not (tmp_path / "load.png").exists()


@pytest.mark.slow_but_for("1-1")
@pytest.mark.parametrize(("layers", "checks"), [(1, 1), (2, 30), (24, 5)])
def test_drift(tmp_path: Path, layers: int, checks: int) -> None:
    names = [f"router/layers.{j}.ffn/drift" for j in range(layers)]
    lines = [",".join(["step", "train/loss", *names])]
    for i in range(1, checks + 1):
        lines += [f"{i},1{',' * layers}", ",".join([str(i), "", *(str(j / layers / i) for j in range(layers))])]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    assert plot_drift(tmp_path / "m.csv", tmp_path / "drift.png")
    assert is_png(tmp_path / "drift.png")


def test_drift_before_the_second_check_is_no_plot(tmp_path: Path) -> None:
    assert not plot_drift(metrics(tmp_path / "m.csv", 7), tmp_path / "drift.png")
    assert not (tmp_path / "drift.png").exists()


@pytest.mark.slow_but_for("1-1-None")
@pytest.mark.parametrize(("length", "train", "chunk"), [(1, 1, None), (64, 64, 16), (1000, 256, 128)])
def test_loss_by_position(tmp_path: Path, length: int, train: int, chunk: int | None) -> None:
    plot_loss_by_position((5 / np.arange(1, length + 1)).tolist(), tmp_path / "p.png", train, chunk)
    assert is_png(tmp_path / "p.png")


@pytest.mark.slow
def test_curves_of_several_arms_and_seeds(tmp_path: Path) -> None:
    def seed(n: int, offset: float) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        x = np.arange(1, n + 1.0)
        return {"step": x, "tokens": x * 1e3, "active_flops": x * 1e12, "seconds": x / 3, "m": offset + 1 / x}

    plot_curves({"it": {"a": [seed(5, 0), seed(4, 0.1)], "b": [seed(5, 1)]}}, tmp_path / "c.png", "m")
    assert is_png(tmp_path / "c.png")
    plot_curves({}, tmp_path / "none.png", "m")


def test_no_panel_has_more_lines_than_colors(tmp_path: Path, figures: list[Figure]) -> None:
    x = np.arange(1, 9.0)
    curve = {"step": x, "tokens": x, "active_flops": x, "seconds": x, "m": 1 / x}
    plot_curves({"first": {f"arm {i}": [curve] for i in range(12)}, "second": {"b": [curve]}}, tmp_path / "c.png", "m")
    lines = [len(axis.lines) for axis in figures[0].axes]
    assert lines == [7] * 4 + [5] * 4 + [1] * 4, "two rows of panels for twelve arms"
    assert [axis.get_title() for axis in figures[0].axes[::4]] == [
        f"{n}: over steps" for n in ("first", "first", "second")
    ]
    for layers, in_lines in ((7, 7), (48, 0)):
        figure, axis = new_card()
        draw_by_layer(axis, {f"layers.{i}": (x, 1 / x) for i in range(layers)}, "share, %")
        assert len(axis.lines) == in_lines
        assert "share, %" in [each.get_ylabel() for each in figure.axes]


def test_columns_keep_only_complete_rows(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("step,a,b\n1,2,\n2,,3\n3,4,5\n")
    steps, a, b = read_columns(tmp_path / "m.csv", "step", "a", "b")
    assert (steps.tolist(), a.tolist(), b.tolist()) == ([3], [4], [5])
    assert len(read_columns(tmp_path / "m.csv", "step", "absent")[0]) == 0
