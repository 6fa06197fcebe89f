"""The same as moesaic convert."""

import sys

from moesaic.cli import main

main(["convert", *sys.argv[1:]])
