"""python -m moesaic is the same as the command moesaic."""

from moesaic.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
