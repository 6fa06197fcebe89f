"""Set-up of every test: one thread per worker, a fixed seed, reproducible property tests."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from moesaic.parallel.workers import Workers

torch.set_num_threads(1)  # pytest-xdist runs one worker per core

settings.register_profile("moesaic", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("moesaic")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whole runs first: at the end they would keep one worker busy while the other has nothing left to do.

    What `slow_but_for` does not name becomes slow.

    Raises:
        pytest.UsageError: a word of `slow_but_for` is in no id, so that a case went missing from the quick ones.
    """
    unused: dict[tuple[str, str], bool] = {}
    for item in items:
        if mark := item.get_closest_marker("slow_but_for"):
            function, _, parameters = item.nodeid.partition("[")
            named = [word for word in mark.args if word in parameters]
            if not named:
                item.add_marker(pytest.mark.slow)
            for word in mark.args:
                unused[function, word] = unused.get((function, word), True) and word not in named
    whole = not config.getoption("lf", False) and not any("::" in argument for argument in config.args)
    if whole and (missing := [f"{function}: {word!r}" for (function, word), left in unused.items() if left]):
        raise pytest.UsageError(f"slow_but_for: words in no id of the test: {', '.join(missing)}")
    items.sort(key=lambda item: "runs" not in item.path.parts)


@pytest.fixture(scope="session")
def workers() -> Iterator["Workers"]:
    """Processes that stand by to be the ranks of small jobs."""
    from moesaic.parallel.workers import Workers

    pool = Workers(patience=120)
    yield pool
    pool.close()
