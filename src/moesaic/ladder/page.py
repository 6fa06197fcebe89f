"""Fill a table of a page from the rows of a ladder: python -m moesaic.ladder.page PAGE RESULTS

The table goes between the lines `<!-- ladder -->` and `<!-- end -->` of the page, so that nobody copies numbers.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moesaic.errors import InputError
from moesaic.files import write_atomically
from moesaic.ladder.analysis import analyze
from moesaic.ladder.bootstrap import Estimate
from moesaic.ladder.points import Cell
from moesaic.ladder.prediction import Ladder, read_ladder
from moesaic.studies.tables import markdown_table, number

__all__ = ["BEGIN", "END", "filled", "table_of"]

BEGIN, END = "<!-- ladder -->", "<!-- end -->"


def filled(page: str, results: Path) -> str:
    """The text of a page with the table of a results directory in its place.

    Raises:
        InputError: a page without a place for it, or no results of a ladder.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"the page has no lines {BEGIN} and {END}; must have a place for the table")
    return f"{before}{BEGIN}\n\n{table_of(read_ladder(results))}\n\n{END}{after}"


def table_of(ladder: Ladder) -> str:
    """Every arm at the largest rung that it has: score, worth and what its router did, in Markdown."""
    analysis = analyze(ladder.config, ladder.cells)
    columns = ["arm", "largest rung", "bits per byte ± 95%", "times the compute", "its slope", "causal", "batch"]
    columns += ["experts per token", "without expert", "dead experts", "tokens/s"]
    lines = []
    for arm in ladder.config.arms:
        cells = [cell for cell in ladder.cells if cell.arm == arm and cell.finished and not cell.out]
        if not cells:
            continue
        last = cells[-1]
        worth = None if arm == ladder.config.baseline else analysis.worth(arm, "FLOPs")
        at = None if worth is None or not worth.values else worth.values[-1]
        slope = None if worth is None else worth.slope
        line = [ladder.study.shown(arm), last.rung, str(last.score), _short(at), _short(slope)]
        lines.append([*line, *ladder.rungs.leaks[arm].words, *_routed(last)])
    return markdown_table(columns, lines)


def _routed(cell: Cell) -> list[str]:
    per_token, without, dead = (
        cell.mean_matching(f"router/*/{name}") for name in ("experts_per_token", "no_expert_share", "dead_share")
    )
    speed = cell.mean_of("tokens_per_second")
    return [number(per_token, ".2f"), number(without, ".1%"), number(dead, ".1%"), f"{speed:,.0f}"]


def _short(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def main(arguments: Sequence[str]) -> None:
    """Fill the page that the first argument names from the results that the second names."""
    if len(arguments) != 2:
        sys.exit("error: give PAGE RESULTS, as in docs/routers.md docs/studies/ladder_routers")
    page, results = map(Path, arguments)
    try:
        write_atomically(page, filled(page.read_text(encoding="utf-8"), results))
    except (InputError, OSError) as error:
        sys.exit(f"error: {page}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
