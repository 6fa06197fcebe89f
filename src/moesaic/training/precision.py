"""Precision to train in on the machine at hand."""

import time

import torch

from moesaic.losses import linear_cross_entropy
from moesaic.models import DecoderConfig, build_decoder
from moesaic.training.config import Precision, TrainingConfig

__all__ = ["choose_precision"]

WORTHWHILE = 0.75
"""bf16-mixed must take less than this share of the time of fp32: so little that all runs on a machine choose alike."""

TOO_SHORT = 0.05
"""Seconds of a micro-batch in fp32; what a busy machine does to less than this decides more than the precision."""

HOPELESS = 2.0
"""Times fp32's time: CPUs without bf16 instructions emulate it up to a hundred times slower and are asked once."""


def choose_precision(model: DecoderConfig, training: TrainingConfig, accelerator: str) -> tuple[Precision, str]:
    """What `trainer.precision=auto` means here, and why: (precision, reason).

    On a GPU it is bf16-mixed, if the GPU has it. On a CPU forward and backward of one micro-batch are timed in both:
    which is faster depends on the CPU's instructions and on the sizes of the matmuls. Random state is left as it was.
    """
    if accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available()):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "the GPU has bf16"
        return "32-true", "the GPU has no bf16"
    if accelerator == "mps" or (accelerator == "auto" and torch.backends.mps.is_available()):
        return "32-true", "on MPS nothing else is tested"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = build_decoder(model)
        tokens = torch.randint(model.vocab_size, (training.batch_size, training.seq_len + 1))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for mixed in seconds:
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                hidden, _ = decoder.hidden_states(tokens[:, :-1])
                loss = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens[:, 1:].flatten())
            loss.backward()
            seconds[mixed].append(time.perf_counter() - began)
            decoder.zero_grad()
        if min(seconds[True]) > HOPELESS * min(seconds[False]):
            break
    if min(seconds[False]) < TOO_SHORT:
        return "32-true", f"a micro-batch takes less than {TOO_SHORT} s here: too little to gain, and to tell"
    share = min(seconds[True]) / min(seconds[False])
    chosen: Precision = "bf16-mixed" if share < WORTHWHILE else "32-true"
    return chosen, f"here bf16-mixed takes {share:.2f} times as long as 32-true; auto wants less than {WORTHWHILE}"
