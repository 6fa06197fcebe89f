"""python scripts/conformance.py is the same as moesaic conformance."""

from moesaic.cli.conformance import main

if __name__ == "__main__":
    main()
