"""Pairs for contrastive training: balanced by the rule, pure batches, and what is refused."""

import numpy as np
import pytest
import torch
from small_pictures import LAYOUT, Numbers

from moesaic.data.images import TRAIN, ImageText, Text
from moesaic.data.images.pairs import PairEvaluationLoader, PairTrainingLoader, concept_probabilities, curated
from moesaic.errors import InputError

END = LAYOUT.tokenizer.end_of_text


class Pairs(Numbers):
    """Sample i is a picture of value i and a text; every third text is the same."""

    def sample(self, split: str, index: int) -> ImageText:
        picture = super().sample(split, 2 * (index // 2) + 1).pictures[0]  # the odd ones have one tile
        return ImageText((picture, Text("COMMON" if index % 3 == 0 else f"COMMON {index}", asked=True)))


def loader(seed: int = 0, **changes: object) -> PairTrainingLoader:
    given = {"seq_len": 12, "batch_size": 8, "num_batches": 20, "seed": seed, **changes}
    return PairTrainingLoader(Pairs(), LAYOUT, **given)  # type: ignore[arg-type]


def test_a_concept_has_about_as_many_texts_as_its_cap() -> None:
    texts = ["LETTER A"] * 60 + ["LETTER B B"] * 30 + ["DIGIT C"] * 10
    found = concept_probabilities(texts, 30)
    assert found[0] == (30 / 90, 0.5)
    assert found[60] == (30 / 90, 1.0)  # a repeated word counts once
    assert found[90] == (1.0, 1.0)
    rng = np.random.default_rng(0)
    kept = np.array([np.bincount(curated(found, rng) // 10, minlength=10) for _ in range(400)]).mean(axis=0)
    # a text is kept if any of its concepts chooses it
    np.testing.assert_allclose(kept, [10 * (1 - 2 / 3 / 2)] * 6 + [10.0] * 4, atol=0.3)


def test_batches_are_pure_and_resumed() -> None:
    whole, other = list(loader(cap=20)), loader(cap=20)
    assert all(torch.equal(whole[7][key], other.batch(7)[key]) for key in whole[7])
    first = loader(cap=20)
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    other.load_state_dict(first.state_dict())
    for expected, found in zip(whole[5:], other, strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert not torch.equal(whole[0]["tokens"], next(iter(loader(seed=1, cap=20)))["tokens"])


def test_an_epoch_has_every_pair_once() -> None:
    seen = torch.cat([batch["images"][:, 0, 0, 0] for batch in loader(batch_size=10, num_batches=5)])
    values = sorted(((seen + 1) * 127.5).round().int().tolist())
    assert values == sorted(2 * (i // 2) + 1 for i in range(50))


def test_a_row_is_a_text_whose_end_has_the_label() -> None:
    batch = loader().batch(0)
    for tokens, labels, valid in zip(batch["tokens"], batch["labels"], batch["valid"], strict=True):
        [end] = (labels != -100).nonzero().flatten().tolist()
        assert tokens[end] == labels[end] == END
        assert not bool((tokens[:end] == END).any())
        assert int(valid.sum()) == end + 1
    texts = [tuple(row.tolist()) for row in batch["tokens"]]
    groups = batch["groups"].tolist()
    assert all((texts[i] == texts[j]) == (groups[i] == groups[j]) for i in range(8) for j in range(8))
    assert batch["images"].shape == (8, 1, 8, 8)


def test_test_splits_are_spread_over_batches() -> None:
    evaluation = PairEvaluationLoader(Pairs(), LAYOUT, seq_len=12, batch_size=4)
    assert [len(batch["tokens"]) for batch in evaluation] == [4, 3, 3]
    assert len(evaluation) == 3
    few = PairEvaluationLoader(Pairs(), LAYOUT, seq_len=12, batch_size=4, splits=["other"], max_batches=1)
    assert [len(batch["tokens"]) for batch in few] == [3]


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"training.seq_len=6: .* must be at least \d+"):
        loader(seq_len=6).batch(0)
    with pytest.raises(InputError, match=r"training.batch_size=51: an epoch has 50 pairs"):
        loader(batch_size=51)
    with pytest.raises(InputError, match="is no pair of one tile and one text"):
        PairTrainingLoader(Numbers(), LAYOUT, seq_len=30, batch_size=4, num_batches=1, seed=0).batch(0)
    with pytest.raises(InputError, match="no pair in other"):
        PairEvaluationLoader(Pairs(other=0), LAYOUT, seq_len=12, batch_size=4, splits=["other"])
    assert Pairs().size(TRAIN) == 50
