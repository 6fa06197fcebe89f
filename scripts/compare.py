"""The same as moesaic compare."""

import sys

from moesaic.cli import main

main(["compare", *sys.argv[1:]])
