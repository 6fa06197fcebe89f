"""The table of a page, from the rows of a ladder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.checkout import CONFIG_DIR
from moesaic.errors import InputError
from moesaic.ladder.page import BEGIN, END, filled, main
from moesaic.ladder.rungs import Rungs

ROOT = CONFIG_DIR.parent
WORDS = [
    "experiment=ladder_experts",
    "ladder.rungs=[1e11,3e11,1e12]",
    "ladder.least=0",
    "ladder.drop={rung:1e11,behind:0.05}",
]


@pytest.fixture
def results(rungs_of: Callable[..., Rungs], made_ladder: Callable[..., Path], law: Callable[..., float]) -> Path:
    return made_ladder(rungs_of(*WORDS), law=lambda arm, flops: law(arm, flops) * (1.5 if arm == "4 experts" else 1.0))


def test_a_page_gets_its_table_and_keeps_the_rest(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n")
    main([str(page), str(results)])
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n\n| arm | largest rung |") and text.endswith(f"{END}\n\nMore.\n")
    assert "old" not in text and filled(text, results) == text, "once is enough"
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| 1e12 |" in lines["| 16 experts"] and "| yes | no |" in lines["| 16 experts"]
    assert "| 1e11 |" in lines["| 4 experts"] and " - | - | yes" in lines["| 4 experts"], "dropped, so without a worth"
    assert " - | - | yes" in lines["| dense"], "the baseline is worth itself"


def test_a_page_without_a_place_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have a place for the table"):
        filled("# Title\n", results)
    (tmp_path / "page.md").write_text("# Title\n")
    with pytest.raises(SystemExit, match=r"error: .*page\.md: the page has no lines"):
        main([str(tmp_path / "page.md"), str(results)])


def test_the_page_about_routers_has_the_table_of_the_rows() -> None:
    page, results = ROOT / "docs/routers.md", ROOT / "docs/studies/ladder_routers"
    text = page.read_text()
    assert BEGIN in text and END in text
    if (results / "rows.jsonl").exists():
        assert filled(text, results) == text, f"python -m moesaic.ladder.page {page.name} {results.name} fills it"
