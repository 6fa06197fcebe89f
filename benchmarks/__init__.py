"""Plain scripts that measure: `python -m benchmarks.NAME` from the root of the checkout. See README.md here."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, tells each start

__all__ = ["SMOKE"]

SMOKE = "smoke run: tiny shapes, one round. It shows that everything runs, and measures nothing"
"""What every --smoke run prints."""
