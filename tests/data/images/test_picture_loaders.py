"""Batches of pictures and text: every sample once an epoch, pixels beside their tokens, a pure function of the seed."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_pictures import END_OF_TEXT, IMAGE, LAYOUT, Numbers

from moesaic.data.images import PictureEvaluationLoader, PictureTrainingLoader
from moesaic.data.images.packing import pack
from moesaic.data.loaders import Batch, rows_of
from moesaic.errors import InputError


def loader(samples: Numbers | None = None, **changes: int) -> PictureTrainingLoader:
    settings = {"seq_len": 64, "batch_size": 2, "num_batches": 20, "seed": 3, **changes}
    return PictureTrainingLoader(samples or Numbers(), LAYOUT, **settings)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def said(batch: Batch, row: int) -> list[int]:
    """The samples whose answers a row asks for, from its labels alone."""
    labels = batch["labels"][row]
    text = bytes(int(i) if i != END_OF_TEXT else 10 for i in labels[labels != -100])
    return [int(answer.split(b";")[0]) for answer in text.splitlines()]


def shown(batch: Batch, row: int) -> list[int]:
    """The samples whose pictures a row has, one for each tile, from the pixels alone."""
    images = batch["images"][batch["image_rows"] == row]
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(9, 20))
def test_rows_are_as_full_as_the_order_lets_them_be(lengths: list[int], seq_len: int) -> None:
    order = np.arange(len(lengths))[::-1].copy()
    rows = pack(np.array(lengths), order, seq_len)
    assert np.concatenate(rows).tolist() == order.tolist()
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= seq_len
    for row, following in zip(used, rows[1:], strict=False):
        assert row + lengths[following[0]] > seq_len


def test_pictures_stand_beside_the_answers_of_their_samples() -> None:
    seen: list[int] = []
    for batch in loader(num_batches=10):
        assert batch["tokens"].shape == batch["labels"].shape == batch["valid"].shape == (2, 64)
        assert batch["image_rows"].tolist() == sorted(batch["image_rows"].tolist())
        for row in range(2):
            answers = said(batch, row)
            tiles = [each for each in answers for _ in range(1 if each % 2 else 2)]
            assert shown(batch, row) == tiles
            assert int((batch["tokens"][row] == IMAGE).sum()) == 2 * len(tiles)
            seen += answers
    assert len(set(seen)) > 40


def test_labels_are_the_tokens_that_follow_and_padding_is_not_valid() -> None:
    batch = loader().batch(0)
    for tokens, labels, valid in zip(batch["tokens"], batch["labels"], batch["valid"], strict=True):
        used = int(valid.sum())
        assert valid[:used].all()
        assert (tokens[used:] == END_OF_TEXT).all()
        asked = (labels != -100).nonzero().flatten()
        assert asked.max() < used - 1
        assert torch.equal(labels[asked], tokens[asked + 1])


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_every_sample_once(packed: bool) -> None:
    loading = PictureTrainingLoader(
        Numbers(train=31), LAYOUT, seq_len=64, batch_size=1, num_batches=64, seed=0, packed=packed
    )
    answers = [each for batch in loading for each in said(batch, 0)]
    first, second = answers[:31], answers[31:62]
    assert sorted(first) == sorted(second) == list(range(31))
    assert first != second
    if not packed:
        assert answers == [said(loading.batch(i), 0)[0] for i in range(64)]


def test_batch_i_is_a_pure_function_of_seed_and_number() -> None:
    fresh = loader()
    for i in (17, 0, 12):  # in any order, over several epochs
        assert same(fresh.batch(i), loader().batch(i))
    assert not same(loader(seed=4).batch(0), loader().batch(0))
    assert not torch.equal(fresh.batch(0)["tokens"], fresh.batch(1)["tokens"])


def test_a_picture_is_augmented_in_another_way_in_every_epoch() -> None:
    batches = list(PictureTrainingLoader(Numbers(train=1), LAYOUT, seq_len=32, batch_size=1, num_batches=9, seed=0))
    assert len({float(batch["images"][0, 0, -1, -1]) for batch in batches}) > 3
    assert len({float(batch["images"][0, 0, 0, 0]) for batch in batches}) == 1


def test_a_resumed_loader_goes_on_where_it_was() -> None:
    whole = list(loader())
    first, second = loader(), loader()
    begun = [batch for batch, _ in zip(first, range(7), strict=False)]
    second.load_state_dict({"next_batch": 7})
    assert first.state_dict()["next_batch"] >= 7
    assert all(same(*pair) for pair in zip([*begun, *second], whole, strict=True))


def test_ranks_share_the_rows_of_a_batch() -> None:
    whole = loader(batch_size=4).batch(5)
    parts = [loader(batch_size=2, rank=rank, world_size=2).batch(5) for rank in (0, 1)]
    assert torch.equal(whole["tokens"], torch.cat([part["tokens"] for part in parts]))
    assert torch.equal(whole["images"], torch.cat([part["images"] for part in parts]))
    for part, first in zip(parts, (0, 2), strict=True):
        assert same(rows_of(whole, first, first + 2), part)


def test_rows_of_a_text_batch_are_slices() -> None:
    batch = {"tokens": torch.arange(12).view(4, 3), "labels": torch.arange(4)}
    assert same(rows_of(batch, 1, 3), {"tokens": batch["tokens"][1:3], "labels": batch["labels"][1:3]})


def evaluation(**changes: object) -> PictureEvaluationLoader:
    settings = {"seq_len": 64, "batch_size": 4, **changes}
    return PictureEvaluationLoader(Numbers(), LAYOUT, **settings)  # type: ignore[arg-type]


def test_every_test_sample_is_alone_in_its_row() -> None:
    batches = list(evaluation())
    assert len(batches) == len(evaluation()) == 3
    found = [
        (int(batch["splits"][row]), int(batch["samples"][row]), said(batch, row), sorted(set(shown(batch, row))))
        for batch in batches
        for row in range(len(batch["tokens"]))
    ]
    expected = [(1, i, [i], [i]) for i in range(7)] + [(2, i, [i], [i]) for i in range(3)]
    assert found == expected
    assert batches[0]["tokens"].shape[1] == max(LAYOUT.lengths([Numbers().sample("test", i) for i in range(4)]))
    assert [int(batch["samples"][0]) for batch in evaluation(splits=["other"], batch_size=1)] == [0, 1, 2]
    assert len(evaluation(max_batches=2, batch_size=2)) == 2


def test_shuffled_rows_have_the_pictures_of_others_and_all_else_of_their_own() -> None:
    for plain, shuffled in zip(evaluation(), evaluation(shuffled=True), strict=True):
        for row in range(len(plain["tokens"])):
            assert said(shuffled, row) == said(plain, row)
            assert shown(shuffled, row) != shown(plain, row)
            assert len(shown(shuffled, row)) == len(shown(plain, row))
        assert torch.equal(plain["tokens"], shuffled["tokens"])


def test_a_sample_without_another_to_swap_with_keeps_its_pictures() -> None:
    one = PictureEvaluationLoader(Numbers(test=1, other=0), LAYOUT, seq_len=64, batch_size=1, shuffled=True)
    assert shown(next(iter(one)), 0) == [0, 0]


def test_what_does_not_fit_is_refused() -> None:
    longest = max(LAYOUT.lengths([Numbers().sample("train", i) for i in range(50)]))
    loader(seq_len=longest)
    with pytest.raises(InputError, match=rf"training\.seq_len={longest - 1}: must be at least {longest}, the tokens "):
        loader(seq_len=longest - 1)
    with pytest.raises(InputError, match="no samples to train on"):
        loader(Numbers(train=0))
    with pytest.raises(InputError, match="split 'tset': must be one of train, test, other"):
        evaluation(splits=["tset"])
    with pytest.raises(InputError, match="no samples in test; must have some"):
        PictureEvaluationLoader(Numbers(test=0), LAYOUT, seq_len=64, batch_size=1, splits=["test"])
    with pytest.raises(InputError, match=r"training\.validation_seq_len=9"):
        next(iter(evaluation(seq_len=9)))


@pytest.mark.slow
def test_importing_data_loads_neither_pillow_nor_matplotlib() -> None:
    program = (
        "import sys, moesaic.data; print(sorted({'PIL', 'matplotlib', 'datasets', 'fontTools'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
