"""Turn a tree of runs into one table and plot: python scripts/report.py DIRECTORY [--metric NAME ...]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moesaic.errors import InputError
from moesaic.studies.sweep import write_report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="any directory with runs in it, at any depth")
    parser.add_argument("--metric", action="append", default=[], help="a key of metrics.json; the first one sorts")
    given = parser.parse_args(arguments)
    try:
        print(write_report(given.directory, given.metric))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written: {given.directory}/report.md, report.csv, report.png")


if __name__ == "__main__":
    main()
