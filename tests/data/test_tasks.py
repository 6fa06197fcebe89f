"""Recall tasks: hand-checked sequences, answers that stand in them, disjoint splits, pure functions of the seed."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.config import from_mapping, to_mapping
from moesaic.data import DataConfig, TaskEvaluationLoader, TaskTrainingLoader, load_data
from moesaic.data.tasks import AssociativeRecall, Biographies, Example, Induction, RecallTask, SelectiveCopying
from moesaic.data.tasks.associative_recall import associative_recall
from moesaic.data.tasks.biographies import biographies
from moesaic.data.tasks.induction import induction
from moesaic.data.tasks.selective_copying import selective_copying
from moesaic.data.tasks.task import distance_bucket, split_of
from moesaic.errors import InputError

TASKS = [AssociativeRecall(), SelectiveCopying(), Induction()]
BY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def test_associative_recall_by_hand() -> None:
    """Keys 0 to 9, values 10 to 19, filler 20; key 7 is asked for at 9, three places from the end, key 2 at 6."""
    example = associative_recall(keys=ints(7, 2), values=ints(13, 11), places=ints(9, 6), fillers=np.full(8, 20))
    assert example.tokens.tolist() == [7, 13, 2, 11, 20, 20, 2, 20, 20, 7, 20, 20]
    no = -100
    assert example.labels.tolist() == [no, no, no, no, no, no, 11, no, no, 13, no, no]
    assert example.slices["pairs"].tolist() == [-1, -1, -1, -1, -1, -1, 2, -1, -1, 2, -1, -1]
    assert example.slices["distance"][[6, 9]].tolist() == [4, 16]  # 6 - 2 = 4 and 9 - 0, rounded up
    assert example.content.tolist() == [2, 11, 7, 13]  # by key: the order of the pairs makes no other assignment


def test_selective_copying_by_hand() -> None:
    example = selective_copying(ints(3, 1, 3), ints(0, 4, 5), 10, blank_id=4, marker=5)
    assert example.tokens.tolist() == [3, 4, 4, 4, 1, 3, 4, 5, 5, 5]
    assert example.labels.tolist() == [-100] * 7 + [3, 1, 3]
    assert example.slices["copies"].tolist() == [-1] * 7 + [3, 3, 3]
    assert example.slices["place"].tolist() == [-1] * 7 + [0, 1, 2]
    assert example.slices["distance"].tolist() == [-1] * 7 + [8, 4, 4]  # 7, 4 and 4


def test_induction_by_hand() -> None:
    """Ordinary tokens 0 to 3; trigger 4 is followed by 1, trigger 5 by 3."""
    example = induction(ints(0, 2, 1, 2, 2, 3, 0, 0, 2, 2), ints(4, 5), first=ints(1, 4), second=ints(8, 6))
    assert example.tokens.tolist() == [0, 4, 1, 2, 5, 3, 5, 3, 4, 1]
    no = -100
    assert example.labels.tolist() == [no, no, no, no, no, no, 3, no, 1, no]
    assert example.slices["distance"][[6, 8]].tolist() == [2, 8]  # 2 and 7
    assert example.slices["triggers"][[6, 8]].tolist() == [2, 2]


def test_distances_are_rounded_up_to_powers_of_two() -> None:
    assert distance_bucket(ints(1, 2, 3, 4, 5, 8, 9, 1023, 1024, 1025)).tolist() == [
        *(1, 2, 4, 4, 8, 8, 16, 1024, 1024, 2048)
    ]


def answers(task: RecallTask, tokens: list[int]) -> dict[int, int]:
    """What a reader who knows the rules answers, from the tokens alone: place -> answer."""
    if isinstance(task, SelectiveCopying):
        data = [token for token in tokens if token < task.values]
        return dict(enumerate(data, start=len(tokens) - len(data)))
    is_cue = (lambda t: t < task.keys) if isinstance(task, AssociativeRecall) else (lambda t: t >= task.values)  # type: ignore[attr-defined]
    seen: dict[int, int] = {}
    found = {}
    for place, (token, following) in enumerate(itertools.pairwise([*tokens, -1])):
        if is_cue(token) and token in seen:
            found[place] = seen[token]
        elif is_cue(token):
            seen[token] = following
    return found


@BY_TASK
@pytest.mark.parametrize("seq_len", [24, 64, 300])
def test_every_answer_stands_in_the_sequence_and_nothing_else_is_asked(task: RecallTask, seq_len: int) -> None:
    for index in range(20):
        example = task.example("train", 3, index, seq_len)
        assert example.tokens.shape == example.labels.shape == (seq_len,)
        assert 0 <= example.tokens.min() <= example.tokens.max() < task.vocab_size
        size = task.sizes[index % len(task.sizes)]
        asked = np.flatnonzero(example.labels != -100)
        assert answers(task, example.tokens.tolist()) == dict(
            zip(asked.tolist(), example.labels[asked].tolist(), strict=True)
        )
        assert len(asked) == size
        for name, values in example.slices.items():
            assert values.shape == (seq_len,), name
            np.testing.assert_array_equal(np.flatnonzero(values >= 0), asked, err_msg=name)


@BY_TASK
@given(index=st.integers(0, 10_000))
def test_the_shortest_sequence_has_room(task: RecallTask, index: int) -> None:
    size = task.sizes[index % len(task.sizes)]
    example = task.example("train", 0, index, task.min_length(size))
    assert (example.labels != -100).sum() == size


def same(first: Example, second: Example) -> bool:
    return np.array_equal(first.tokens, second.tokens) and np.array_equal(first.labels, second.labels)


@BY_TASK
def test_a_sequence_is_a_pure_function_of_seed_and_number(task: RecallTask) -> None:
    first = task.example("train", 0, 5, 64)
    assert same(first, task.example("train", 0, 5, 64))
    assert not same(first, task.example("train", 1, 5, 64))
    assert not same(first, task.example("train", 0, 7, 64))
    assert not same(first, task.example("test", 0, 5, 64))


def test_the_split_of_a_content_never_changes() -> None:
    """Else what was trained on yesterday is tested on today."""
    assert [i for i in range(60) if split_of(ints(i, i + 1)) == "test"] == [7, 11, 18, 19, 33, 37, 44, 49, 57]


@pytest.mark.slow_but_for("Induction")
@BY_TASK
def test_both_splits_have_every_size_and_each_its_own_contents(task: RecallTask) -> None:
    """Of tasks so small that their contents come again and again within a split."""
    small = {
        AssociativeRecall: AssociativeRecall(pairs=(2,), keys=4, values=3),
        SelectiveCopying: SelectiveCopying(copies=(3,), values=4),
        Induction: Induction(triggers=(1,), values=2),
    }[type(task)]
    contents = {
        split: [
            tuple(small.example(split, seed, index, 7 if isinstance(task, Induction) else 9).content)
            for seed in (0, 1)
            for index in range(400)
        ]
        for split in ("train", "test")
    }
    for found in contents.values():
        assert len(set(found)) < len(found) / 2  # there was occasion for an overlap
    assert not set(contents["train"]) & set(contents["test"])


def test_the_order_of_pairs_does_not_carry_an_assignment_to_the_other_split() -> None:
    one = associative_recall(ints(7, 2), ints(13, 11), ints(9, 6), np.full(8, 20))
    other = associative_recall(ints(2, 7), ints(11, 13), ints(4, 5), np.full(30, 20))
    assert split_of(one.content) == split_of(other.content)


def test_a_split_without_sequences_is_refused() -> None:
    """4 contents, none of which falls to test by its hash: said at once instead of looking for ever."""
    with pytest.raises(InputError, match=r"too few different sequences of size 1: none of 1000 belongs to test"):
        TaskTrainingLoader(SelectiveCopying(copies=(1,), values=3), seq_len=8, batch_size=1, num_batches=1, seed=0)


@BY_TASK
def test_training_batches_are_a_function_of_seed_and_number_and_resume(task: RecallTask) -> None:
    settings = {"seq_len": 40, "batch_size": 3, "num_batches": 6}
    whole = TaskTrainingLoader(task, seed=0, **settings)
    assert len(whole) == 6
    batches = list(whole)
    for batch in batches:
        for name, value in batch.items():
            assert value.shape == (3, 40), name
        assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
        assert batch["valid"].all()
    resumed = TaskTrainingLoader(task, seed=0, **settings)
    for _ in zip(range(2), resumed, strict=False):
        pass
    later = TaskTrainingLoader(task, seed=0, **settings)
    later.load_state_dict({"next_batch": 4})
    assert [torch.equal(a["tokens"], b["tokens"]) for a, b in zip(later, batches[4:], strict=True)] == [True, True]
    rows = {tuple(row.tolist()) for batch in batches for row in batch["tokens"]}
    assert len(rows) == 18
    other = {tuple(row.tolist()) for batch in TaskTrainingLoader(task, seed=1, **settings) for row in batch["tokens"]}
    assert not rows & other


def test_ranks_share_a_global_batch() -> None:
    task = AssociativeRecall()
    alone = TaskTrainingLoader(task, seq_len=32, batch_size=4, num_batches=2, seed=0).batch(1)["tokens"]
    halves = [
        TaskTrainingLoader(task, seq_len=32, batch_size=2, num_batches=2, seed=0, rank=rank, world_size=2).batch(1)
        for rank in (0, 1)
    ]
    assert torch.equal(alone, torch.cat([half["tokens"] for half in halves]))


def test_the_test_set_depends_on_nothing_but_task_and_length() -> None:
    task = AssociativeRecall(test_sequences=10)
    sets = [
        torch.cat([batch["tokens"] for batch in TaskEvaluationLoader(task, seq_len=48, batch_size=batch_size)])
        for batch_size in (1, 4, 64)
    ]
    assert sets[0].shape == (10, 48)
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], sets[2])
    few = TaskEvaluationLoader(task, seq_len=48, batch_size=4, max_batches=2)
    assert len(few) == len(list(few)) == len(list(few)) == 2  # again and again
    assert len(TaskEvaluationLoader(task, seq_len=48, batch_size=4, max_batches=9)) == 3


def test_longer_test_sequences_ask_further_back_or_for_more() -> None:
    def asked(growth: int) -> tuple[set[int], int]:
        [batch] = TaskEvaluationLoader(task, seq_len=256, batch_size=64, growth=growth)
        where = batch["labels"] != -100
        return set(batch["slices/pairs"][where].tolist()), int(batch["slices/distance"].max())

    task = AssociativeRecall(pairs=(2, 4), test_sequences=32, grow_with_length=True)
    assert asked(1) == ({2, 4}, 256)
    assert asked(4) == ({8, 16}, 256)
    assert task.growth(4) == 4
    assert AssociativeRecall().growth(4) == 1
    grown = Induction(triggers=(2,), values=5, test_multiples=(1, 3), grow_with_length=True)
    assert grown.vocab_size == 5 + 6
    seen = torch.cat([batch["tokens"].flatten() for batch in TaskTrainingLoader(
        grown, seq_len=20, batch_size=50, num_batches=1, seed=0)])  # fmt: skip
    assert set(seen.tolist()) == set(range(11))  # what longer tests need has been trained


def test_biographies_by_hand() -> None:
    """Names of ids 0 to 2, values 3 to 5, filler 6; two people and two places left."""
    example = biographies(np.array([[0, 2], [1, 1]]), np.array([[3, 5, 4], [4, 4, 3]]), 12, filler=6)
    assert example.tokens.tolist() == [0, 2, 3, 5, 4, 1, 1, 4, 4, 3, 6, 6]
    no = -100
    assert example.labels.tolist() == [no, 3, 5, 4, no, no, 4, 4, 3, no, no, no]
    assert example.slices["attribute"].tolist() == [-1, 0, 1, 2, -1, -1, 0, 1, 2, -1, -1, -1]


def people_in(batches: list[dict[str, torch.Tensor]], task: Biographies) -> list[tuple[int, ...]]:
    """Every biography of some batches, in order."""
    rows = torch.cat([batch["tokens"] for batch in batches])
    together = rows[:, : rows.size(1) // task.length * task.length].reshape(-1, task.length)
    return [tuple(each) for each in together.tolist() if each[0] < task.name_parts]


def test_an_epoch_has_every_person_once_and_so_has_the_test_set() -> None:
    task = Biographies(people=10, attributes=3, values=5, name_parts=4)
    everyone = people_in(list(TaskEvaluationLoader(task, seq_len=16, batch_size=2)), task)  # three to a sequence
    assert len(everyone) == len(set(everyone)) == 10
    assert len({person[:2] for person in everyone}) == 10, "no two people have one name"
    whole = TaskTrainingLoader(task, seq_len=16, batch_size=1, num_batches=12, seed=0)
    epochs = [people_in([whole.batch(i) for i in range(4 * e, 4 * e + 4)], task) for e in range(3)]
    assert all(set(epoch) == set(everyone) and len(epoch) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, everyone]}) == 4, "in another order each time"
    other = TaskTrainingLoader(task, seq_len=16, batch_size=4, num_batches=1, seed=1)
    seen = people_in([other.batch(0)], task)
    assert set(seen) == set(everyone) and seen != epochs[0], "a seed changes the order, not the people"


def test_a_biography_needs_its_length() -> None:
    with pytest.raises(InputError, match=r"^training\.seq_len=9: must be at least 10, the tokens of a biography"):
        TaskTrainingLoader(Biographies(), seq_len=9, batch_size=1, num_batches=1, seed=0)
    assert TaskTrainingLoader(Biographies(), seq_len=10, batch_size=2, num_batches=1, seed=0).batch(0)


def test_data_of_a_task() -> None:
    config = from_mapping(DataConfig, {"source": "associative_recall", "task": {"keys": 10, "pairs": [3]}}, "data")
    data = load_data(config)
    assert data.task == AssociativeRecall(keys=10, pairs=(3,))
    assert data.vocab_size == 10 + 64 + 8
    assert data.tokenizer is None
    assert data.facts["source"] == "associative_recall"
    assert from_mapping(DataConfig, to_mapping(config), "data") == config
    other = load_data(from_mapping(DataConfig, {"source": "associative_recall", "task": {"keys": 11}}, "data"))
    assert other.facts["content_hash"] != data.facts["content_hash"]
    assert DataConfig(source="induction").make_task() == Induction()
    assert DataConfig().make_task() is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"source": "associative_recall", "task": {"pairs": [4, 65]}},
            r"data\.task\.pairs=\[4, 65\]: a sequence has up to 65 different keys, but the vocabulary has keys=64",
        ),
        (
            {"source": "associative_recall", "task": {"pairs": [8], "grow_with_length": True}},
            r"data\.task\.pairs=\[8\]: a sequence with grow_with_length has up to 128 different keys.* keys=64",
        ),
        ({"source": "associative_recall", "task": {"pairs": []}}, r"data\.task\.pairs=\[\]: must be one or more"),
        ({"source": "associative_recall", "task": {"pairs": [3, 3]}}, r"data\.task\.pairs=\[3, 3\]: .* different"),
        ({"source": "associative_recall", "task": {"values": 1}}, r"data\.task\.values=1: must be a number >= 2"),
        ({"source": "associative_recall", "task": {"fillers": 0}}, r"data\.task\.fillers=0: must be a number >= 1"),
        (
            {"source": "selective_copying", "task": {"copys": [3]}},
            r"data\.task\.copys: unknown key \(did you mean data\.task\.copies\?\); must be .*copies, values",
        ),
        ({"source": "selective_copying", "task": {"copies": [0]}}, r"data\.task\.copies=\[0\]: .* numbers >= 1"),
        ({"source": "selective_copying", "task": {"values": 1}}, r"data\.task\.values=1: must be a number >= 2"),
        ({"source": "induction", "task": {"triggers": 4}}, r"data\.task\.triggers: found 4 \(int\); must be a list"),
        ({"source": "induction", "task": {"values": 1}}, r"data\.task\.values=1: must be a number >= 2"),
        ({"source": "induction", "task": {"test_multiples": [4]}}, r"data\.task\.test_multiples=\[4\]: 1 has to be"),
        ({"source": "induction", "task": {"test_sequences": 0}}, r"data\.task\.test_sequences=0: must be"),
        (
            {"source": "biographies", "task": {"people": 17, "name_parts": 4}},
            r"data\.task\.people=17: must be at most 16, so many names can be made of name_length=2 of name_parts=4",
        ),
        ({"source": "biographies", "task": {"values": 1}}, r"data\.task\.values=1: must be a number >= 2"),
        ({"source": "biographies", "task": {"test_sequences": 4}}, r"data\.task\.test_sequences: unknown key"),
        ({"source": "stdlib", "task": {"pairs": [4]}}, r"data\.task=.*: source=stdlib takes none; it is for assoc"),
        ({"source": "recall"}, r"data\.source: found 'recall' \(str\); must be stdlib .* induction"),
        ({"source": "induction", "path": "x"}, r"data\.path='x': source=induction takes none"),
    ],
)
def test_bad_config_names_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(DataConfig, values, "data")


@pytest.mark.parametrize(
    ("task", "too_short"),
    [(AssociativeRecall(pairs=(2, 9)), 26), (SelectiveCopying(copies=(9,)), 17), (Induction(triggers=(9,)), 35)],
    ids=lambda value: type(value).__name__,
)
def test_too_much_for_the_length(task: RecallTask, too_short: int) -> None:
    with pytest.raises(InputError, match=rf"^training\.seq_len={too_short}: .* size 9 .* at least {too_short + 1} tok"):
        TaskTrainingLoader(task, seq_len=too_short, batch_size=1, num_batches=1, seed=0)
    TaskTrainingLoader(task, seq_len=too_short + 1, batch_size=1, num_batches=1, seed=0)
    with pytest.raises(InputError, match=rf"^training\.validation_seq_len={too_short}: "):
        TaskEvaluationLoader(task, seq_len=too_short, batch_size=1)
