"""Glyphs: real ones only, splits that share no character, face or shape, names of equal pictures, a cache."""

import itertools
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moesaic.config import from_mapping
from moesaic.data import DataConfig, load_data, load_pictures
from moesaic.data.images import TRAIN, Glyphs
from moesaic.data.images.faces import FACES, charmap, face_hash, face_path
from moesaic.data.images.glyphs import GlyphPicture, GlyphSamples, GlyphTable, glyph_table, held_out
from moesaic.errors import InputError

ALPHABETS = "".join(chr(c) for c in [*range(0x20, 0x7F), *range(0x370, 0x400), *range(0x400, 0x460)])
TWO = ("DejaVuSansMono", "STIXGeneralItalic")


@pytest.fixture(scope="module")
def table() -> GlyphTable:
    return glyph_table(TWO, 32, characters=ALPHABETS)


@pytest.fixture(scope="module")
def samples(table: GlyphTable) -> GlyphSamples:
    return GlyphSamples(Glyphs(faces=TWO, held_out_faces=TWO[1:]), table)


def test_the_fixed_list_is_shipped() -> None:
    assert len(set(FACES)) == 15
    assert all(face_path(face).is_file() for face in FACES)


def test_every_pair_has_a_glyph_a_name_and_ink(table: GlyphTable) -> None:
    maps = [charmap(face) for face in TWO]
    assert len(table.codes) > 400
    for row, (code, face) in enumerate(zip(table.codes.tolist(), table.face.tolist(), strict=True)):
        assert maps[face][code] > 0
        assert table.name(row) == unicodedata.name(chr(code))
        assert table.ink[row].max() > 100
    assert ord(" ") not in table.codes
    assert table.left_out["no name"] > 0  # the space, which is a separator


def test_pictures_are_what_they_say() -> None:
    """A hyphen is wide and in the middle, an underscore is low, a bar is high, M has more ink than i."""
    drawn = glyph_table(["DejaVuSansMono"], 32, characters="-_|Mi").ink
    by = dict(zip("-M_i|", drawn, strict=True))  # by code point

    def box(character: str) -> tuple[int, int, int, int]:
        rows, columns = np.flatnonzero(by[character].any(axis=1)), np.flatnonzero(by[character].any(axis=0))
        return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])

    top, bottom, left, right = box("-")
    assert 10 < top <= bottom < 22
    assert right - left > bottom - top
    assert box("_")[0] > 22
    assert box("|")[1] - box("|")[0] > 20
    assert by["M"].sum() > by["i"].sum()
    for character in by:  # in the middle from left to right
        assert abs(sum(box(character)[2:]) - 31) <= 1


def test_a_glyph_that_is_larger_than_the_square_is_drawn_smaller() -> None:
    (ligature,) = glyph_table(["DejaVuSans"], 16, characters="\u2a0c").ink  # four integrals
    assert ligature.shape == (16, 16)
    assert ligature.any()


def test_placeholders_are_no_glyphs() -> None:
    """The last resort has a picture for every block of Unicode, and no glyph of any character."""
    characters = [chr(code) for code in range(0x4E00, 0x4E80)]
    with pytest.raises(InputError, match="LastResortHE-Regular: no glyph of a character with a name"):
        glyph_table(["LastResortHE-Regular"], 16, characters=characters)


def test_no_character_and_no_shape_is_on_both_sides(table: GlyphTable, samples: GlyphSamples) -> None:
    def of(split: str, column: npt.NDArray[np.int64]) -> set[int]:
        return set(column[samples.rows[split]].tolist())

    def shapes(split: str) -> set[bytes]:
        return {table.shapes[row] for row in samples.rows[split].tolist()}

    assert all(samples.size(split) > 5 for split in samples.splits)
    for split in ("unseen_character", "unseen_both"):
        assert not of(split, table.codes) & of(TRAIN, table.codes)
    assert of("unseen_font", table.codes) <= set(table.codes.tolist()) - of("unseen_both", table.codes)
    assert of(TRAIN, table.face) == of("unseen_character", table.face) == {0}
    assert of("unseen_font", table.face) == of("unseen_both", table.face) == {1}
    for split in samples.splits[1:]:
        assert not shapes(split) & shapes(TRAIN)
    rows = np.concatenate(list(samples.rows.values()))
    assert (
        len(set(rows.tolist())) == len(rows) == len(table.codes) - samples.facts["left_out"]["shape seen in training"]
    )


