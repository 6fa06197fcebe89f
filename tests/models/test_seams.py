"""Which seam a part fits: by its signature, by what it returns, or by what the user says."""

import sys

import pytest

from moesaic.errors import InputError
from moesaic.models.seams import find_part


@pytest.mark.parametrize(
    ("text", "seam"),
    [
        ("moesaic.examples.custom_modules:CosineRouter", "router"),
        ("custom_samples.LinearRouter", "router"),
        ("custom_samples:BottomKRouter", "router"),
        ("custom_samples:UnsaidRouter", "router"),
        ("custom_samples:make_router", "router"),
        ("custom_samples:AsksForIds", "router"),
        ("custom_samples:AsksForState", "router"),
        ("custom_samples:Reversing", "mixer"),
        ("custom_samples.make_unsaid", "mixer"),
        ("moesaic.layers.Attention", "mixer"),
        ("moesaic.layers:FeedForward", "ffn"),
        ("custom_samples:EachAlone", "expert"),
        ("custom_samples:InOrder", "dispatcher"),
    ],
)
def test_the_signature_says_it(text: str, seam: str) -> None:
    assert find_part(text) == (seam, text.replace(":", "."))


@pytest.mark.parametrize("text", ["custom_samples:RunningMean", "custom_samples:BothWays"])
def test_what_fits_two_seams_is_refused_with_the_words_that_help(text: str) -> None:
    path = text.replace(":", ".")
    with pytest.raises(InputError, match="fits the seams") as error:
        find_part(text)
    second = "router" if "BothWays" in text else "ffn"
    for seam in ("mixer", second):
        assert f"{seam}:{path}" in str(error.value)
        assert find_part(f"{seam}:{text}") == (seam, path)


def test_what_fits_no_seam_is_refused() -> None:
    with pytest.raises(InputError, match=r"not_a_module, once called, fits no seam; must be given as router:custom"):
        find_part("custom_samples:not_a_module")


def test_a_module_may_be_called_like_a_seam(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "router.py").write_text("from custom_samples import LinearRouter as Mine\n")
    monkeypatch.chdir(tmp_path)
    try:
        for text in ("router:Mine", "router.Mine", "router:router:Mine", "router:router.Mine"):
            assert find_part(text) == ("router", "router.Mine")
        with pytest.raises(InputError, match=r"cannot be imported"):
            find_part("mixer:router.Yours")
    finally:
        sys.modules.pop("router", None)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("custom_samples:LinearRoutr", "custom_samples:LinearRouter"),
        ("router:custom_samples:LinearRoutr", "router:custom_samples:LinearRouter"),
        ("rooter:custom_samples:LinearRouter", "router:custom_samples:LinearRouter"),
        ("custom_samples.py:LinearRouter", "custom_samples:LinearRouter"),
        ("./my/parts.py:Router", "my.parts:Router"),
        ("router:my/parts:Router", "router:my.parts:Router"),
        ("my/parts.py", "my.parts:NAME"),
        ("GatedAverage", "moesaic.examples.custom_modules:GatedAverage"),
    ],
)
def test_a_near_miss_says_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"\(did you mean {meant}\?\)"):
        find_part(text)


def test_a_name_alone_is_looked_for_in_the_files_here(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "__init__.py").write_text("class Ours:\n    pass\n")
    (tmp_path / "not-a-module.py").write_text("class Ours:\n    pass\n")
    (tmp_path / "made.py").write_text("Ours = print\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"new='Ours'.*\(did you mean deep\.er:Ours or made:Ours\?\)"):
        find_part("Ours", "new")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("builtins:print", r"new='builtins:print' is a function of builtins; must be a torch\.nn\.Module, or code of"),
        ("router:math.sqrt", r"is a function of math"),
        ("custom_samples:torch", r"is a module; must be a class, or a function"),
        ("custom_samples:Pair", r"custom_samples\.Pair returned 2 values; must be logits, scores and expert_ids of a"),
        ("router:custom_samples:Pair", r"custom_samples\.Pair returned 2 values; must be logits, scores and"),
        ("pathlib:Path", r"is the class Path; must be a torch\.nn\.Module"),
        (
            "custom_samples:TwoMatrices",
            r"new: custom_samples.TwoMatrices\(dim\) failed: .*'hidden_dim'. By name it can",
        ),
    ],
)
def test_what_is_no_part_is_refused_as_such(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_part(text, "new")
