"""The benchmarks are run from the root of the checkout, as `python -m benchmarks.NAME`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
