"""What does a head with a large vocabulary cost: logits for all tokens at once, or chunk by chunk?

    python -m benchmarks.loss [--smoke] [--device cuda] [--output results.jsonl]

"naive" is cross_entropy(hidden @ head.T) with the (T, V) logits in fp32, as most trainers write it; "chunked" is
`moesaic.losses.linear_cross_entropy`. Forward and backward; ratios are to "naive".
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.losses import linear_cross_entropy

from .harness import (
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


def step(loss: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    torch.autograd.grad(loss(hidden, head, labels), (hidden, head))


def measure(options: Options) -> Iterator[Measurement]:
    # (tokens, width, vocabulary): our default run; Llama 4's vocabulary
    shapes = [(2048, 96, 2048), (512, 256, 202_048)]
    if options.device.type == "cuda":
        shapes = [(16_384, 2048, 32_000), (16_384, 2048, 202_048)]
    if options.smoke:
        shapes = [(300, 16, 1000)]
    losses: dict[str, Loss] = {"naive": naive, "chunked": linear_cross_entropy}
    dtypes = dtypes_to_time(options)
    progress = Progress("loss", len(dtypes) * len(shapes) * len(losses) * options.rounds)
    for dtype_name, dtype in dtypes.items():
        for tokens, dim, vocabulary in shapes:
            with options.device:
                hidden = torch.randn(tokens, dim, dtype=dtype).requires_grad_()
                head = (torch.randn(vocabulary, dim, dtype=dtype) * dim**-0.5).requires_grad_()
            labels = torch.randint(vocabulary, (tokens,), device=options.device)
            values = [loss(hidden, head, labels).item() for loss in losses.values()]
            assert abs(values[0] - values[1]) < (1e-4 if dtype == torch.float32 else 0.02) * values[0]
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
                )


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    for naive_row, chunked in zip(rows[::2], rows[1::2], strict=True):
        assert naive_row.peak_bytes and chunked.peak_bytes
        shape = chunked.shape
        size = [str(shape["tokens"]), str(shape["dim"]), str(shape["vocabulary"])]
        megabytes = [f"{row.peak_bytes / 1e6:.0f} MB" for row in (naive_row, chunked) if row.peak_bytes]
        memory = f"{chunked.peak_bytes / naive_row.peak_bytes:.2f}"
        lines.append([chunked.dtype, *size, f"{chunked.ratio:.2f}", memory, *megabytes])
    header = ["dtype", "tokens", "dim", "vocabulary", "time", "memory", "naive", "chunked"]
    print_table("head and cross-entropy, chunked over naive", header, lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
