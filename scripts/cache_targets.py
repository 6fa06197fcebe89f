"""python scripts/cache_targets.py is the same as moesaic cache-targets."""

import sys

from moesaic.cli import main

if __name__ == "__main__":
    main(["cache-targets", *sys.argv[1:]])
