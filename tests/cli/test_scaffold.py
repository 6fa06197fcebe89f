"""moesaic scaffold: a study's file that composes and says what it asks."""

from pathlib import Path

import pytest
import yaml

from moesaic.cli.arguments import compose_with
from moesaic.cli.common import plain
from moesaic.cli.scaffold import main, scaffold
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import validate


@pytest.mark.slow
def test_the_file_is_a_study_that_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["mine"])
    assert "moesaic study --config-dir conf experiment=study_mine" in capsys.readouterr().out
    config = plain(compose_with("conf", "study", ["experiment=study_mine"]))
    study = from_mapping(StudyConfig, config.pop("study"), "study")
    for key in ("workers", "results_dir"):
        config.pop(key)
    validate(study, config)
    text = (tmp_path / "conf/experiment/study_mine.yaml").read_text()
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  # axes"))
    # what is commented out is right too
    more = "\n".join([*lines[:first], *(line.replace("  # ", "  ", 1) for line in lines[first:])])
    from_mapping(StudyConfig, {**yaml.safe_load(more)["study"]}, "study")
    with pytest.raises(InputError, match="is there already"):
        scaffold("mine", Path("conf"))


@pytest.mark.parametrize("name", ["", "a b", "../x", "1x", "a-b"])
def test_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be letters"):
        scaffold(name, tmp_path)
