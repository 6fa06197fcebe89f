"""What an older version stored means the same model today."""

from typing import Any

import pytest

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.formats import (
    EVALUATIONS,
    translate_model,
    translate_overrides,
    translate_run,
    translate_study,
    version_of,
)
from moesaic.studies.config import StudyConfig
from moesaic.studies.jobs import import_evaluation


def model(chunk: int | None, *mixers: Any) -> dict[str, Any]:
    pattern = [{"mixer": mixer, "ffn": "dense"} for mixer in mixers]
    return {"dim": 8, "attention": {"num_heads": 2, "attention_chunk_size": chunk}, "pattern": pattern or None}


@pytest.mark.parametrize(
    ("chunk", "old", "new"),
    [
        (32, ["rope", "nope"], ["chunked_rope", "nope"]),
        (None, ["rope", "nope"], ["rope", "nope"]),
        (32, ["full_rope", "rope", "chunked_nope"], ["rope", "chunked_rope", "chunked_nope"]),
        (None, ["full_rope"], ["rope"]),
        (32, [{"type": "my.mixer"}], [{"type": "my.mixer"}]),
    ],
)
def test_mixers(chunk: int | None, old: list[Any], new: list[Any]) -> None:
    stored = model(chunk, *old)
    assert translate_model(stored) == {**model(chunk, *new), "format": 2}
    assert stored == model(chunk, *old), "what was given is left alone"
    assert translate_model({**stored, "format": 2}) == {**stored, "format": 2}
    assert translate_model(translate_model(stored)) == translate_model(stored)


def test_intervals_have_no_names() -> None:
    stored = {**model(32), "nope_layer_interval": 4}
    assert translate_model(stored) == {**stored, "format": 2}


def test_the_teacher_that_trains_along_has_the_students_chunks_unless_it_says_otherwise() -> None:
    pattern = [{"mixer": "rope", "ffn": "dense"}]
    for attention, expected in (({}, "chunked_rope"), ({"attention_chunk_size": None}, "rope")):
        teacher = {"dim": 16, "attention": attention, "pattern": pattern}
        config = {"model": model(32), "distillation": {"source": "joint", "teacher_model": teacher}}
        found = translate_run(config)["distillation"]["teacher_model"]
        assert found == {**teacher, "pattern": [{"mixer": expected, "ffn": "dense"}]}


def test_overrides_are_translated_where_they_lead() -> None:
    base = {"seed": 0, "model": model(32, "full_rope"), "distillation": None}
    pattern = [{"mixer": "rope", "ffn": "dense"}]
    overrides = {"model.pattern": pattern, "seed": 3, "model.attention.conv_width": 0}
    new = translate_overrides(overrides, base, 1)
    assert new == {**overrides, "model.pattern": [{"mixer": "chunked_rope", "ffn": "dense"}]}
    full = translate_overrides({**overrides, "model.attention.attention_chunk_size": None}, base, 1)
    assert full["model.pattern"] == pattern
    assert translate_overrides(overrides, base, 2) == overrides
    joint = {"distillation": {"source": "joint", "teacher_model": {"pattern": pattern}}}
    [chosen] = translate_overrides(joint, base, 1)["distillation"]["teacher_model"]["pattern"]
    assert chosen["mixer"] == "chunked_rope"
    assert base["model"] == model(32, "full_rope")


def test_probes_became_evaluations() -> None:
    old = {
        "probes": ["moesaic.training.probes.needle_probe", "my.own_probe"],
        "probe_options": {"needle": {"window": None}},
    }
    new = translate_study(old)
    assert new["evaluations"] == ["moesaic.evaluation.checkpoint_evaluations.needle_evaluation", "my.own_probe"]
    assert new["evaluation_options"] == old["probe_options"]
    assert translate_study(new) == new
    known = {"question": "", "equal": "", "baseline": "a", "arms": {"a": {}}, "seeds": [0]}
    from_mapping(StudyConfig, {**known, **new})
    assert translate_overrides({"probe_options.needle.window": 8}, {}, 1) == {"evaluation_options.needle.window": 8}


@pytest.mark.parametrize("path", EVALUATIONS.values())
def test_renamed_functions_are_there(path: str) -> None:
    import_evaluation(path)


@pytest.mark.parametrize("version", [0, 3, "2", True, None])
def test_an_unknown_version_is_refused(version: Any) -> None:
    with pytest.raises(InputError, match=r"^there: format=.*must be 1 to 2"):
        version_of({"format": version}, "there")


def test_without_a_version_it_is_the_first() -> None:
    assert version_of({}, "there") == 1
    assert translate_run({}) == {}
