"""python scripts/study.py is the same as moesaic study."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
