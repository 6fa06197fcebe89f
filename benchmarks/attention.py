"""What does attention cost over length, full and chunk-local, in time, memory and KV cache?

    python -m benchmarks.attention [--smoke] [--device cuda] [--output results.jsonl]

One attention layer with RoPE (dim 256, 8 heads, 2 key/value heads), one sequence of 1 to 16 chunks. "square" is the
textbook way, softmax over a materialized (L, L) matrix; "full" is the layer without chunks (torch's fused kernel);
"chunks" is the layer with chunks. Ratios are to "full" at the same length.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layers import Attention, RotaryEmbedding

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

DIM, HEADS, KV_HEADS = 256, 8, 2


class SquareAttention(Attention):
    """The same layer on an (L, L) matrix of weights."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        assert self.rotary is not None
        positions = torch.arange(x.size(1), device=x.device)
        q, k = self.rotary(q, positions), self.rotary(k, positions)
        groups = self.num_heads // self.num_kv_heads
        q, k, v = (y.transpose(1, 2) for y in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        logits = q @ k.mT * self.head_dim**-0.5
        hidden = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        y = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


def layers(chunk: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    def make(cls: type[Attention], chunk: int | None) -> nn.Module:
        rotary = RotaryEmbedding(DIM // HEADS)
        sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "rotary": rotary, "attention_chunk_size": chunk}
        return cls(DIM, **sizes, device=device, dtype=dtype)  # type: ignore[arg-type]

    made = {"full": make(Attention, None), "chunks": make(Attention, chunk), "square": make(SquareAttention, None)}
    for layer in made.values():
        layer.load_state_dict(made["full"].state_dict())
    return made


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))


def check(made: dict[str, nn.Module], chunk: int, x: Tensor) -> None:
    """What is timed computes the same thing, where it should."""
    with torch.no_grad():
        expected = made["square"](x).float()
        found = made["full"](x).float()
        within = made["chunks"](x[:, :chunk]).float()
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.05
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    assert (within - expected[:, :chunk]).abs().max() < tolerance * expected.abs().max()


def measure(options: Options) -> Iterator[Measurement]:
    chunk, counts = (16, (1, 4)) if options.smoke else (256, (1, 2, 4, 8, 16))
    dtypes = dtypes_to_time(options)
    progress = Progress("attention over length", 2 * len(dtypes) * len(counts) * (2 * options.rounds + 1))
    for dtype_name, dtype in dtypes.items():
        made = layers(chunk, options.device, dtype)
        check(made, chunk, torch.randn(1, 2 * chunk, DIM, device=options.device, dtype=dtype))
        for count in counts:
            length = count * chunk
            x = torch.randn(1, length, DIM, device=options.device, dtype=dtype, requires_grad=True)
            timed = {name: layer for name, layer in made.items() if name != "square" or length <= 2048}
            for what, run in (("forward", forward), ("forward+backward", forward_backward)):
                calls = {name: functools.partial(run, layer, x) for name, layer in timed.items()}
                samples = time_in_turn(calls, options, tell=progress)
                middle = quantiles(samples["full"])[1]
                for name, layer in timed.items():
                    yield Measurement(
                        benchmark="attention",
                        variant=name,
                        shape={"length": length, "chunk": chunk, "dim": DIM, "heads": HEADS, "kv_heads": KV_HEADS},
                        dtype=dtype_name,
                        what=what,
                        seconds=quantiles(samples[name]),
                        ratio=quantiles(samples[name])[1] / middle,
                        ratio_to="full",
                        peak_bytes=peak_memory(calls[name], options.device),
                        note=f"KV cache {cache_bytes(layer, length, dtype):,} bytes",
                    )


def cache_bytes(layer: nn.Module, length: int, dtype: torch.dtype) -> int:
    """Most that the layer's cache holds while it decodes token number `length`."""
    assert isinstance(layer, Attention)
    held = min(length, layer.attention_chunk_size or length)
    return 2 * held * KV_HEADS * (DIM // HEADS) * dtype.itemsize


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    keys = {(row.dtype, row.what, row.shape["length"]): None for row in rows}
    for key in keys:
        of = {row.variant: row for row in rows if (row.dtype, row.what, row.shape["length"]) == key}
        full, chunks = of["full"], of["chunks"]
        assert full.peak_bytes and chunks.peak_bytes and chunks.ratio
        cells = [f"{1 / chunks.ratio:.2f}x", f"{full.peak_bytes / chunks.peak_bytes:.2f}x"]
        square = of.get("square")
        if square is not None and square.ratio and square.peak_bytes:
            cells += [f"{square.ratio / chunks.ratio:.2f}x", f"{square.peak_bytes / chunks.peak_bytes:.2f}x"]
        else:
            cells += ["", ""]
        lines.append([*key[:2], str(key[2]), *cells])
    header = ["dtype", "", "length", "full: time", "memory", "square: time", "memory"]
    print_table("chunk-local attention: how much more the others take", header, lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
