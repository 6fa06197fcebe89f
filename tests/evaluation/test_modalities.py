"""Experts by modality, the sheet of answers, and that they draw what they are given."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from seeing import LAYOUT, pictures_of, pixels, seeing
from small_pictures import Numbers, Plain

from moesaic.data.images import ImageText, Picture, Text
from moesaic.data.images.sample import Pixels
from moesaic.errors import InputError
from moesaic.evaluation.modalities import MODALITIES, ModalityCounts, experts_by_modality, plot_modalities
from moesaic.evaluation.naming_plots import plot_answers, whole_picture
from moesaic.layers import Routing


def routed(*ids: int) -> Routing:
    return Routing(torch.zeros(len(ids), 3), torch.ones(len(ids), 1), torch.tensor(ids)[:, None])


def test_counts_by_hand() -> None:
    counts = ModalityCounts()
    modality = torch.tensor([[0, 0, 1], [2, 1, -1]])
    counts.update({"a": routed(0, 2, 1, 1, 1, 0)}, modality)
    counts.update({"a": routed(0, 0, 0, 0, 3, 0)}, modality)  # 3 is no expert
    assert counts.counts() == {"a": {"image": [3, 0, 1], "text_beside_images": [1, 2, 0], "text": [1, 1, 0]}}
    numbers = counts.numbers()
    assert numbers["router/a/fullest_expert_image"] == pytest.approx(3 / 4 * 3)
    assert numbers["router/a/fullest_expert_text"] == pytest.approx(1 / 2 * 3)
    assert 0 < numbers["router/a/modality_expert_nmi"] < 1


@pytest.mark.parametrize(("image", "text", "explained"), [([4, 0], [0, 4], 1), ([2, 2], [3, 3], 0)])
def test_what_modality_explains(image: list[int], text: list[int], explained: float) -> None:
    counts = ModalityCounts({"a": torch.tensor([image, [0, 0], text])})
    assert counts.numbers()["router/a/modality_expert_nmi"] == pytest.approx(explained, abs=1e-9)
    assert "router/a/fullest_expert_text_beside_images" not in counts.numbers()


def test_every_token_counts_once_per_choice(tmp_path: Path) -> None:
    model, samples = seeing(), Numbers()
    text = {"tokens": torch.randint(257, (2, 9)), "valid": torch.arange(9).expand(2, 9) < 7}
    found = experts_by_modality(model, pictures_of(samples), [text], batch_size=3)
    by_hand = ModalityCounts()
    for split in ("test", "other"):
        for i in range(samples.size(split)):
            sample = samples.sample(split, i)
            [encoded] = LAYOUT.encode([sample])
            tokens = torch.from_numpy(encoded.tokens)[None]
            with torch.no_grad():
                by_hand.update(model(tokens, images=pixels(sample)).routing, (tokens != LAYOUT.image).long())
    assert found.layers
    for name, counts in found.layers.items():
        assert torch.equal(counts[:2], by_hand.layers[name][:2])
        assert int(counts[2].sum()) == 14  # top 1
    json.dumps(found.counts())
    assert plot_modalities(found, tmp_path / "experts.png")
    assert imread(tmp_path / "experts.png").shape[2] == 4
    assert {len(each) for each in found.counts().values()} == {len(MODALITIES)}


def test_a_dense_model_has_no_picture(tmp_path: Path) -> None:
    assert not plot_modalities(ModalityCounts(), tmp_path / "experts.png")
    assert not list(tmp_path.iterdir())


class Odd(Numbers):
    """Answers that no font can show, several pictures in a sample, and an answer without a question."""

    def sample(self, split: str, index: int) -> ImageText:
        parts = (Plain(index), Plain(index + 1, (2, 3), overview=True), Text("$x_1 \x00\u4e00?"))
        return ImageText((*parts, Text("$\u4e00\n", asked=True), Text("and?", asked=True)))


@pytest.mark.parametrize("samples", [Numbers(), Odd()])
def test_a_sheet(samples: Numbers, tmp_path: Path) -> None:
    plot_answers(seeing(), pictures_of(samples), tmp_path / "sheet.png", samples=4)
    sheet = imread(tmp_path / "sheet.png")
    assert sheet.shape[0] > 200 and sheet.shape[1] > 800
    assert sheet[..., :3].min() < 0.1  # dark pictures were drawn
    with pytest.raises(InputError, match="split 'nowhere'"):
        plot_answers(seeing(), pictures_of(samples), tmp_path / "other.png", splits=["nowhere"])


class Numbered(Picture):
    """Every tile has the value of its place."""

    grid = (2, 3)
    overview = True

    def tiles(self, rng: np.random.Generator | None) -> Pixels:
        return np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None, None, None], (7, 3, 4, 4))


def test_tiles_are_laid_out_again() -> None:
    whole = whole_picture(Numbered())
    assert whole.shape == (8, 12, 3)
    assert whole[::4, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (whole[4:, 4:8] == 4).all()
