"""Batches: every token once, the same after a resume, disjoint over ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import EvaluationLoader, TrainingLoader
from moesaic.errors import InputError


def stream(n: int) -> np.ndarray:  # type: ignore[type-arg]
    return np.arange(n, dtype=np.uint16)


def training(n: int = 100, **changes: int) -> TrainingLoader:
    return TrainingLoader(stream(n), **{"seq_len": 8, "batch_size": 2, "num_batches": 12, "seed": 0, **changes})  # type: ignore[arg-type]


def test_labels_are_the_tokens_one_further() -> None:
    for batch in training():
        assert batch["tokens"].shape == batch["labels"].shape == (2, 8)
        assert batch["tokens"].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["tokens"] + 1)


def test_an_epoch_sees_every_window_once_and_epochs_differ() -> None:
    loader = training(n=8 * 13, batch_size=1, num_batches=24)
    assert loader.windows_per_epoch == 11
    starts = [int(batch["tokens"][0, 0]) for batch in loader]
    first, second = starts[:11], starts[11:22]
    for epoch in (first, second):
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 88, 8))
        assert epoch != sorted(epoch)
    assert first != second


@pytest.mark.parametrize("fixed_windows", [False, True])
def test_starts_say_where_the_windows_are(fixed_windows: bool) -> None:
    for batch in training(n=203, fixed_windows=fixed_windows):
        assert batch["starts"].dtype == torch.int64
        assert torch.equal(batch["starts"], batch["tokens"][:, 0])  # token i of this stream is i


def test_fixed_windows_are_the_same_in_every_epoch_and_for_every_seed() -> None:
    n = 8 * 11 + 1  # eleven windows and the last label: not one more than needed
    orders = []
    for seed in (0, 1):
        loader = training(n=n, batch_size=1, num_batches=22, seed=seed, fixed_windows=True)
        assert loader.windows_per_epoch == 11
        starts = [int(batch["starts"]) for batch in loader]
        orders += [starts[:11], starts[11:]]
    for order in orders:
        assert sorted(order) == list(range(0, 88, 8))
    assert len({tuple(order) for order in orders}) == 4
    assert training(n=n + 7, fixed_windows=True).windows_per_epoch == 11
    assert training(n=n - 1, fixed_windows=True).windows_per_epoch == 10


def test_fixed_windows_resume_and_are_shared_by_ranks() -> None:
    whole = [batch["starts"] for batch in training(fixed_windows=True)]
    resumed = training(fixed_windows=True)
    resumed.load_state_dict({"next_batch": 5})
    assert all(torch.equal(a, b["starts"]) for a, b in zip(whole[5:], resumed, strict=True))
    shared = [training(batch_size=1, rank=rank, world_size=2, fixed_windows=True) for rank in (0, 1)]
    for i, starts in enumerate(whole):
        assert torch.equal(torch.cat([loader.batch(i)["starts"] for loader in shared]), starts)


def test_fixed_windows_need_one_window() -> None:
    training(n=9, fixed_windows=True)
    with pytest.raises(InputError, match=r"seq_len=8: the training split has 8 tokens; at least 9 are needed$"):
        training(n=8, fixed_windows=True)


@settings(deadline=None)
@given(seen=st.integers(0, 12), seed=st.integers(0, 3))
def test_resumed_loader_continues_as_if_never_stopped(seen: int, seed: int) -> None:
    whole = [batch["tokens"] for batch in training(seed=seed)]
    stopped = training(seed=seed)
    iterator = iter(stopped)
    for _ in range(seen):
        next(iterator)
    resumed = training(seed=seed)
    resumed.load_state_dict(stopped.state_dict())
    rest = [batch["tokens"] for batch in resumed]
    assert len(rest) == 12 - seen
    assert all(torch.equal(a, b) for a, b in zip(whole[seen:], rest, strict=True))


@settings(deadline=None)
@given(world=st.integers(1, 4), number=st.integers(0, 11))
def test_ranks_share_the_global_batch(world: int, number: int) -> None:
    alone = training(n=400, batch_size=2 * world).batch(number)["tokens"]
    shared = [training(n=400, rank=r, world_size=world).batch(number)["tokens"] for r in range(world)]
    assert torch.equal(torch.cat(shared), alone)


def test_seeds_give_other_orders() -> None:
    assert not torch.equal(training(seed=0).batch(0)["tokens"], training(seed=1).batch(0)["tokens"])


def test_too_short_a_stream_is_refused() -> None:
    training(n=17)
    with pytest.raises(InputError, match=r"training.seq_len=8: the training split has 16 tokens; at least 17"):
        training(n=16)


@settings(deadline=None)
@given(n=st.integers(2, 70), batch_size=st.integers(1, 5), seq_len=st.integers(1, 16), world=st.integers(1, 3))
def test_evaluation_predicts_every_token_but_the_first_once(n: int, batch_size: int, seq_len: int, world: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        loader = EvaluationLoader(stream(n), seq_len=seq_len, batch_size=batch_size, rank=rank, world_size=world)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert torch.equal(batch["valid"], batch["labels"] != -100)
            keep = batch["valid"]
            assert torch.equal(batch["starts"], batch["tokens"][:, 0])
            assert torch.equal(batch["labels"][keep], batch["tokens"][keep] + 1)
            seen += batch["labels"][keep].tolist()
    assert sorted(seen) == list(range(1, n))


def test_limited_evaluation_is_spread_over_the_stream() -> None:
    loader = EvaluationLoader(stream(1000), seq_len=10, batch_size=2, max_batches=3)
    starts = [int(row[0]) for batch in loader for row in batch["tokens"]]
    assert len(loader) == 3
    assert len(set(starts)) == 6
    assert starts[0] == 0
    assert starts[-1] >= 980
    assert [batch["tokens"].tolist() for batch in loader] == [batch["tokens"].tolist() for batch in loader]


def test_a_stream_shorter_than_a_window_is_not_padded_to_it() -> None:
    [batch] = EvaluationLoader(stream(12), seq_len=10**12, batch_size=4)
    assert batch["tokens"].tolist() == [list(range(11))]
    assert bool(batch["valid"].all())


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(InputError, match=r"has 1 tokens; at least 2 are needed"):
        EvaluationLoader(stream(1), seq_len=4, batch_size=1)
