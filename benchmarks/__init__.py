"""Plain scripts that measure: `python -m benchmarks.NAME` from the root of the checkout. See README.md here."""
