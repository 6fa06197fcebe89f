"""What the layer computes: agreement with the dense reference, and which tokens may depend on which."""

from contextlib import suppress

import torch
from torch import Tensor

from moesaic.testing.harness import (
    Failed,
    Layer,
    NotApplicable,
    Subject,
    check,
    compare,
    deterministic_layer,
    relative_error,
)
from moesaic.testing.oracle import compare_with_reference, layer_with_reference, reference_of

__all__ = [
    "batch_mates",
    "causality",
    "deterministic",
    "empty_experts",
    "gradients",
    "outputs",
    "overloaded_expert",
    "permutation",
    "router_gradient",
    "single_expert",
]


@check(
    "deterministic",
    "evaluation gives the same output twice",
    "hpcaitech/ColossalAI#419: router noise stayed on in evaluation",
)
def deterministic(subject: Subject) -> str:
    layer = subject.fresh()
    layer.module.eval()
    x = layer.tokens(2, 8)
    with torch.no_grad():
        first = layer(x)
        return _measured(max(compare(layer(x), first, layer.tolerance, "the same input again") for _ in range(3)))


@check(
    "outputs",
    "outputs equal a float64 dense reference",
    "huggingface/transformers#40609: scores flattened without a transpose, so that tokens got those of others; "
    "vllm-project/llm-compressor#1907: scores on the wrong side of the experts",
)
def outputs(subject: Subject) -> str:
    layer = layer_with_reference(subject)
    x = layer.tokens(2, 24)
    with torch.no_grad():
        return _measured(compare(layer(x), reference_of(layer, x)[0], layer.tolerance, "y"))


@check(
    "gradients",
    "gradients of input and every parameter equal those of the float64 dense reference",
    "huggingface/transformers#48687: right loss, wrong router gradient with one implementation of the experts",
)
def gradients(subject: Subject) -> str:
    layer = layer_with_reference(subject)
    x = layer.tokens(2, 24)
    with torch.no_grad():
        if relative_error(layer(x), reference_of(layer, x)[0]) > layer.tolerance:
            raise NotApplicable("the outputs differ already (see outputs)")
    return _measured(compare_with_reference(layer, x))


