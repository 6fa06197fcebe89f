"""python scripts/convert.py is the same as moesaic convert."""

from moesaic.cli.convert import main

if __name__ == "__main__":
    main()