def test_the_splits_are_the_same_on_every_machine() -> None:
    """Else what was trained on yesterday is tested on today."""
    codes = np.arange(33, 127)
    different = np.stack([np.full((8, 8), code, dtype=np.uint8) for code in codes.tolist()])
    table = GlyphTable(TWO, codes, np.zeros_like(codes), different, {})
    assert "".join(map(chr, codes[held_out(table)].tolist())) == '")+7EMQZbnx}'


def test_characters_with_a_shape_in_common_are_one_group_wherever_it_is_in_the_square() -> None:
    """A chain: 1 and 2 share a shape that is moved, 2 and 3 share another one in another face."""
    dot, bar, cross = (np.zeros((8, 8), dtype=np.uint8) for _ in range(3))
    dot[1, 1], bar[2, 1:4], cross[5, 5] = 9, 9, 9
    alone = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = set()
    for first in range(60, 160):
        codes = np.array([first, first + 1, first + 1, first + 2, first + 3])
        table = GlyphTable(TWO, codes, np.array([0, 0, 1, 1, 0]), np.stack([dot, cross, bar, bar, alone]), {})
        chosen = held_out(table)
        assert len(set(chosen[:4].tolist())) == 1
        found.add((bool(chosen[0]), bool(chosen[4])))
    assert {(True, False), (False, True), (False, False)} <= found


def test_an_answer_knows_the_other_names_of_its_very_picture(table: GlyphTable, samples: GlyphSamples) -> None:
    row = int(np.flatnonzero((table.codes == ord("A")) & (table.face == 0))[0])
    answer = samples.answer(row)
    assert answer.text == "LATIN CAPITAL LETTER A"
    assert answer.asked
    assert answer.also == {"GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"}
    sample = samples.sample("unseen_character", 0)
    assert len(sample.pictures) == len(sample.texts) == 1


