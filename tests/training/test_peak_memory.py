"""Peak memory is that of the run, not of the process so far."""

import sys

import pytest
import torch

from moesaic.training.peak_memory import forget_peak_memory, peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin the peak anew")
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the memory of the GPU")
def test_what_was_freed_before_does_not_count() -> None:
    forget_peak_memory()
    before = peak_memory()
    held = torch.ones(50_000_000)
    high = peak_memory()
    assert high > before + 150_000_000
    del held
    forget_peak_memory()
    assert peak_memory() < high - 150_000_000
