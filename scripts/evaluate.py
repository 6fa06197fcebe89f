"""python scripts/evaluate.py is the same as moesaic evaluate."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
