"""The pictures of docs/routers.md show what they say."""

import re
from pathlib import Path

import pytest
import torch

from moesaic.evaluation.router_plots import FAMILIES, choose, draw_routers, make, popular_logits
from moesaic.layers import ROUTERS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_every_family_is_drawn_and_shown(tmp_path: Path) -> None:
    drawn = draw_routers(tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in drawn)
    page = (DOCS / "routers.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\(images/(routers_\w+\.png)\)", page) == [path.name for path in drawn]
    assert all((DOCS / "images" / path.name).exists() for path in drawn)
    assert len(FAMILIES) == len(drawn)


def test_every_router_is_in_the_text_of_a_family() -> None:
    page = (DOCS / "routers.md").read_text(encoding="utf-8")
    families = page[page.index("## The best K") :]
    assert [name for name in ROUTERS if f"`{name}`" not in families] == []


def test_what_is_drawn_is_the_choice_of_the_router() -> None:
    logits = popular_logits(64)
    best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(2, dim=1).indices, True)
    assert torch.equal(choose(make("top_k"), logits), best)
    assert torch.equal(choose(make("relu"), logits), logits > 0)
    assert choose(make("expert_choice"), logits).sum(dim=0).tolist() == [16] * 8
    assert int(choose(make("capacity", capacity_factor=0.5), logits).sum(dim=0).max()) == 8
    assert choose(make("uniform"), logits).sum(dim=1).unique().tolist() == [2]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_logits_have_popular_experts(seed: int) -> None:
    means = popular_logits(seed=seed).mean(dim=0)
    assert (means.diff() < 0).all()
