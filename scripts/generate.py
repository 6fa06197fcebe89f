"""python scripts/generate.py is the same as moesaic generate."""

from moesaic.cli.generate import main

if __name__ == "__main__":
    main()
