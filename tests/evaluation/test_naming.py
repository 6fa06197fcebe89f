"""What is said of held-out pictures: each number against its definition, sample by sample."""

import math
from collections import Counter

import pytest
import torch
from seeing import LAYOUT, log_probabilities, pictures_of, pixels, seeing
from small_pictures import Numbers
from torch import Tensor

from moesaic.data.images import TRAIN, ImageText, Text
from moesaic.errors import InputError
from moesaic.evaluation.naming import Answer, answers, name_scores, naming_numbers, ranks, some_of
from moesaic.evaluation.reading_back import character_error_rate
from moesaic.models import MultimodalDecoder


class OneName(Numbers):
    """Each sample asks for a name; samples 2 and 3 have the same one, and sample 4 another that is right too."""

    def sample(self, split: str, index: int) -> ImageText:
        [*before, _] = super().sample(split, index).parts
        also = frozenset({"11"}) if index == 4 else frozenset[str]()
        return ImageText((*before, Text(str(index // 2) * (index // 2 + 1), asked=True, also=also)))


class TwoQuestions(Numbers):
    def sample(self, split: str, index: int) -> ImageText:
        return ImageText((*super().sample(split, index).parts, Text(" more? "), Text(f"{index}!", asked=True)))


@pytest.fixture(scope="module")
def model() -> MultimodalDecoder:
    torch.manual_seed(0)
    return seeing()


def said_slowly(model: MultimodalDecoder, given: ImageText, most: int) -> str:
    """The likeliest id again and again, without a cache."""
    [encoded] = LAYOUT.encode([given])
    tokens, new = torch.from_numpy(encoded.tokens), list[int]()
    for _ in range(most):
        logits = model(torch.cat((tokens, torch.tensor(new, dtype=torch.int64)))[None], images=pixels(given)).logits
        logits[0, -1, LAYOUT.image] = -math.inf
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == LAYOUT.tokenizer.end_of_text:
            break
    return LAYOUT.tokenizer.decode([each for each in new if each < 257]).decode(errors="replace")


def test_numbers_by_their_definition(model: MultimodalDecoder) -> None:
    samples = OneName()
    numbers = naming_numbers(model, pictures_of(samples), splits=["test"], batch_size=3)
    given = [samples.sample("test", i) for i in range(7)]
    names = [sample.texts[-1].text for sample in given]
    characters = sum(map(len, names))
    nats = 0.0
    for sample in given:
        likely, asked = log_probabilities(model, sample, sample)
        nats -= float(likely[asked].sum())
    found = {name.removeprefix("pictures/test/"): value for name, value in numbers.items()}
    assert found["samples"] == 7
    assert found["bits_per_character"] == pytest.approx(nats / math.log(2) / characters, rel=1e-5)
    assert found["bits_per_byte"] == found["bits_per_character"]
    said = [said_slowly(model, ImageText(sample.parts[:-1]), 5) for sample in given]
    right = [{sample.texts[-1].text, *sample.texts[-1].also} for sample in given]
    assert found["exact"] == sum(one in those for one, those in zip(said, right, strict=True)) / 7
    assert found["exact_chance"] == 3 / 7  # "11" of samples 2 and 3 is right for 4 too
    assert found["character_error_rate"] == character_error_rate(said, names)
    assert found["candidates"] == len(set(names)) == 4


def test_chance_is_counted_from_training(model: MultimodalDecoder) -> None:
    samples = OneName(train=6)
    numbers = naming_numbers(model, pictures_of(samples), splits=["other"])
    train = [samples.sample(TRAIN, i).texts[-1].text for i in range(6)]
    alone, after = Counter[str](), Counter[str]()
    for name in train:  # | is the end
        alone.update(f"{name}|")
        after.update(one + other for one, other in zip(f"|{name}", f"{name}|", strict=True))
    unigram = bigram = 0.0
    test = [samples.sample("other", i).texts[-1].text for i in range(3)]
    for name in test:
        unigram -= sum(math.log2((1 + alone[each]) / (257 + alone.total())) for each in f"{name}|")
        for before, each in zip(f"|{name}", f"{name}|", strict=True):
            of = sum(n for pair, n in after.items() if pair[0] == before)
            bigram -= math.log2((1 + after[before + each]) / (257 + of))
    characters = sum(map(len, test))
    assert numbers["pictures/other/bits_per_character_unigram"] == pytest.approx(unigram / characters)
    assert numbers["pictures/other/bits_per_character_bigram"] == pytest.approx(bigram / characters)


def test_shuffled_pictures_are_those_of_others(model: MultimodalDecoder) -> None:
    """With two samples each has the picture of the other."""
    samples = Numbers(test=4, other=0)  # 1 and 3 have one tile, 0 and 2 have two
    numbers = naming_numbers(model, pictures_of(samples))
    given = [samples.sample("test", i) for i in range(4)]
    nats, characters = 0.0, sum(len(sample.texts[-1].text) for sample in given)
    for i, sample in enumerate(given):
        likely, asked = log_probabilities(model, sample, given[(i + 2) % 4])
        nats -= float(likely[asked].sum())
    assert numbers["pictures/test/bits_per_character_shuffled"] == pytest.approx(nats / math.log(2) / characters)
    assert numbers["pictures/test/bits_per_character_shuffled"] != numbers["pictures/test/bits_per_character"]
    assert not [name for name in numbers if name.startswith("pictures/other/")]  # it has no samples


@pytest.mark.slow_but_for("2")
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_are_those_of_one_at_a_time(model: MultimodalDecoder, batch_size: int) -> None:
    samples = TwoQuestions()
    found = answers(model, pictures_of(samples), "test", samples=9, batch_size=batch_size)
    chosen = some_of(samples, ["test"], 9)
    assert len(found) == 14
    for i, answer in enumerate(found):
        whole = chosen.sample("test", i // 2)
        assert answer.sample.parts == whole.parts[: 4 if i % 2 else 2]
        assert answer.right == whole.parts[4 if i % 2 else 2]
        assert answer.said == said_slowly(model, answer.sample, 11)


def test_an_answer_may_be_another_name_of_the_picture() -> None:
    right = Text("LATIN SMALL LETTER A", asked=True, also=frozenset({"CYRILLIC SMALL LETTER A"}))
    for said, is_right in ((right.text, True), ("CYRILLIC SMALL LETTER A", True), ("LATIN SMALL LETTER", False)):
        assert Answer(ImageText(()), right, said).is_right == is_right


def test_scores_are_log_probabilities(model: MultimodalDecoder) -> None:
    samples = [Numbers().sample("test", i) for i in range(4)]
    before, names = [ImageText(sample.parts[:-1]) for sample in samples], ["a", "bcd", "", "ef"]
    found = name_scores(model, LAYOUT, before, names, batch_size=3)
    for row, sample in enumerate(before):
        for column, name in enumerate(names):
            likely, asked = log_probabilities(model, ImageText((*sample.parts, Text(name, asked=True))), sample)
            assert float(found[row, column]) == pytest.approx(float(likely[asked].sum()), abs=1e-4)


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 4.0]])
    right = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]]).bool()
    found = ranks(scores, right)
    # 1; 3; 2, as it is like both others; 1, and the other right name is in no one's way
    assert found.median == 1.5
    assert found.recall_at_1 == 0.5
    assert found.median_chance == 2.0  # 2, 2, 2, and 4 / 3 of two right ones
    assert found.recall_at_1_chance == pytest.approx((3 * 1 / 3 + 2 / 3) / 4)


