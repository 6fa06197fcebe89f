"""The files in conf/data that name pictures: they compose, and say what the defaults of their dataclasses are."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from moesaic.cli.common import plain
from moesaic.config import from_mapping, to_mapping
from moesaic.data.images import PICTURES
from moesaic.training.config import RunConfig

CONF = Path(__file__).resolve().parents[3] / "conf"


@pytest.mark.parametrize("name", ["glyphs", "sheets", "code_lines", "image_folder"])
def test_each_file_composes_to_the_defaults(name: str) -> None:
    path = ["data.path=pictures"] if name == "image_folder" else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = from_mapping(RunConfig, plain(compose("train", [f"data={name}", *path])))
    assert config.data.source == name
    keys = config.data.make_pictures()
    assert keys == PICTURES[name]()
    assert set(config.data.task or {}) == set(to_mapping(keys))
