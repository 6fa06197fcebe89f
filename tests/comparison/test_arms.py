"""Candidates as words: split, named, and put in their places."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.comparison.arms import (
    Arm,
    custom_paths,
    differences,
    folder_name,
    is_assignment,
    name_of,
    named_apart,
    part_overrides,
    split_words,
    with_parts,
)
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.models.seams import FoundPart
from moesaic.overrides import apply_overrides
from moesaic.training.config import RunConfig, default_model

RUN = to_mapping(RunConfig())


def model_of(run: dict[str, Any]) -> DecoderConfig:
    return from_mapping(DecoderConfig, {**run["model"], "vocab_size": 100}, "model")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "baseline"),
        (["mine.parts:ExpertChoice"], "ExpertChoice"),
        (["router:mine.parts.ExpertChoice"], "ExpertChoice"),
        (["model.moe.top_k=2", "model.moe.hidden_dim=96"], "top_k=2, hidden_dim=96"),
        (["model.moe.router={type: mine.parts.Cosine, scale: 4}"], "Cosine"),
        (["experiment=dense_twin"], "dense_twin"),
        (["optimizer.name=adamw"], "optimizer.name=adamw"),
        (["model=study", "+trainer.x=1"], "model=study, x=1"),
    ],
)
def test_arms_are_called_after_what_is_new(words: list[str], name: str) -> None:
    assert name_of(words) == name


def test_long_names_are_cut() -> None:
    assert len(name_of([f"model.moe.some_long_key_{i}=1" for i in range(9)])) == 40


def test_arms_of_one_name_are_called_by_their_words() -> None:
    long = [f"model.moe.some_long_key_{i}=1" for i in range(9)]
    given = [[], ["a.R"], ["b:R", "model.dim=8"], ["c:R", "model.dim=8"], long, [*long[:-1], "model.dim=4"]]
    arms = [Arm(name_of(words), RUN, words=tuple(words)) for words in given]
    names = [arm.name for arm in named_apart(arms)]
    assert names[:4] == ["baseline", "R", "b:R, model.dim=8", "c:R, model.dim=8"]
    assert len(set(names)) == len(names)
    assert len(folder_name(names, "baseline")) <= 120
    both = [Arm("R", RUN, words=("a.R",)), Arm("R", RUN, words=("b.R",))]
    assert [arm.name for arm in named_apart(both)] == ["R", "b.R"]


def test_words_are_split_like_a_shells() -> None:
    assert split_words("new", "a.b:C 'model.x={y: 1, z: 2}'") == ["a.b:C", "model.x={y: 1, z: 2}"]
    assert split_words("new", "model.x={y: a.B, z: [1, 2]} model.dim=8") == [
        "model.x={y: a.B, z: [1, 2]}",
        "model.dim=8",
    ]
    with pytest.raises(InputError, match=r"new=.*No closing quotation"):
        split_words("new", "'a")


def test_overrides_and_parts_are_told_apart() -> None:
    assert [is_assignment(word) for word in ("model.dim=8", "+a=1", "~model.x", "mine.parts:X", "router:mine.X")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_a_router_goes_into_every_moe_layer_and_a_mixer_into_every_layer() -> None:
    router = apply_overrides(
        RUN, part_overrides("router", "moesaic.examples.custom_modules.CosineRouter", model_of(RUN)), "new"
    )
    assert custom_paths(model_of(router)) == ["moesaic.examples.custom_modules.CosineRouter"]
    mixer = apply_overrides(
        RUN, part_overrides("mixer", "moesaic.examples.custom_modules.GatedAverage", model_of(RUN)), "new"
    )
    assert all(isinstance(layer.mixer, dict) for layer in model_of(mixer).layers)
    assert [layer.ffn for layer in model_of(mixer).layers] == [layer.ffn for layer in model_of(RUN).layers]


def test_a_channel_mixer_takes_the_place_of_the_moe_layers() -> None:
    path = "moesaic.examples.custom_modules.ReluSquared"
    ffn = apply_overrides(RUN, part_overrides("ffn", path, model_of(RUN)), "new")
    assert [layer.ffn == {"type": path} for layer in model_of(ffn).layers] == [False, True, False, True]
    assert [layer.mixer for layer in model_of(ffn).layers] == [layer.mixer for layer in model_of(RUN).layers]


def test_a_router_needs_a_moe_layer() -> None:
    dense = apply_overrides(RUN, {"model.interleave_moe_layer_step": 0}, "baseline")
    with pytest.raises(InputError, match=r"mine.R: is a router, and the baseline has no MoE layer"):
        part_overrides("router", "mine.R", model_of(dense))


nested = st.recursive(
    st.integers(0, 3) | st.none(), lambda below: st.dictionaries(st.sampled_from("abc"), below, min_size=1, max_size=3)
)


@pytest.mark.slow
@given(
    base=st.dictionaries(st.sampled_from("xyz"), nested, min_size=3, max_size=3),
    other=st.dictionaries(st.sampled_from("xyz"), nested, min_size=3, max_size=3),
)
def test_differences_turn_one_config_into_the_other(base: dict[str, Any], other: dict[str, Any]) -> None:
    assert apply_overrides(base, differences(base, other), "new") == other


def test_no_difference_is_no_override() -> None:
    assert differences(RUN, {**RUN, "model": default_model()}) == {}


def test_a_part_that_another_one_would_replace_is_refused() -> None:
    ours, theirs = FoundPart("router", "a.Ours"), FoundPart("router", "a.Theirs")
    with pytest.raises(InputError, match=r"new: a.Ours and a.Theirs are both a router, .* must be two candidates"):
        with_parts(RUN, [ours, theirs], "new")
    with pytest.raises(InputError, match=r"new: a.Mix takes the place of the MoE layers, which a.Ours needs"):
        with_parts(RUN, [ours, FoundPart("ffn", "a.Mix")], "new")
    assert custom_paths(model_of(with_parts(RUN, [ours, FoundPart("mixer", "a.Mix")], "new"))) == ["a.Mix", "a.Ours"]
