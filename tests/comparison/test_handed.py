"""Digests of parts that were handed in."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from moesaic.comparison.handed import digest_of
from moesaic.layers import TopKRouter


def make(dim: int, score: str = "sigmoid") -> nn.Module:
    return TopKRouter(dim, 4, score_function=score)  # type: ignore[arg-type]


def closing_over(score: str) -> Callable[[int], nn.Module]:
    return lambda dim: make(dim, score)


def local(scale: float) -> type[nn.Module]:
    class Local(nn.Module):
        factor = scale

        def forward(self, x: Any) -> Any:
            return scale * x

    return Local


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "partial": (lambda: functools.partial(make, score="softmax"), lambda: functools.partial(make, score="sigmoid")),
    "closure": (lambda: closing_over("softmax"), lambda: closing_over("sigmoid")),
    "class": (lambda: local(1.0), lambda: local(2.0)),
    "module": (lambda: TopKRouter(8, 4, score_function="softmax"), lambda: TopKRouter(8, 4)),
    "nested module": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)), lambda: nn.Sequential(nn.Linear(8, 8))),
    "method": (lambda: Maker("softmax").make, lambda: Maker("sigmoid").make),
}


class Maker:
    def __init__(self, score: str) -> None:
        self.score = score

    def make(self, dim: int) -> nn.Module:
        return make(dim, self.score)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_digest_tells_parts_of_one_name_apart_and_is_the_same_for_the_same_part(kind: str) -> None:
    first, second = PAIRS[kind]
    assert digest_of(first()) == digest_of(first())
    assert digest_of(first()) != digest_of(second())
