"""Parts of tensors and the whole of them, also where ranks do not divide the sizes, and a rank holds nothing."""

import pytest
import torch
from torch import Tensor, distributed

from moesaic.models import build_decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.workers import Workers
from moesaic.training.parallel_check import MODELS


def round_trip(expert: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], int]:
    """Whole weights before and after a decoder is spread, and after others are loaded; the numbers held here."""
    from moesaic.parallel.apply import parallelize
    from moesaic.parallel.shards import held, load_shards, shard_like, whole

    torch.manual_seed(0)
    decoder = build_decoder(MODELS["few experts, odd width, convolutions"], dtype=torch.float64)
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    parallelize(decoder, ParallelConfig(expert=expert), torch.device("cpu"))
    spread = {name: whole(value).clone() for name, value in decoder.state_dict().items()}
    for name, weight in decoder.named_parameters():  # as moments are, when a run goes on
        again = shard_like(before[name], weight)
        assert torch.equal(held(again), held(weight)) and torch.equal(whole(again), before[name])
    load_shards(decoder, {name: value + 1 for name, value in before.items()})
    loaded = {name: whole(value).clone() for name, value in decoder.state_dict().items()}
    return before, spread, loaded, sum(held(each).numel() for each in decoder.parameters())


@pytest.mark.slow_but_for("2-2")
@pytest.mark.parametrize(("ranks", "expert"), [(4, 1), (4, 2), (2, 2)])
def test_what_is_spread_is_whole_again(workers: Workers, ranks: int, expert: int) -> None:
    results = workers.run(round_trip, ranks, expert)
    before, spread, loaded, _ = results[0]
    for name, value in before.items():
        assert torch.equal(spread[name], value), name
        assert torch.equal(loaded[name], value + 1), name
    held = [result[3] for result in results]
    assert sum(held) == sum(value.numel() for name, value in before.items() if not name.endswith("expert_bias"))


def fail_on_one() -> int:
    if distributed.get_rank() == 1:
        raise ValueError("of this rank alone")
    distributed.barrier()
    return 0


def answer() -> int:
    return distributed.get_rank()


def test_a_rank_that_fails_is_told_and_the_next_job_has_new_ranks() -> None:
    pool = Workers(count=2, patience=30)
    try:
        with pytest.raises(RuntimeError, match=r"rank 1 of 2:\n(.*\n)*.*of this rank alone"):
            pool.run(fail_on_one, 2)
        assert pool.run(answer, 2) == [0, 1]
        with pytest.raises(ValueError, match="ranks=3: must be 1 to 2"):
            pool.run(answer, 3)
    finally:
        pool.close()
