"""The suite for one GPU, at sizes that fill the chip, in under eight minutes.

    python -m benchmarks.gpu --output benchmarks/results/gpu.jsonl

bf16 throughout. The ceiling is a large matmul measured in the same run; the limit of a MoE layer is a dense SwiGLU of
equal active FLOPs. Also: does the layer synchronize with the host, can a CUDA graph capture it, attention to 128k
tokens, the loss at Llama 4's vocabulary, and a training step with its MFU (active FLOPs over the chip's dense bf16
peak, by the table here). Needs torch >= 2.10, einops and CUDA (PYTHONPATH=src is enough); --smoke --device cpu runs the
same code at toy sizes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layers import Attention, MoE, RotaryEmbedding
from moesaic.losses import linear_cross_entropy, load_balance_loss
from moesaic.models import AttentionConfig, Decoder, DecoderConfig, MoEConfig, account, build_decoder

from .harness import (
    Measurement,
    Options,
    Progress,
    finish,
    parse_options,
    peak_memory,
    print_table,
    quantiles,
    time_in_turn,
)
from .limit import DenseSwiGLU

__all__ = ["DENSE_PEAK", "main", "measure"]

DENSE_PEAK = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
"""bf16 FLOP/s without sparsity, from the makers' data sheets; the first name that the device's contains."""


def device_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in DENSE_PEAK.items() if all(word in name for word in part.split())), None)


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    torch.autograd.grad(layer(x), (x, *layer.parameters()), upstream)


def matmul_ceiling(options: Options) -> Iterator[Measurement]:
    size = 128 if options.smoke else 8192
    a, b = (torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = quantiles(time_in_turn({"matmul": lambda: a @ b}, options)["matmul"])
    flops = 2.0 * size**3
    note = f"{flops / seconds[1] / 1e12:.1f} TFLOP/s"
    yield Measurement("gpu", "matmul ceiling", {"size": size}, "bf16", "forward", seconds, flops=flops, note=note)


def moe_layers(options: Options) -> Iterator[Measurement]:
    shapes = [(2048, 8192, 16, 16_384), (2048, 8192, 128, 65_536), (5120, 8192, 16, 16_384), (5120, 8192, 64, 32_768)]
    if options.smoke:
        shapes = [(64, 128, 4, 256)]
    for dim, width, experts, tokens in shapes:
        with options.device:
            moe = MoE.build(dim, width, experts, dtype=torch.bfloat16)
            dense = DenseSwiGLU(dim, 2 * width).bfloat16()
            x = torch.randn(tokens, dim, dtype=torch.bfloat16).requires_grad_()
            upstream = torch.randn(tokens, dim, dtype=torch.bfloat16)
        forward_flops = 6.0 * tokens * dim * 2 * width
        shape = {"dim": dim, "hidden_dim": width, "experts": experts, "tokens": tokens, "n": tokens // experts}
        variants: dict[str, nn.Module] = {"dense": dense, "moe": moe}
        for what, calls, flops in (
            ("forward", {name: functools.partial(forward, m, x) for name, m in variants.items()}, forward_flops),
            (
                "forward+backward",
                {name: functools.partial(forward_backward, m, x, upstream) for name, m in variants.items()},
                3 * forward_flops,
            ),
        ):
            samples = time_in_turn(calls, options)
            middle = quantiles(samples["dense"])[1]
            for name, call in calls.items():
                seconds = quantiles(samples[name])
                yield Measurement(
                    "gpu moe",
                    name,
                    shape,
                    "bf16",
                    what,
                    seconds,
                    seconds[1] / middle,
                    peak_bytes=peak_memory(call, options.device),
                    flops=flops,
                    note=f"{flops / seconds[1] / 1e12:.1f} TFLOP/s active",
                )
        yield Measurement(
            "gpu moe", "moe", shape, "bf16", "host synchronization", note=host_synchronization(moe, x, upstream)
        )
        yield Measurement("gpu moe", "moe", shape, "bf16", "CUDA graph", note=graph_capture(moe, x, options.device))


def host_synchronization(layer: nn.Module, x: Tensor, upstream: Tensor) -> str:
    """Whether forward and backward wait for the device, by torch's own check."""
    if not x.is_cuda:
        return "not run: needs CUDA"
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(layer, x, upstream)
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def graph_capture(layer: nn.Module, x: Tensor, device: torch.device) -> str:
    """Whether the forward pass can be captured, and replays with other tokens."""
    if device.type != "cuda":
        return "not run: needs CUDA"
    static, other = x.detach().clone(), torch.randn_like(x)
    with torch.no_grad():
        forward(layer, static)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                captured = layer(static)
        except RuntimeError as error:
            return f"cannot be captured: {str(error).splitlines()[0]}"
        static.copy_(other)
        graph.replay()
        distance = (captured - layer(other)).float().norm() / captured.float().norm()
    return f"captured; replay with other tokens differs by {distance.item():.1e}"


