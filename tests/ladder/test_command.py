"""moesaic ladder from the command line to the pictures, on a folder of text."""

from pathlib import Path

import pytest

from moesaic.cli import main

TINY = [
    "experiment=ladder_moe",
    "data=files",
    "data.tokenizer=bytes",
    "model.num_layers=2",
    "model.dim=16",
    "model.hidden_dim=32",
    "model.attention.head_dim=4",
    "model.moe.hidden_dim=16",
    "model.moe.num_experts=4",
    "training.seq_len=32",
    "training.validation_seq_len=32",
    "training.score_windows=8",
    "ladder.tokens_per_parameter=1",
    "ladder.batch=128",
    "ladder.tune=null",
    "ladder.seeds=[0,1]",
    "ladder.rungs=[3e8,6e8,1.2e9]",
    "ladder.least=0",
    "workers=1",
    "results_dir=results",
]


def write_text(folder: Path, lines: int) -> None:
    folder.mkdir()
    for i in range(12):
        text = "".join(f"the {i * lines + j}th line of many, {(i * lines + j) ** 2 % 9973}\n" for j in range(lines))
        (folder / f"{i}.txt").write_text(text)


def test_too_little_text_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text", 20)
    with pytest.raises(SystemExit) as ended:
        main(["ladder", *TINY, "data.path=text"])
    assert ended.value.code == 2
    assert "no token may be repeated, so take larger data" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_ladder_runs_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text", 200)
    for said in ("12 runs to do (4 at 3e8, 4 at 6e8, 4 at 1.2e9)", "all runs are there"):
        with pytest.raises(SystemExit) as ended:
            main(["ladder", *TINY, "data.path=text"])
        assert not ended.value.code
        assert said in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"rows.jsonl", "ladder.yaml", "table.md", "summary.json", "ladder.png", "residuals.png"} <= names
    (tmp_path / "text" / "more.txt").write_text("another corpus\n" * 100)
    with pytest.raises(SystemExit) as ended:
        main(["ladder", *TINY, "data.path=text"])
    assert ended.value.code == 2
    assert "of a corpus with the content hash" in capsys.readouterr().err
