"""python scripts/study.py is the same as moesaic study."""

from moesaic.cli.study import main

if __name__ == "__main__":
    main()
