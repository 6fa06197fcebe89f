"""python scripts/memory.py is the same as moesaic memory."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["memory", *sys.argv[1:]])
