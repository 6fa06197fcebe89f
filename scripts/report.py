"""python scripts/report.py is the same as moesaic report."""

from moesaic.cli.report import main

if __name__ == "__main__":
    main()
