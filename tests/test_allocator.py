"""The allocator's hint, seen in page faults of a fresh process."""

import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
from moesaic.allocator import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "hint" else False
def step():  # two gradients over 32 MiB, beyond the largest block that glibc keeps by itself
    gradients = [torch.zeros(40 * 2**18) for _ in range(2)]
    del gradients
for _ in range(15):  # until freed neighbours have merged into blocks that aligned requests fit
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_is_reused() -> None:
    def faults(mode: str) -> tuple[str, int]:
        done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
        told, count = done.stdout.split()
        return told, int(count)

    (_, without), (told, with_hint) = faults("plain"), faults("hint")
    if told == "False":
        pytest.skip("another C library")
    assert with_hint < without / 10
