"""The same as moesaic study."""

import sys

from moesaic.cli import main

main(["study", *sys.argv[1:]])
