"""The same as moesaic memory."""

import sys

from moesaic.cli import main

main(["memory", *sys.argv[1:]])
