"""python scripts/train.py is the same as moesaic train."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
