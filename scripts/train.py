"""The same as moesaic train."""

import sys

from moesaic.cli import main

main(["train", *sys.argv[1:]])
