"""One set of defaults: what a command composes is what Python's dataclasses have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesaic.cli.common import composed
from moesaic.config import flatten, from_mapping, to_mapping
from moesaic.data import DataConfig
from moesaic.distillation import TargetFormat
from moesaic.evaluation.long_context import LossByPositionConfig
from moesaic.evaluation.needle import NeedleConfig
from moesaic.evaluation.sampling import SampleConfig
from moesaic.models import DecoderConfig, llama4_behemoth_guess, llama4_maverick, llama4_scout
from moesaic.training.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_without_arguments() -> None:
    assert flatten(to_mapping(RunConfig())) == flatten(composed("train", []))


@pytest.mark.slow_but_for("behemoth-llama4_behemoth_guess")
@pytest.mark.parametrize(
    ("name", "preset"),
    [("scout", llama4_scout), ("maverick", llama4_maverick), ("behemoth", llama4_behemoth_guess)],
)
def test_published_models(name: str, preset: Callable[[], DecoderConfig]) -> None:
    assert from_mapping(DecoderConfig, composed("train", [f"model={name}"])["model"]) == preset()


def test_a_plan_has_the_keys_of_a_run() -> None:
    plan, run = (flatten(composed(name, [])) for name in ("plan", "train"))
    theirs = {key: value for key, value in plan.items() if "." in key}
    others = {"training.batch_size", "training.seq_len", "trainer.precision"}  # for sizes that need a plan
    assert {key: run[key] for key in theirs if key not in others} == {
        key: value for key, value in theirs.items() if key not in others
    }


@pytest.mark.parametrize(
    ("config_name", "section", "cls"),
    [
        ("evaluate", "data", DataConfig),
        ("evaluate", "loss_by_position", LossByPositionConfig),
        ("evaluate", "needle", NeedleConfig),
        ("cache_targets", "data", DataConfig),
        ("cache_targets", None, TargetFormat),
        ("generate", None, SampleConfig),
    ],
)
def test_the_other_commands(config_name: str, section: str | None, cls: Callable[[], Any]) -> None:
    config = composed(config_name, [])
    given = config if section is None else config[section]
    expected = to_mapping(cls())
    assert {key: given[key] for key in expected} == expected
    assert section is None or set(given) == set(expected)


CHANGED = {  # keys whose default was another one before Python and YAML had the same
    *("optimizer.name", "optimizer.learning_rate", "optimizer.muon_learning_rate", "schedule.decay_fraction"),
    *("balance.load_balance_loss_weight", "training.validation_seq_len", "trainer.accelerator"),
    "trainer.precision",  # trainer.keep_freed_memory too, but it changes no number
}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "studies").glob("*/config.yaml")), ids=lambda path: path.parent.name
)
def test_committed_studies_say_what_they_were_run_with(file: Path) -> None:
    """So that a default that changes does not change what their rows mean."""
    stored = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
    assert CHANGED - stored.keys() == set()
