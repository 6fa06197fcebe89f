"""Set-up of every test: one thread per worker, a fixed seed, reproducible property tests."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # pytest-xdist runs one worker per core

settings.register_profile("moesaic", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("moesaic")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: at the end they would keep one worker busy while the other has nothing left to do."""
    items.sort(key=lambda item: "runs" not in item.path.parts)
