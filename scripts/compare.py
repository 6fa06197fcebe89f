"""python scripts/compare.py is the same as moesaic compare."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
