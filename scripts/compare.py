"""python scripts/compare.py is the same as moesaic compare."""

from moesaic.cli.compare import main

if __name__ == "__main__":
    main()
