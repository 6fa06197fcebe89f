"""How near does decoding with the KV cache come to reading what it must read, and does it slow down with position?

    python -m benchmarks.decoding [--smoke] [--device cuda] [--output results.jsonl]

"decode": one token for each of 1 or 32 sequences, at position 256, by a decoder of 4 MoE layers (16 experts, top-1 and
shared) and by its dense twin of equal active FLOPs. Every step has other tokens, so other experts. The limit, "read",
is the time in which the same run reads as many bytes as the step must: the weights that its tokens meet (of the
experts only those that some token was sent to) and the keys and values it sees. They are read by the matrix-vector
product of one large matrix, which was the fastest of the ways of torch that we tried. Ratios are to it.

"position": one token at several positions by the dense decoder with chunk-local layers and with full attention, each at
its fullest: the chunk-local ones see a whole chunk. Ratios are to the first position. The note says what the caches
hold (buffers grow by doubling) and what a step reads.

What it cannot see: on a CPU it is the CPU time of one thread, which waits for memory inside that time. One thread does
not saturate a machine's memory, so this limit is that of a core. What fits into the caches of the processor is read
faster, by the decoder as by "read"; other processes that use them slow down both, and not by equal parts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.layers import Experts
from moesaic.models import AttentionConfig, Decoder, DecoderConfig, MoEConfig, build_decoder, kv_cache_bytes
from moesaic.models.memory import LiveBytes

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

Caches = list[Any]


def make_config(smoke: bool, chunk: int | None = None) -> DecoderConfig:
    dim, width = (32, 64) if smoke else (512, 768)
    return DecoderConfig(
        vocab_size=256 if smoke else 8192,
        dim=dim,
        num_layers=2 if smoke else 4,
        attention=AttentionConfig(num_heads=8, num_kv_heads=2, attention_chunk_size=chunk),
        hidden_dim=2 * width,
        moe=MoEConfig(num_experts=16, hidden_dim=width),
        interleave_moe_layer_step=1,
        nope_layer_interval=0,
    )


def build(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    torch.manual_seed(0)
    return build_decoder(config, device=device, dtype=dtype).eval()


def filled_caches(decoder: Decoder, batch: int, tokens: int) -> Caches:
    """As after `tokens` tokens, with random keys and values: a prefill would take longer than all else here."""
    caches, config, weight = decoder.make_cache(), decoder.config, decoder.embedding.weight
    assert caches is not None and config is not None
    for cache in caches:
        shape = (batch, config.num_kv_heads, tokens, config.head_dim)
        cache.append(*torch.randn(2, *shape, device=weight.device, dtype=weight.dtype))
    return caches


class Decode:
    """Decodes the token at one position again and again, with other tokens each time."""

    def __init__(self, decoder: Decoder, batch: int, position: int) -> None:
        assert decoder.config is not None
        weight = decoder.embedding.weight
        self.decoder, self.batch, self.position = decoder, batch, position
        self.tokens = torch.randint(decoder.vocab_size, (16, batch, 1), device=weight.device)
        with torch.no_grad(), LiveBytes([self.tokens, *decoder.parameters()]) as live:
            self.caches = filled_caches(decoder, batch, position - 2)
            decoder(self.tokens[0], self.caches)  # the buffers grow here, and not in every call
        self.cache_bytes_held = live.current
        self.before = [dict(vars(cache)) for cache in self.caches]
        self.next_tokens = itertools.cycle(self.tokens)

    def __call__(self) -> None:
        self.decode(next(self.next_tokens))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Any:
        for cache, before in zip(self.caches, self.before, strict=True):
            vars(cache).update(before)
        return self.decoder(tokens, self.caches)

    @functools.cached_property
    def bytes_read(self) -> int:
        """That one step must read, averaged over the tokens: weights, each once, and keys and values."""
        decoder, config = self.decoder, self.decoder.config
        assert config is not None
        weight = decoder.embedding.weight
        met = (
            sum(parameter.nbytes for parameter in decoder.parameters()) - weight.nbytes + self.batch * weight[0].nbytes
        )
        experts = {name: part for name, part in decoder.named_modules() if isinstance(part, Experts)}
        of_one = {name: part.gate_up_proj[0].nbytes + part.down_proj[0].nbytes for name, part in experts.items()}
        met -= sum(part.num_experts * of_one[name] for name, part in experts.items())
        hit = 0
        for tokens in self.tokens:
            for name, routing in self.decode(tokens).routing.items():
                hit += int((routing.tokens_per_expert > 0).sum()) * of_one[f"{name}.experts"]
        cache = self.batch * kv_cache_bytes(config, self.position, weight.dtype)
        return met + round(hit / len(self.tokens)) + cache


def reading(size: int, device: torch.device) -> Callable[[], Tensor]:
    matrix = torch.randn(-(-size // 4096), 1024, device=device)
    vector = torch.randn(1024, device=device)
    return lambda: matrix @ vector


def check(decoder: Decoder) -> None:
    """Token by token through the cache is what the whole sequence at once is."""
    tokens = torch.randint(decoder.vocab_size, (2, 12), device=decoder.embedding.weight.device)
    with torch.no_grad():
        expected, caches = decoder(tokens).logits, decoder.make_cache()
        found = torch.cat([decoder(token, caches).logits for token in tokens.split(1, dim=1)], dim=1)
    error = (found - expected).float().abs().max()
    assert error < (1e-4 if expected.dtype == torch.float32 else 0.1) * expected.float().abs().max()


def against_the_limit(options: Options, dtype: str, tell: Callable[[], None]) -> Iterator[Measurement]:
    position = 16 if options.smoke else 256
    config = make_config(options.smoke)
    moe = build(config, options.device, DTYPES[dtype])
    dense = build(dataclasses.replace(config, dense_twin=True), options.device, DTYPES[dtype])
    check(moe)
    for batch in (1, 4 if options.smoke else 32):
        steps = {"moe": Decode(moe, batch, position), "dense": Decode(dense, batch, position)}
        calls: dict[str, Callable[[], Any]] = {}
        for name, step in steps.items():
            calls[name] = step
            calls[f"read as {name}"] = reading(step.bytes_read, options.device)
        samples = time_in_turn(calls, options, tell=tell)
        for name, call in calls.items():
            step, limit = steps[name.split()[-1]], f"read as {name.split()[-1]}"
            seconds = quantiles(samples[name])
            rate = f"{step.bytes_read / 1e6:,.1f} MB, {step.bytes_read / seconds[1] / 1e9:.1f} GB/s"
            yield Measurement(
                benchmark="decoding",
                variant=name,
                shape={"batch": batch, "position": position, "dim": config.dim, "layers": config.num_layers},
                dtype=dtype,
                what="decode",
                seconds=seconds,
                ratio=seconds[1] / quantiles(samples[limit])[1],
                ratio_to=limit,
                peak_bytes=peak_memory(call, options.device),
                note=rate,
            )


def over_positions(options: Options, dtype: str, tell: Callable[[], None]) -> Iterator[Measurement]:
    chunk, batch = (8, 2) if options.smoke else (256, 8)
    positions = (8, 32) if options.smoke else (256, 1024, 4096)
    decoders = {}
    for name, size in (("chunk-local", chunk), ("full", None)):
        config = dataclasses.replace(make_config(options.smoke, size), dense_twin=True)
        decoders[name] = build(config, options.device, DTYPES[dtype])
    steps = {(name, p): Decode(decoder, batch, p) for name, decoder in decoders.items() for p in positions}
    samples = time_in_turn({f"{name} {p}": step for (name, p), step in steps.items()}, options, tell=tell)
    for (name, position), step in steps.items():
        seconds, built_from = quantiles(samples[f"{name} {position}"]), decoders[name].config
        assert built_from is not None
        read = batch * kv_cache_bytes(built_from, position, DTYPES[dtype])
        yield Measurement(
            benchmark="decoding",
            variant=name,
            shape={
                "batch": batch,
                "position": position,
                "chunk": chunk,
                "dim": config.dim,
                "layers": config.num_layers,
            },
            dtype=dtype,
            what="position",
            seconds=seconds,
            ratio=seconds[1] / quantiles(samples[f"{name} {positions[0]}"])[1],
            ratio_to=f"position {positions[0]}",
            peak_bytes=peak_memory(step, options.device),
            note=f"KV cache {step.cache_bytes_held:,} bytes held, {read:,} read",
        )


def measure(options: Options) -> Iterator[Measurement]:
    positions = 2 * (2 if options.smoke else 3)
    dtypes = dtypes_to_time(options)
    progress = Progress("decoding", len(dtypes) * (2 * 4 + positions) * options.rounds)
    for dtype in dtypes:
        yield from against_the_limit(options, dtype, progress)
        yield from over_positions(options, dtype, progress)


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    for row in rows:
        if row.what == "decode" and row.seconds and row.ratio:
            shape, milliseconds = row.shape, f"{row.seconds[1] * 1000:.2f}"
            rate = f"{shape['batch'] / row.seconds[1]:,.0f}" if row.variant in ("moe", "dense") else ""
            lines.append(
                [row.dtype, str(shape["batch"]), row.variant, milliseconds, f"{row.ratio:.2f}", rate, row.note]
            )
    header = ["dtype", "batch", "", "ms", "time / limit", "tokens/s", "what it must read, and how fast that went"]
    print_table("decoding one token for each sequence", header, lines)
    lines = []
    for row in rows:
        if row.what == "position" and row.seconds and row.ratio:
            milliseconds = f"{row.seconds[1] * 1000:.2f}"
            lines.append(
                [row.dtype, row.variant, str(row.shape["position"]), milliseconds, f"{row.ratio:.2f}", row.note]
            )
    header = ["dtype", "attention", "position", "ms", "time / first position", ""]
    print_table("one token at several positions", header, lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
