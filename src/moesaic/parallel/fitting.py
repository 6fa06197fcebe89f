"""Small changes that make a training fit, found by planning each."""

import dataclasses
from collections.abc import Iterator

from moesaic.errors import InputError
from moesaic.parallel.plan import Plan, Setup, plan

__all__ = ["MOST_RANKS", "all_changes", "changes_that_fit"]

MOST_RANKS = 4096
"""Up to which more devices are tried."""


def changes_that_fit(setup: Setup, room: float) -> list[tuple[dict[str, object], Plan]]:
    """Changes after which a training needs at most `room` bytes on its fullest rank.

    Each key alone is tried first; if none is enough, each together with activation checkpointing, then with one
    sequence per rank too, then with experts spread as far as they go too, then with matrices shared by the ranks of a
    node that need the least so, then in bf16-true too.

    Returns:
        keys with their new values, and the plan with them; of each key the smallest change. Empty if nothing fits.
    """
    for before in _firsts(setup):
        found = [
            (_keys(setup, fitting.setup), fitting)
            for search in (_checkpointing, _sharding, _batch, _experts, _tensor, _devices, _precision, _optimizer)
            if (fitting := search(before, room)) is not None
        ]
        if found:
            return found
    return []


def all_changes(setup: Setup) -> tuple[dict[str, object], Plan]:
    """All changes together but more devices: keys with their new values, and the plan with them."""
    *_, last = _firsts(setup)
    last = dataclasses.replace(last, optimizer="adamw")
    return _keys(setup, last), plan(last)


def _firsts(setup: Setup) -> Iterator[Setup]:
    yield setup
    setup = dataclasses.replace(setup, checkpoint_activations=True)
    yield setup
    setup = dataclasses.replace(setup, batch_size=setup.owners)
    yield setup
    if more := _more_experts(setup):
        setup = more[-1].setup
        yield setup
    one_each = [each for each in _more_tensor(setup) if each.setup.batch_size == each.setup.owners]
    best = min([plan(setup), *one_each], key=lambda each: each.memory.total)
    if best.setup != setup:
        setup = best.setup
        yield setup
    yield dataclasses.replace(setup, precision="bf16-true")


def _keys(before: Setup, after: Setup) -> dict[str, object]:
    """The keys of the command in which two setups differ."""
    values = {
        "trainer.checkpoint_activations": lambda setup: setup.checkpoint_activations,
        "parallel.shard": lambda setup: setup.parallel.shard,
        "training.batch_size": lambda setup: setup.batch_size,
        "parallel.expert": lambda setup: setup.parallel.expert,
        "parallel.tensor": lambda setup: setup.parallel.tensor,
        "devices": lambda setup: setup.ranks,
        "trainer.precision": lambda setup: setup.precision,
        "optimizer.name": lambda setup: setup.optimizer,
    }
    return {key: value(after) for key, value in values.items() if value(after) != value(before)}


def _checkpointing(setup: Setup, room: float) -> Plan | None:
    if setup.checkpoint_activations:
        return None
    return _if_fits(dataclasses.replace(setup, checkpoint_activations=True), room)


def _sharding(setup: Setup, room: float) -> Plan | None:
    if setup.parallel.shard or setup.ranks == 1:
        return None
    return _if_fits(dataclasses.replace(setup, parallel=dataclasses.replace(setup.parallel, shard=True)), room)


def _batch(setup: Setup, room: float) -> Plan | None:
    """The largest batch that fits: memory grows with it."""

    def of_each(sequences: int) -> Plan | None:
        return _if_fits(dataclasses.replace(setup, batch_size=sequences * setup.owners), room)

    fits, too_many = 1, setup.batch_size // setup.owners
    if too_many == 1 or (best := of_each(1)) is None:
        return None
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if (found := of_each(middle)) is None:
            too_many = middle
        else:
            fits, best = middle, found
    return best


def _experts(setup: Setup, room: float) -> Plan | None:
    return next((each for each in _more_experts(setup) if each.memory.total <= room), None)


def _more_experts(setup: Setup) -> list[Plan]:
    """Plans with experts spread further, by every degree that is allowed."""
    experts = 1 if setup.model.moe is None else setup.model.moe.num_experts
    degrees = range(setup.parallel.expert + 1, min(setup.ranks, experts) + 1)
    tried = (
        dataclasses.replace(setup, parallel=dataclasses.replace(setup.parallel, expert=degree))
        for degree in degrees
        if setup.ranks % degree == 0 and setup.parallel.shard
    )
    return [found for each in tried if (found := _if_fits(each, float("inf"))) is not None]


def _tensor(setup: Setup, room: float) -> Plan | None:
    return next((each for each in _more_tensor(setup) if each.memory.total <= room), None)


def _more_tensor(setup: Setup) -> Iterator[Plan]:
    """Plans with matrices shared by more ranks of a node, by every degree that is allowed, with the same batch.

    After all of these, a batch of one sequence per rank becomes one per group of ranks that share.
    """
    degrees = [
        degree
        for degree in range(setup.parallel.tensor + 1, min(setup.ranks, setup.per_node) + 1)
        if setup.ranks % degree == 0 and setup.parallel.shard
    ]
    tried = [
        dataclasses.replace(setup, parallel=dataclasses.replace(setup.parallel, tensor=degree)) for degree in degrees
    ]
    if setup.batch_size == setup.owners:
        tried += [dataclasses.replace(each, batch_size=each.owners) for each in tried]
    for each in tried:
        if (found := _if_fits(each, float("inf"))) is not None:
            yield found


def _devices(setup: Setup, room: float) -> Plan | None:
    """Twice as many and so on, each with as many sequences as before: only what a rank keeps gets smaller by it."""
    memory = plan(setup).memory
    if not setup.parallel.shard or memory.total - memory.state > room:
        return None
    ranks = 2 * setup.ranks
    while ranks <= MOST_RANKS:
        more = dataclasses.replace(setup, ranks=ranks, batch_size=setup.batch_size * (ranks // setup.ranks))
        if (found := _if_fits(more, room)) is not None:
            return found
        ranks *= 2
    return None


def _precision(setup: Setup, room: float) -> Plan | None:
    if setup.precision == "bf16-true":
        return None
    return _if_fits(dataclasses.replace(setup, precision="bf16-true"), room)


def _optimizer(setup: Setup, room: float) -> Plan | None:
    if setup.optimizer == "adamw":
        return None
    return _if_fits(dataclasses.replace(setup, optimizer="adamw"), room)


def _if_fits(setup: Setup, room: float) -> Plan | None:
    """The plan, or None if it needs more, or is refused."""
    try:
        found = plan(setup)
    except InputError:
        return None
    return found if found.memory.total <= room else None