def test_a_training_picture_is_moved_and_keeps_its_ink() -> None:
    ink = np.zeros((16, 16), dtype=np.uint8)
    ink[0:3, 12:16] = np.arange(1, 13).reshape(3, 4)  # in a corner
    picture = GlyphPicture(ink, shift=2)
    np.testing.assert_array_equal(picture.tiles(None)[0, 0], 255 - ink)
    seen = {picture.tiles(np.random.default_rng(seed)).tobytes() for seed in range(60)}
    assert len(seen) == 9  # up and right of it there is no room
    for tiles in seen:
        left = 255 - np.frombuffer(tiles, dtype=np.uint8)
        assert sorted(left[left > 0].tolist()) == list(range(1, 13))
    first, again = (picture.tiles(np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert GlyphPicture(ink, channels=3).tiles(None).shape == (1, 3, 16, 16)


def config(tmp_path: Path, **keys: object) -> DataConfig:
    return from_mapping(
        DataConfig,
        {
            "source": "glyphs",
            "tokenizer": "bytes",
            "cache_dir": str(tmp_path / "cache"),
            "task": {"faces": ["cmtt10", "cmr10"], "held_out_faces": ["cmr10"], "side": 16, **keys},
        },
        "data",
    )


def test_pictures_are_drawn_once_and_damaged_ones_again(tmp_path: Path) -> None:
    first = load_pictures(config(tmp_path))
    pictures, about = sorted((tmp_path / "cache").glob("glyphs-*"), reverse=True)
    assert pictures.suffix == ".npy"
    times = pictures.stat().st_mtime_ns
    again = load_pictures(config(tmp_path))
    assert pictures.stat().st_mtime_ns == times
    assert again.facts == first.facts
    content = bytearray(pictures.read_bytes())
    content[-40] ^= 255
    pictures.write_bytes(content)
    assert load_pictures(config(tmp_path)).facts == first.facts
    assert pictures.read_bytes() != content
    about.write_text("{}")
    assert load_pictures(config(tmp_path)).facts == first.facts
    batch = first.training_loader(seq_len=128, batch_size=2, num_batches=1, seed=0).batch(0)
    assert batch["images"].shape[1:] == (1, 16, 16)
    assert int(batch["tokens"].max()) < first.vocab_size == 263


def test_facts_tell_what_the_pairs_are(tmp_path: Path) -> None:
    facts = load_pictures(config(tmp_path)).facts
    assert facts["faces"] == {face: face_hash(face)[:16] for face in ("cmtt10", "cmr10")}
    assert facts["train_pairs"] > 50
    for changes in ({"side": 24}, {"held_out_faces": ["cmtt10"]}, {"faces": ["cmtt10", "cmss10", "cmr10"]}):
        assert load_pictures(config(tmp_path, **changes)).facts["content_hash"] != facts["content_hash"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"faces": []}, r"data\.task\.faces=\[\]: must be one or more"),
        ({"faces": ["cmr10", "cmr10"]}, r"data\.task\.faces=.*different"),
        ({"held_out_faces": ["cmb10"]}, r"data\.task\.held_out_faces=\['cmb10'\]: cmb10 must be among faces"),
        ({"held_out_faces": ["cmr10", "cmtt10"]}, r"held_out_faces=.*: must leave a face"),
        ({"side": 4}, r"data\.task\.side=4: must be a number >= 8"),
        ({"shift": 8}, r"data\.task\.shift=8: must be 0 <= value < side / 2 = 8"),
        ({"channels": 2}, r"data\.task\.channels=2: must be 1 or 3"),
        ({"tile_tokens": 0}, r"data\.task\.tile_tokens=0: must be a number >= 1"),
        ({"sides": 4}, r"data\.task\.sides: unknown key"),
    ],
)
def test_impossible_keys(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(tmp_path, **keys)


def test_faces_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.ttf").write_text("no typeface")
    (tmp_path / "empty.ttf").touch()
    whole = face_path("cmr10").read_bytes()
    (tmp_path / "cut.ttf").write_bytes(whole[: len(whole) // 3])
    for face, message in itertools.chain(
        [("Papyrus", r"data\.task\.faces: face 'Papyrus': no such file; must be a file, or one of DejaVuSans, ")],
        [(str(tmp_path / "none.ttf"), "no such file")],
        [(str(tmp_path), "a directory; must be a file")],
        [
            (str(tmp_path / name), rf"data\.task\.faces: .*{name}: damaged")
            for name in ("text.ttf", "empty.ttf", "cut.ttf")
        ],
    ):
        with pytest.raises(InputError, match=message):
            load_pictures(config(tmp_path, faces=["cmtt10", face], held_out_faces=[]))
    assert not list(tmp_path.glob("cache/*"))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL.ImageFont", None)
    with pytest.raises(InputError, match=r"data\.source: pictures need pip install 'moesaic\[train\]'"):
        load_pictures(config(tmp_path))


def test_what_reads_text_refuses_pictures_and_the_reverse(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.source='glyphs': it has pictures, and this reads text"):
        load_data(config(tmp_path))
    with pytest.raises(InputError, match=r"data\.source='stdlib': it has no pictures; must be one of glyphs, sheets"):
        load_pictures(DataConfig())
    with pytest.raises(ValueError, match="tokenizer=bpe: must be bytes with source=glyphs"):
        DataConfig(source="glyphs")


@pytest.mark.slow
def test_all_faces_give_about_fifty_thousand_pairs(tmp_path: Path) -> None:
    from PIL import Image

    found = GlyphSamples(Glyphs(), glyph_table(FACES, 32))
    assert found.facts["train_pairs"] > 40_000
    assert found.facts["characters"] > 7_000
    assert found.facts["left_out"].get("placeholder", 0) == 0
    train = {found.table.shapes[row] for row in found.rows[TRAIN].tolist()}
    for split in found.splits[1:]:
        assert found.size(split) > 400
        assert not train & {found.table.shapes[row] for row in found.rows[split].tolist()}
    sheet = np.concatenate(
        [
            np.concatenate([found.sample(split, i).pictures[0].tiles(None)[0, 0] for i in range(24)], axis=1)
            for split in found.splits
        ]
    )
    Image.fromarray(sheet).save(tmp_path / "glyphs.png")
    assert (tmp_path / "glyphs.png").stat().st_size > 1000
