"""python scripts/cache_targets.py is the same as moesaic cache-targets."""

from moesaic.cli.cache_targets import main

if __name__ == "__main__":
    main()
