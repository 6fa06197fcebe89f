"""The same as moesaic conformance."""

import sys

from moesaic.cli import main

main(["conformance", *sys.argv[1:]])
