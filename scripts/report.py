"""The same as moesaic report."""

import sys

from moesaic.cli import main

main(["report", *sys.argv[1:]])
