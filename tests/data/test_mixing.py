"""Text and pictures in one stream: the scheduled share, pure batches, and text that stays as it is."""

import numpy as np
import pytest
import torch
from small_pictures import LAYOUT, Numbers

from moesaic.data import EvaluationLoader, TrainingLoader
from moesaic.data.images import PictureEvaluationLoader, PictureTrainingLoader
from moesaic.data.mixing import MixedEvaluationLoader, MixedTrainingLoader, picture_rows
from moesaic.training.fusion_config import ShareConfig

STREAM = np.arange(2000, dtype=np.uint16) % 250
SHARED = {"seq_len": 48, "batch_size": 4, "num_batches": 30, "seed": 3}


def text() -> TrainingLoader:
    return TrainingLoader(STREAM, **SHARED)


def pictures() -> PictureTrainingLoader:
    return PictureTrainingLoader(Numbers(), LAYOUT, **SHARED)


def mixed(start: float, end: float, over: float = 1.0) -> MixedTrainingLoader:
    return MixedTrainingLoader(text(), pictures(), ShareConfig(start, end, over).at(30), num_batches=30)


def test_the_share_is_as_scheduled() -> None:
    at = ShareConfig(0.8, 0.2, 0.5).at(40)
    assert [round(at(i), 6) for i in (0, 19, 20, 39)] == [0.8, 0.2, 0.2, 0.2]
    assert ShareConfig(0.0, 1.0).at(1)(0) == 0.0
    loader = mixed(0.9, 0.1)
    counts = [loader.num_picture_rows(i) for i in range(30)]
    wanted = np.cumsum([4 * ShareConfig(0.9, 0.1).at(30)(i) for i in range(30)])
    assert np.abs(np.cumsum(counts) - wanted).max() <= 0.5 + 1e-9
    assert [int(picture_rows(batch).sum()) for batch in loader] == counts


def test_text_alone_is_today_s() -> None:
    for expected, found in zip(text(), mixed(0.0, 0.0), strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_pictures_alone_are_those_of_their_loader() -> None:
    for expected, found in zip(pictures(), mixed(1.0, 1.0), strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_both_streams_go_on_where_they_stopped() -> None:
    of_text, of_pictures = [], []
    for batch in mixed(0.2, 0.9):
        rows = picture_rows(batch)
        of_text.append(batch["tokens"][~rows])
        of_pictures.append(batch["tokens"][rows])
    for found, alone in ((of_text, text()), (of_pictures, pictures())):
        found_rows, wanted = torch.cat(found), torch.cat([batch["tokens"] for batch in alone])
        assert torch.equal(found_rows, wanted[: len(found_rows)])


def test_image_tokens_are_as_many_as_tiles_in_each_row() -> None:
    for batch in mixed(0.5, 0.5):
        tiles = torch.bincount(batch["image_rows"], minlength=4) if "image_rows" in batch else torch.zeros(4)
        assert torch.equal((batch["tokens"] == LAYOUT.image).sum(dim=1), 2 * tiles)


def test_batches_are_pure_and_resumed() -> None:
    whole, first, other = list(mixed(0.7, 0.3)), mixed(0.7, 0.3), mixed(0.7, 0.3)
    iterator = iter(first)
    for _ in range(11):
        next(iterator)
    other.load_state_dict(first.state_dict())
    for expected, found in zip(whole[11:], other, strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_evaluation_is_text_then_pictures() -> None:
    of_text = EvaluationLoader(STREAM, seq_len=48, batch_size=4, max_batches=2)
    of_pictures = PictureEvaluationLoader(Numbers(), LAYOUT, seq_len=48, batch_size=4)
    loader = MixedEvaluationLoader(of_text, of_pictures)
    assert ["images" in batch for batch in loader] == [False, False, True, True, True]
    assert len(loader) == 5


@pytest.mark.parametrize(("name", "value"), [("start", -0.1), ("end", 1.5), ("over", 0.0)])
def test_shares_outside_of_0_to_1_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ShareConfig(**{name: value})