def attention(options: Options) -> Iterator[Measurement]:
    chunk, lengths = (32, (64, 128)) if options.smoke else (8192, (8192, 32_768, 131_072))
    dim, heads, kv_heads = (64, 4, 2) if options.smoke else (5120, 40, 8)
    for length in lengths:
        with options.device:
            layers = {
                name: Attention(
                    dim,
                    num_heads=heads,
                    num_kv_heads=kv_heads,
                    rotary=RotaryEmbedding(dim // heads),
                    attention_chunk_size=size,
                    dtype=torch.bfloat16,
                )
                for name, size in (("full", None), ("chunks", chunk))
            }
            x = torch.randn(1, length, dim, dtype=torch.bfloat16)
        calls = {name: functools.partial(forward, layer, x) for name, layer in layers.items()}
        samples = time_in_turn(calls, options)
        for name, call in calls.items():
            seconds = quantiles(samples[name])
            yield Measurement(
                "gpu attention",
                name,
                {"length": length, "chunk": chunk, "dim": dim},
                "bf16",
                "forward",
                seconds,
                seconds[1] / quantiles(samples["full"])[1],
                ratio_to="full",
                peak_bytes=peak_memory(call, options.device),
            )


def loss(options: Options) -> Iterator[Measurement]:
    tokens, dim, vocabulary = (128, 32, 1000) if options.smoke else (16_384, 2048, 202_048)
    with options.device:
        hidden = torch.randn(tokens, dim, dtype=torch.bfloat16).requires_grad_()
        head = (torch.randn(vocabulary, dim, dtype=torch.bfloat16) * dim**-0.5).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,))

    def naive() -> None:
        torch.autograd.grad(F.cross_entropy((hidden @ head.T).float(), labels), (hidden, head))

    def chunked() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, head, labels), (hidden, head))

    calls: dict[str, Callable[[], None]] = {"naive": naive, "chunked": chunked}
    samples = time_in_turn(calls, options)
    shape = {"tokens": tokens, "dim": dim, "vocabulary": vocabulary}
    for name, call in calls.items():
        seconds = quantiles(samples[name])
        ratio = seconds[1] / quantiles(samples["naive"])[1]
        peak = peak_memory(call, options.device)
        yield Measurement("gpu loss", name, shape, "bf16", "forward+backward", seconds, ratio, "naive", peak)


def training_step(options: Options) -> Iterator[Measurement]:
    config = DecoderConfig(
        vocab_size=32_000,
        dim=2048,
        num_layers=8,
        attention=AttentionConfig(num_heads=16, num_kv_heads=4, attention_chunk_size=2048),
        hidden_dim=16_384,
        moe=MoEConfig(num_experts=16, hidden_dim=8192),
        interleave_moe_layer_step=2,
        nope_layer_interval=4,
    )
    batch_size, length = 4, 4096
    if options.smoke:
        attention = dataclasses.replace(config.attention, num_heads=4, num_kv_heads=2, attention_chunk_size=16)
        moe = MoEConfig(num_experts=4, hidden_dim=64)
        config = dataclasses.replace(
            config, vocab_size=300, dim=32, num_layers=2, hidden_dim=128, attention=attention, moe=moe
        )
        batch_size, length = 1, 32
    tokens = torch.randint(config.vocab_size, (batch_size, length + 1), device=options.device)
    peak_rate = device_peak(options.device)
    calls, counted = {}, {}
    for name in ("dense", "moe"):
        variant = dataclasses.replace(config, dense_twin=name == "dense")
        decoder = build_decoder(variant, device=options.device)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)
        calls[name] = functools.partial(step, decoder, optimizer, tokens)
        counted[name] = account(variant, length)
    samples = time_in_turn(calls, options)
    for name, call in calls.items():
        seconds, flops = quantiles(samples[name]), counted[name].training_flops * batch_size * length
        mfu = f", MFU {flops / seconds[1] / peak_rate:.3f}" if peak_rate else ", MFU unknown: no peak for this device"
        yield Measurement(
            "gpu training step",
            name,
            {"dim": config.dim, "layers": config.num_layers, "batch": batch_size, "length": length},
            "mixed",
            "step",
            seconds,
            seconds[1] / quantiles(samples["dense"])[1],
            peak_bytes=peak_memory(call, options.device),
            flops=flops,
            note=f"{batch_size * length / seconds[1]:,.0f} tokens/s{mfu}; {counted[name].parameters:,} parameters",
        )


def step(decoder: Decoder, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        hidden, routing = decoder.hidden_states(tokens[:, :-1])
        value = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, tokens[:, 1:].flatten())
    for decided in routing.values():
        value = value + 0.01 * load_balance_loss(decided.logits, decided.expert_ids)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(options: Options) -> Iterator[Measurement]:
    parts = (matmul_ceiling, moe_layers, attention, loss, training_step)
    progress = Progress("gpu suite", len(parts))
    for part in parts:
        yield from out_of_memory_as_row(part, options)
        progress()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def out_of_memory_as_row(part: Callable[[Options], Iterator[Measurement]], options: Options) -> Iterator[Measurement]:
    try:
        yield from part(options)
    except torch.OutOfMemoryError as error:
        yield Measurement("gpu", part.__name__, {}, "bf16", "", note=f"not run: {str(error).splitlines()[0]}")


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB"
        shape = " ".join(f"{key} {value}" for key, value in row.shape.items())
        lines.append([row.benchmark, row.variant, row.what, shape, ratio, peak, row.note])
    print_table("gpu suite", ["question", "", "", "shape", "time / limit", "peak", ""], lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    options, _ = parse_options(__doc__ or "", arguments)
    if options.device.type != "cuda" and not options.smoke:
        raise SystemExit("this suite needs a GPU: torch finds no CUDA device (--smoke --device cpu runs its code)")
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