@check(
    "router-gradient",
    "the gradient of the output reaches the router",
    "jingyaogong/minimind#858 and davidmrau/mixture-of-experts#27: a top-1 score normalized to 1, and a router that "
    "never learns from the task",
)
def router_gradient(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    parameter = layer.router_parameter()
    if layer.router_weight().size(0) == 1:
        raise NotApplicable("one expert: there is nothing to learn")
    y = layer(layer.tokens(2, 24))
    y.backward(layer.random(*y.shape, seed=7))
    largest = max(g.abs().max().item() for g in layer.named_gradients().values() if g is not None)
    own = 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
    if not own > 1e-6 * largest:
        raise Failed(f"the largest gradient of the router is {own:.1e}, that of any parameter {largest:.1e}")
    return f"largest {own:.1e}, of any parameter {largest:.1e}"


@check(
    "permutation",
    "shuffling the sequences of a batch, or its positions, shuffles the outputs alike",
    "vllm-project/vllm#16744: one prompt, several places in a batch, different results",
)
def permutation(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    x = layer.tokens(4, 12)
    crowded = x.clone()
    # tokens that all want the same expert: whoever drops some does it by order. Not copies, of which none is first
    crowded[:, ::2] = x[0, 0] + 0.01 * x[:, ::2]
    sequences, positions = torch.tensor([2, 0, 3, 1]), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    errors = []
    with torch.no_grad():
        for tokens in (x, crowded):
            y = layer(tokens)
            errors.append(compare(layer(tokens[sequences]), y[sequences], layer.tolerance, "shuffled sequences"))
            errors.append(compare(layer(tokens[:, positions]), y[:, positions], layer.tolerance, "shuffled positions"))
    return _measured(max(errors))


@check(
    "batch-mates",
    "a sequence's output does not depend on the others of its batch",
    "marin-community/marin#8134: capacity made the evaluation loss depend on which documents shared a batch",
)
def batch_mates(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    x = layer.tokens(3, 12)
    errors = []
    with torch.no_grad():
        together = layer(x)
        for b in range(3):
            alone = layer(x[b : b + 1])
            errors.append(compare(together[b : b + 1], alone, layer.tolerance, "a sequence in a batch and alone"))
            # mates that all want what this sequence's first token wants, and that come first
            crowd = x[b, 0].expand(4, 12, -1)
            crowded = layer(torch.cat([crowd, x[b : b + 1]]))[-1:]
            errors.append(compare(crowded, alone, layer.tolerance, "a sequence beside mates that crowd its expert"))
    return _measured(max(errors))


@check(
    "causality",
    "an output does not depend on later tokens",
    "piotrpiekos/MoSA#3 and allenai/OLMoE#46: experts that choose tokens let later ones decide about earlier ones",
)
def causality(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    x = layer.tokens(2, 12)
    errors = []
    with torch.no_grad():
        y = layer(x)
        for t in (3, 6, 11):
            later = layer.tokens(2, 12 - t, seed=t)
            crowd = x[:, :1].expand(-1, 12 - t, -1)
            for what, other in (
                ("others follow", torch.cat([x[:, :t], later], dim=1)),
                ("copies of the first follow", torch.cat([x[:, :t], crowd], dim=1)),
                ("none follows", x[:, :t]),
            ):
                errors.append(compare(layer(other)[:, :t], y[:, :t], layer.tolerance, f"{t} tokens when {what}"))
    return _measured(max(errors))


@check(
    "empty-experts",
    "experts without tokens change nothing: a token all alone has the right output and gradients",
    "NVIDIA-NeMo/Automodel#532: a crash when experts got no token",
)
def empty_experts(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    x = layer.tokens(1, 4)
    what = _judge_by(layer)
    for t in range(4):
        _judge(layer, x[:, t : t + 1], what, f"token {t} alone: ")
    return what


@check(
    "single-expert",
    "the layer works with one expert",
    "databricks/megablocks#87: with top-1 the scores lost a dimension and were normalized over tokens",
)
def single_expert(subject: Subject) -> str:
    several, layer = deterministic_layer(subject), subject.with_one_expert()
    layer.module.eval()
    what = _judge_by(several)
    _judge(layer, layer.tokens(2, 8), what, "")
    return what


@check(
    "overloaded-expert",
    "512 copies of a token give 512 copies of its output",
    "huggingface/transformers#37017: tokens beyond an expert's capacity left as something else than its output",
)
def overloaded_expert(subject: Subject) -> str:
    layer = deterministic_layer(subject)
    x = layer.tokens(1, 16)
    copies = x[:, :1].expand(2, 256, -1)
    usual = []
    with torch.no_grad():
        for context in (x, x[:, :1]):
            with suppress(Exception):  # few tokens are the business of empty-experts
                usual.append(layer(context)[:, :1])
        crowded = layer(copies)
    errors = torch.stack([(crowded - y).abs().amax(dim=-1) / y.abs().max() for y in usual]).amin(dim=0)
    wrong = int((~(errors <= layer.tolerance)).sum())
    if wrong:
        raise Failed(f"{wrong} of 512 copies differ from the token's output, alone as well as among 15 others")
    return _measured(errors.max().item())


EQUAL, SAME_ALONE, FINITE = "equal to the reference", "the same alone and among others", "finite"


def _judge_by(layer: Layer) -> str:
    """The strictest thing that holds with many tokens and several experts, so that only what is special can fail."""
    x = layer.tokens(2, 12)
    for what in (EQUAL, SAME_ALONE):
        if what is EQUAL and layer.under_test.reference is None:
            continue
        try:
            _judge(layer, x, what, "")
        except Failed:
            continue
        return what
    return FINITE


def _judge(layer: Layer, x: Tensor, by: str, where: str) -> None:
    """Raises Failed if output and gradients for x are not as `by` says."""
    layer.module.zero_grad()
    y = layer(x)
    y.backward(layer.random(*x.shape, seed=7).to(y.dtype))
    bad = [name for name, g in layer.named_gradients().items() if g is not None and not bool(g.isfinite().all())]
    if not bool(y.isfinite().all()):
        bad.insert(0, "output")
    if bad:
        raise Failed(f"{where}not finite: {', '.join(bad)}")
    if by is EQUAL:
        compare(y, reference_of(layer, x)[0], layer.tolerance, f"{where}output")
        compare_with_reference(layer, x, where)
    elif by is SAME_ALONE:
        others = torch.cat([x[:1, :1], layer.tokens(1, 11, seed=1)], dim=1)
        with torch.no_grad():
            compare(layer(others)[:, :1], layer(x[:1, :1]), layer.tolerance, f"{where}a token alone and among others")


def _measured(error: float) -> str:
    return f"largest relative error {error:.1e}" if error else "bit-equal"