def test_equal_scores_are_chance() -> None:
    right = torch.eye(5).bool()
    assert ranks(torch.zeros(5, 5), right).median == ranks(torch.zeros(5, 5), right).median_chance == 3


def test_several_questions_have_no_rank(model: MultimodalDecoder) -> None:
    numbers = naming_numbers(model, pictures_of(TwoQuestions()), samples=2)
    assert not [name for name in numbers if "rank" in name or "recall" in name]
    assert all(math.isfinite(value) for value in numbers.values())


def test_samples_are_always_the_same_ones() -> None:
    samples = Numbers(test=50)

    def of(number: int) -> list[str]:
        chosen = some_of(samples, ["test"], number)
        return [chosen.sample("test", i).texts[-1].text for i in range(chosen.size("test"))]

    assert of(20) == of(20) == of(50)[:20]
    assert len(set(of(50))) == len(of(99)) == 50
    assert of(50) != [samples.sample("test", i).texts[-1].text for i in range(50)]


@pytest.mark.parametrize(
    ("splits", "number", "message"),
    [(["nowhere"], 3, "split 'nowhere': must be one of train, test, other"), (["test"], 0, "samples=0: must be"),
     (["other"], 3, "split 'other': it has no samples")],
)  # fmt: skip
def test_what_is_refused(splits: list[str], number: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        some_of(Numbers(other=0), splits, number)


@pytest.mark.parametrize(
    ("scores", "right"),
    [(torch.zeros(2, 3), torch.zeros(2, 3).bool()), (torch.zeros(3), torch.ones(3).bool()),
     (torch.zeros(2, 3), torch.ones(3, 2).bool())],
)  # fmt: skip
def test_ranks_need_a_right_name(scores: Tensor, right: Tensor) -> None:
    with pytest.raises(ValueError, match="must be \\(pictures, names\\)"):
        ranks(scores, right)


def test_a_model_in_training_stays_in_training(model: MultimodalDecoder) -> None:
    model.train()
    naming_numbers(model, pictures_of(OneName()), samples=2)
    assert model.training
    model.eval()
