"""python scripts/memory.py is the same as moesaic memory."""

from moesaic.cli.memory import main

if __name__ == "__main__":
    main()
