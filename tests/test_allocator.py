"""The allocator's hint, seen in page faults of a fresh process."""

import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
from moesaic.allocator import keep_freed_memory
from moesaic.layers import MoE
told = keep_freed_memory() if sys.argv[1] == "hint" else False
torch.manual_seed(0)
moe, x = MoE.build(256, 512, num_experts=32), torch.randn(512, 256)
def step():
    torch.autograd.grad(moe(x).sum(), list(moe.parameters()))
for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_is_reused() -> None:
    def faults(mode: str) -> tuple[str, int]:
        done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
        told, count = done.stdout.split()
        return told, int(count)

    (_, without), (told, with_hint) = faults("plain"), faults("hint")
    if told == "False":
        pytest.skip("another C library")
    assert with_hint < without / 3  # not 0: a heap that fragments still grows now and then
