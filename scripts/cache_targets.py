"""The same as moesaic cache-targets."""

import sys

from moesaic.cli import main

main(["cache-targets", *sys.argv[1:]])
