"""What does a head with a large vocabulary cost: logits for all tokens at once, or chunk by chunk?

    python -m benchmarks.loss [--torch] [--smoke] [--device cuda] [--output results.jsonl]

"naive" is cross_entropy(hidden @ head.T) with the (T, V) logits in fp32, as most trainers write it; "chunked" is
`moesaic.losses.linear_cross_entropy`. Forward and backward; ratios are to "naive". Errors of loss, gradient of hidden
and of head are relative, in norm, against fp64 on the same inputs.

With --torch also the chunked path of `torch.nn.functional.linear_cross_entropy` (torch 2.13): "torch" with its own
choice of chunks, "torch*" with ours; in bf16 too where the CPU emulates it. That takes half an hour there.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.losses import linear_cross_entropy
from moesaic.losses.cross_entropy import rows_per_chunk

from .harness import (
    DTYPES,
    Measurement,
    Options,
    Progress,
    dtypes_to_time,
    finish,
    parse_options,
    peak_memory,
    print_table,
    quantiles,
    time_in_turn,
)

__all__ = ["main", "measure"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.T).float(), labels)


def torchs(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, head, labels, options=nn.LinearCrossEntropyOptions())


def torchs_with_our_chunks(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk(head.size(0)), chunking_method=None)
    return F.linear_cross_entropy(hidden, head, labels, options=options)


def values(loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and both gradients, in fp64."""
    value = loss(hidden, head, labels)
    return [each.detach().double() for each in (value, *torch.autograd.grad(value, (hidden, head)))]


def exact(hidden: Tensor, head: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and both gradients in fp64, of all logits, 128 tokens at a time."""
    head = head.detach().double().requires_grad_()
    total, of_hidden, of_head = torch.zeros((), dtype=torch.float64, device=head.device), [], torch.zeros_like(head)
    for x, y in zip(hidden.detach().double().split(128), labels.split(128), strict=True):
        x.requires_grad_()
        part = F.cross_entropy(x @ head.T, y, reduction="sum") / len(labels)
        gradients = torch.autograd.grad(part, (x, head))
        total += part.detach()
        of_hidden.append(gradients[0])
        of_head += gradients[1]
    return [total, torch.cat(of_hidden), of_head]


def step(loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    torch.autograd.grad(loss(hidden, head, labels), (hidden, head))


def measure(options: Options, with_torch: bool = False) -> Iterator[Measurement]:
    losses: dict[str, Loss] = {"naive": naive, "chunked": linear_cross_entropy}
    # (tokens, width, vocabulary): our default run; Llama 4's vocabulary, or one at which torch's choice takes no hours
    shapes = [(2048, 96, 2048), (512, 256, 202_048)]
    if with_torch:
        losses |= {"torch": torchs, "torch*": torchs_with_our_chunks}
        shapes[1] = (1024, 256, 65_536)
    if options.device.type == "cuda":
        shapes = [(16_384, 2048, 32_000), (16_384, 2048, 202_048)]
    if options.smoke:
        shapes = [(300, 16, 1000)]
    dtypes = DTYPES if with_torch else dtypes_to_time(options)
    progress = Progress("loss", len(dtypes) * len(shapes) * len(losses) * options.rounds)
    for dtype_name, dtype in dtypes.items():
        for tokens, dim, vocabulary in shapes:
            with options.device:
                hidden = torch.randn(tokens, dim, dtype=dtype).requires_grad_()
                head = (torch.randn(vocabulary, dim, dtype=dtype) * dim**-0.5).requires_grad_()
            labels = torch.randint(vocabulary, (tokens,), device=options.device)
            expected = exact(hidden, head, labels)
            errors = {}
            for name, loss in losses.items():
                found = values(loss, hidden, head, labels)
                errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
                assert max(errors[name]) < (1e-4 if dtype == torch.float32 else 0.02)
            calls = {name: functools.partial(step, loss, hidden, head, labels) for name, loss in losses.items()}
            samples = time_in_turn(calls, options, tell=progress)
            middle = quantiles(samples["naive"])[1]
            for name, call in calls.items():
                yield Measurement(
                    benchmark="loss",
                    variant=name,
                    shape={"tokens": tokens, "dim": dim, "vocabulary": vocabulary},
                    dtype=dtype_name,
                    what="forward+backward",
                    seconds=quantiles(samples[name]),
                    ratio=quantiles(samples[name])[1] / middle,
                    ratio_to="naive",
                    peak_bytes=peak_memory(call, options.device),
                    flops=6.0 * tokens * dim * vocabulary,
                    note="errors " + ", ".join(f"{error:.1e}" for error in errors[name]),
                )


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    for row in rows:
        if row.variant == "naive":
            of_naive = row.peak_bytes
        assert row.peak_bytes and of_naive
        size = [str(row.shape[name]) for name in ("tokens", "dim", "vocabulary")]
        memory = [f"{row.peak_bytes / of_naive:.2f}", f"{row.peak_bytes / 1e6:.0f} MB"]
        lines.append([row.dtype, *size, row.variant, f"{row.ratio:.2f}", *memory, row.note.removeprefix("errors ")])
    header = ["dtype", "tokens", "dim", "vocabulary", "variant", "time", "memory", "peak", "errors: loss, hidden, head"]
    print_table("head and cross-entropy; time and memory over naive", header, lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    extra = (("--torch",), {"action": "store_true", "help": "against torch's own linear_cross_entropy"})
    options, given = parse_options(__doc__ or "", arguments, extra)
    rows = finish(measure(options, given.torch), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
