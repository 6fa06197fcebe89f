"""The life of a selection bias (loss-free balancing): saved, still in evaluation, moved once per optimizer step."""

import io
from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.testing.adapter import Run
from moesaic.testing.harness import Failed, Layer, NotApplicable, Subject, check, relative_error

__all__ = ["bias_accumulation", "bias_checkpointing", "bias_evaluation", "bias_saved"]

PLAINLY = Run()


@check(
    "bias-saved",
    "the selection bias survives save and load, also through a state dict taken before it moved",
    "pytorch/torchtitan#1222: the bias moved in training and was zero in every checkpoint",
)
def bias_saved(subject: Subject) -> str:
    layer = subject.fresh()
    layer.need("expert_bias")
    held = layer.module.state_dict()  # checkpointers keep such a dict: its tensors must stay the live ones
    if layer.under_test.bias_step is None:
        with torch.no_grad():
            bias = layer.under_test.expert_bias(layer.module)  # type: ignore[misc]
            bias.copy_(layer.random(*bias.shape, seed=3))
    else:
        _step(layer, _micro_batches(layer))
    trained = layer.expert_bias()
    file = io.BytesIO()
    torch.save(layer.module.state_dict(), file)
    file.seek(0)
    loaded = subject.fresh()
    loaded.module.load_state_dict(torch.load(file, weights_only=True))
    if not torch.equal(loaded.expert_bias(), trained):
        raise Failed(f"saved {_values(trained)}, loaded {_values(loaded.expert_bias())}")
    stale = subject.fresh()
    stale.module.load_state_dict(held)
    if not torch.equal(stale.expert_bias(), trained):
        raise Failed(
            f"{_values(trained)} after the step, {_values(stale.expert_bias())} in a state dict held since before"
        )
    return "bit-equal"


@check(
    "bias-evaluation",
    "evaluation neither moves the selection bias nor enters its next update",
    "pytorch/torchtitan#4148: counts of validation tokens entered the next update of the bias",
)
def bias_evaluation(subject: Subject) -> str:
    layer, evaluated = subject.fresh(), subject.fresh()
    before = evaluated.expert_bias()
    batches = _micro_batches(layer)
    evaluated.module.eval()
    for _ in range(3):
        evaluated(batches[1])
        with torch.no_grad():
            evaluated(batches[0])
    if not torch.equal(evaluated.expert_bias(), before):
        raise Failed(f"{_values(before)} before, {_values(evaluated.expert_bias())} after evaluation")
    if layer.under_test.bias_step is None:
        return "not moved; no bias_step known to look at the next update"
    _step(layer, batches[2:])
    _step(evaluated, batches[2:])
    if not torch.equal(layer.expert_bias(), evaluated.expert_bias()):
        raise Failed(
            f"{_values(layer.expert_bias())} after a training step, {_values(evaluated.expert_bias())} after the same "
            "step with evaluation before it"
        )
    return "not moved; the next update is the same"


@check(
    "bias-accumulation",
    "three accumulated micro-batches move the selection bias as one batch of the same tokens does",
    "pytorch/torchtitan#1304: the bias moved on every micro-batch of a step",
)
def bias_accumulation(subject: Subject) -> str:
    accumulated, whole = subject.fresh(), subject.fresh()
    accumulated.need("expert_bias")
    batches = _micro_batches(accumulated)
    if _trains_at_random(subject, batches[2]):
        raise NotApplicable("training is random: no two ways of batching choose the same experts")
    _step(accumulated, batches)
    _step(whole, [torch.cat(batches)])
    return _same_update(accumulated, whole, "accumulated", "in one batch")


@check(
    "bias-checkpointing",
    "activation checkpointing does not change how the selection bias moves",
    "pytorch/torchtitan#1593 and NVIDIA-NeMo/Automodel#3247: recomputation counted every token twice",
)
def bias_checkpointing(subject: Subject) -> str:
    plain, recomputed = subject.fresh(), subject.fresh()
    batches = _micro_batches(plain)
    _step(plain, batches)
    _step(recomputed, batches, Run(recomputes=True))
    return _same_update(recomputed, plain, "with checkpointing", "without")


def _step(layer: Layer, batches: Sequence[Tensor], run: Run = PLAINLY) -> None:
    """One optimizer step, after which the bias must not be where it was: else nothing would be tested."""
    before = layer.expert_bias()
    step = layer.need("bias_step")
    layer.module.train()
    torch.manual_seed(0)
    step(layer.module, batches, run)
    layer.module.zero_grad()
    if torch.equal(layer.expert_bias(), before):
        raise Failed(f"a training step on unbalanced tokens left the bias at {_values(before)}")


def _trains_at_random(subject: Subject, x: Tensor) -> bool:
    outputs = []
    for seed in (1, 2):
        layer = subject.fresh()  # another one, because a layer may count what it sees
        layer.module.train()
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(layer(x))
    return relative_error(*outputs) > layer.tolerance


def _micro_batches(layer: Layer) -> list[Tensor]:
    """Three of one shape whose loads differ: two that crowd some expert, and a mixed one."""
    x = layer.tokens(2, 12)
    return [x[:1, :1].expand(2, 12, -1).contiguous(), x[1:, :1].expand(2, 12, -1).contiguous(), x]


def _same_update(found: Layer, expected: Layer, this: str, that: str) -> str:
    bias, other = found.expert_bias(), expected.expert_bias()
    if not torch.allclose(bias, other, rtol=1e-5, atol=1e-8):
        raise Failed(f"{_values(bias)} {this}, {_values(other)} {that}")
    return f"moved to {_values(bias)} both times"


def _values(bias: Tensor) -> str:
    shown = [f"{value:.3g}" for value in bias.flatten()[:8].tolist()]
    return f"[{', '.join(shown)}{', ...' if bias.numel() > 8 else ''}]"
