"""The same as moesaic generate."""

import sys

from moesaic.cli import main

main(["generate", *sys.argv[1:]])
