"""python scripts/report.py is the same as moesaic report."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
