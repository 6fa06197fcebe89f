"""python scripts/evaluate.py is the same as moesaic evaluate."""

from moesaic.cli.evaluate import main

if __name__ == "__main__":
    main()
