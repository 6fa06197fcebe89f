"""python scripts/generate.py is the same as moesaic generate."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
