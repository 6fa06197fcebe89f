"""The same as moesaic evaluate."""

import sys

from moesaic.cli import main

main(["evaluate", *sys.argv[1:]])
