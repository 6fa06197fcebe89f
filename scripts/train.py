"""python scripts/train.py is the same as moesaic train."""

from moesaic.cli.train import main

if __name__ == "__main__":
    main()
