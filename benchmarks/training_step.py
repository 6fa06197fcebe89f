"""What does a whole training step cost, against the dense twin and against the same shape in transformers?

    python -m benchmarks.training_step [--smoke] [--device cuda] [--output results.jsonl]

The default model of conf/model (dim 96, 4 layers, 8 experts in every second layer, top-1 and shared, vocabulary 2048),
8 sequences of 256 tokens: forward, loss, backward, clipping, fused AdamW, under the trainer's allocator hint. "dense"
is its twin of equal active FLOPs, and ratios are to it at the same precision. Without short convolutions it is Llama
4's layout, which transformers has too: there weights, data, optimizer and precision are the same, and so is the loss.
"mixed" is bf16 autocast.

Every step sees other tokens, as in training: experts get other numbers of rows each time, which matters where kernels
are made for a shape at its first use (bf16 on CPUs).
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.losses import linear_cross_entropy, load_balance_loss
from moesaic.models import Decoder, DecoderConfig, account, build_decoder
from moesaic.models.presets import small

from .harness import (
    Measurement,
    Options,
    Progress,
    bf16_obstacle,
    finish,
    parse_options,
    peak_memory,
    print_table,
    quantiles,
    time_in_turn,
)

__all__ = ["DEFAULT", "main", "measure"]

DEFAULT = small(vocab_size=2048)
"""conf/model/small.yaml at the default vocabulary (a test holds it)."""

Loss = Callable[[Tensor, Tensor], Tensor]


def our_loss(decoder: Decoder, balanced: bool, tokens: Tensor, labels: Tensor) -> Tensor:
    hidden, routing = decoder.hidden_states(tokens)
    loss = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, labels.flatten())
    if balanced and routing:
        terms = [load_balance_loss(decided.logits, decided.expert_ids) for decided in routing.values()]
        loss = loss + 0.01 * torch.stack(terms).mean()
    return loss


def their_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    logits = model(tokens, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def step(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    mixed: bool,
    batches: Iterator[tuple[Tensor, Tensor]],
) -> None:
    batch = next(batches)
    device = batch[0].device.type
    with torch.autocast(device, dtype=torch.bfloat16) if mixed else contextlib.nullcontext():
        value = loss(*batch)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def transformers_twin(decoder: Decoder, device: torch.device) -> nn.Module | str:
    """transformers' Llama 4 with the decoder's weights, or why there is none."""
    try:
        from transformers import Llama4ForCausalLM, Llama4TextConfig

        from moesaic.interop import config_to_hf, hf_name
    except ImportError as error:
        return f"not run: {error}"
    assert decoder.config is not None
    fields = config_to_hf(decoder.config, {}, "float32")
    with device:
        model = Llama4ForCausalLM(Llama4TextConfig(**{key: value for key, value in fields.items() if key != "dtype"}))
    model.load_state_dict({hf_name(name): p for name, p in decoder.named_parameters()}, strict=True)
    return model.train()


def models(config: DecoderConfig, device: torch.device) -> dict[str, tuple[nn.Module, Loss] | str]:
    """Name -> model and loss, or why there is none."""
    torch.manual_seed(0)
    moe = build_decoder(config, device=device)
    dense = build_decoder(dataclasses.replace(config, dense_twin=True), device=device)
    made: dict[str, tuple[nn.Module, Loss] | str] = {
        "dense": (dense, functools.partial(our_loss, dense, True)),
        "moe": (moe, functools.partial(our_loss, moe, True)),
    }
    if not config.attention.conv_width:
        theirs = transformers_twin(moe, device)
        made["transformers"] = theirs if isinstance(theirs, str) else (theirs, functools.partial(their_loss, theirs))
    return made


def measure(options: Options) -> Iterator[Measurement]:
    layout = dataclasses.replace(DEFAULT, attention=dataclasses.replace(DEFAULT.attention, conv_width=0))
    configs = {"default": DEFAULT, "layout of Llama 4": layout}
    batch_size, length = (1, 32) if options.smoke else (8, 256)
    progress = Progress("training step", (2 + 3) * 2 * options.rounds)
    for name, config in configs.items():
        for mixed in (False,) if bf16_obstacle(options) else (False, True):
            made = models(config, options.device)
            random = torch.randint(config.vocab_size, (32, batch_size, length + 1), device=options.device)
            batches = [(tokens[:, :-1], tokens[:, 1:]) for tokens in random]
            if isinstance(made.get("transformers"), tuple):
                require_equal_losses(made, batches[0])
            calls = {}
            for variant, pair in made.items():
                if not isinstance(pair, str):
                    model, loss = pair
                    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
                    calls[variant] = functools.partial(step, model, loss, optimizer, mixed, itertools.cycle(batches))
            samples = time_in_turn(calls, options, min_seconds=0.5, tell=progress)
            middle = quantiles(samples["dense"])[1]
            for variant in made:
                counted = account(dataclasses.replace(config, dense_twin=variant == "dense"), length)
                row = Measurement(
                    benchmark="training_step",
                    variant=variant,
                    shape={"model": name, "batch": batch_size, "length": length},
                    dtype="mixed" if mixed else "fp32",
                    what="step",
                    flops=counted.training_flops * batch_size * length,
                )
                pair = made[variant]
                if isinstance(pair, str):
                    yield dataclasses.replace(row, note=pair)
                    continue
                seconds = quantiles(samples[variant])
                yield dataclasses.replace(
                    row,
                    seconds=seconds,
                    ratio=seconds[1] / middle,
                    peak_bytes=peak_memory(calls[variant], options.device),
                    note=f"{batch_size * length / seconds[1]:,.0f} tokens/s; {counted.parameters:,} parameters",
                )


def require_equal_losses(made: dict[str, tuple[nn.Module, Loss] | str], batch: tuple[Tensor, Tensor]) -> None:
    moe, theirs = made["moe"], made["transformers"]
    assert not isinstance(moe, str) and not isinstance(theirs, str) and isinstance(moe[0], Decoder)
    with torch.no_grad():
        ours, expected = our_loss(moe[0], False, *batch).item(), theirs[1](*batch).item()
    if abs(ours - expected) > 1e-4:
        raise SystemExit(f"our loss {ours} and transformers' {expected} differ: not a benchmark")


def report(rows: Sequence[Measurement]) -> None:
    lines = []
    for row in rows:
        if row.ratio is None or row.peak_bytes is None:
            lines.append([row.shape["model"], row.dtype, row.variant, "", "", row.note])
            continue
        speed = f"{1 / row.ratio:.2f}"
        lines.append([row.shape["model"], row.dtype, row.variant, speed, f"{row.peak_bytes / 1e6:.0f} MB", row.note])
    print_table("training step", ["model", "precision", "", "speed / dense", "peak", ""], lines)


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    given = sys.argv[1:] if arguments is None else arguments
    options, _ = parse_options(__doc__ or "", ["--keep-freed-memory", *given])  # as moesaic train does
    rows = finish(measure(options), options)
    report(rows)
    return rows


if __name__ == "__main__":
    main()
