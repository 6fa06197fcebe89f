"""python scripts/conformance.py is the same as moesaic conformance."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["conformance", *sys.argv[1:]])
