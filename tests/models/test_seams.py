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


@pytest.mark.parametrize(
    "text", ["custom_samples:RunningMean", "custom_samples.TwoMatrices", "custom_samples:BothWays"]
)
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
    ],
)
def test_a_near_miss_says_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"\(did you mean {meant}\?\)"):
        find_part(text)
