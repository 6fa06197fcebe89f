"""Sheets: every question has one answer, which the pictures show; in each split glyphs of that split only."""

import re

import numpy as np
import pytest

from moesaic.data.images import TRAIN, Glyphs, ImageText, Sheets
from moesaic.data.images.glyphs import GlyphSamples, glyph_table
from moesaic.data.images.sheets import SheetSamples
from moesaic.errors import InputError

ALPHABETS = "".join(chr(c) for c in [*range(0x20, 0x7F), *range(0x370, 0x400), *range(0x400, 0x460)])
FACES = ("DejaVuSansMono", "STIXGeneralItalic")


@pytest.fixture(scope="module")
def glyphs() -> GlyphSamples:
    return GlyphSamples(
        Glyphs(faces=FACES, held_out_faces=FACES[1:], side=16), glyph_table(FACES, 16, characters=ALPHABETS)
    )


def sheets(glyphs: GlyphSamples, **keys: int) -> SheetSamples:
    return SheetSamples(Sheets(faces=FACES, held_out_faces=FACES[1:], side=16, shift=2, **keys), glyphs)


def cells(sample: ImageText) -> list[bytes]:
    """The picture of each cell, in order."""
    return [tile.tobytes() for picture in sample.pictures for tile in picture.tiles(None)]


def names_of(glyphs: GlyphSamples, split: str) -> dict[bytes, set[str]]:
    """What each picture of a split of glyphs may be called."""
    found: dict[bytes, set[str]] = {}
    for index in range(glyphs.size(split)):
        sample = glyphs.sample(split, index)
        answer = sample.texts[0]
        found[sample.pictures[0].tiles(None)[0].tobytes()] = {answer.text, *answer.also}
    return found


@pytest.mark.parametrize(
    ("split", "of"),
    [(TRAIN, TRAIN), ("seen_glyphs", TRAIN), ("unseen_character", "unseen_character"), ("unseen_font", "unseen_font")],
)
def test_a_reader_of_the_pictures_answers_every_question(glyphs: GlyphSamples, split: str, of: str) -> None:
    names = names_of(glyphs, of)
    kinds = set()
    for index in range(12):
        sample = sheets(glyphs).sample(split, index)
        shown = [names[cell] for cell in cells(sample)]
        assert len(shown) == 6
        texts = [text for text in sample.texts if not text.text.startswith("Picture ")]
        assert len(texts) == 4
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            assert not question.asked
            assert answer.asked
            if what := re.fullmatch(r"What is at row (\d), column (\d)\? ", question.text):
                cell = 3 * (int(what[1]) - 1) + int(what[2]) - 1
                assert {answer.text, *answer.also} == shown[cell]
                kinds.add("what")
                continue
            found = re.fullmatch(r"(Where is|Which picture shows) ([A-Z0-9 -]+)\? ", question.text)
            assert found is not None
            (cell,) = [i for i, called in enumerate(shown) if found[2] in called]  # one, and no other
            where = found[1] == "Where is"
            assert answer.text == (f"row {cell // 3 + 1}, column {cell % 3 + 1}" if where else str(cell + 1))
            kinds.add(found[1])
    assert kinds == {"what", "Where is", "Which picture shows"}


def test_one_kind_has_several_pictures_with_text_between(glyphs: GlyphSamples) -> None:
    sample = sheets(glyphs, rows=1, columns=2, questions=1).sample(TRAIN, 2)
    assert [type(part).__name__ for part in sample.parts] == [*["Text", "GlyphPicture"] * 2, "Text", "Text"]
    grid = sheets(glyphs, rows=2, columns=3, questions=1).sample(TRAIN, 0)
    assert [picture.grid for picture in grid.pictures] == [(2, 3)]
    assert grid.pictures[0].tiles(np.random.default_rng(0)).shape == (6, 1, 16, 16)


def test_a_sheet_is_always_the_same_one(glyphs: GlyphSamples) -> None:
    one, other = sheets(glyphs), sheets(glyphs)
    for split in one.splits:
        assert one.sample(split, 4).texts == other.sample(split, 4).texts
        assert cells(one.sample(split, 4)) == cells(other.sample(split, 4))
    assert one.sample(TRAIN, 4).texts != one.sample(TRAIN, 7).texts
    assert one.sample(TRAIN, 4).texts != one.sample("seen_glyphs", 4).texts
    assert one.facts["content_hash"] != sheets(glyphs, questions=1).facts["content_hash"]
    assert (one.size(TRAIN), one.size("seen_glyphs")) == (20_000, 600)


def test_sheets_that_cannot_be(glyphs: GlyphSamples) -> None:
    with pytest.raises(ValueError, match="questions=7: must be 1 to rows \\* columns = 6"):
        Sheets(questions=7)
    with pytest.raises(ValueError, match="rows=0: must be a number >= 1"):
        Sheets(rows=0)
    many = sheets(glyphs, rows=16, columns=16)
    assert many.size("unseen_character") == 0  # there are not as many
    with pytest.raises(InputError, match=r"data\.task\.rows=16, columns=16: 25600 glyphs of train had only"):
        many.sample(TRAIN, 0)
