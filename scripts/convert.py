"""python scripts/convert.py is the same as moesaic convert."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
