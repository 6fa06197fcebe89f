"""What a person sees before the first step and after the last one."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.distillation.opened import OpenedTargets
from moesaic.evaluation.language_modeling import on_windows
from moesaic.models import Account, Decoder, DecoderConfig
from moesaic.models.memory import LiveBytes
from moesaic.training.config import RunConfig

__all__ = ["activation_bytes", "describe_teacher", "print_summary", "print_verdict"]


def activation_bytes(decoder: Decoder, batch_size: int, seq_len: int) -> int:
    """Bytes that one forward pass keeps for backward, measured.

    The logits are not among them: the training loss never builds them all.
    """
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=decoder.device)
    with LiveBytes([tokens, *decoder.parameters()]) as live:
        kept = decoder.hidden_states(tokens)[0]
        total = live.current
        del kept
    return total


def print_summary(
    console: Console,
    config: RunConfig,
    model: DecoderConfig,
    account: Account,
    facts: Mapping[str, Any],
    num_tokens: Mapping[str, int],
    activations: int,
    run_dir: Path,
    teacher: str | None = None,
) -> None:
    training = config.training
    shape = f"{model.num_layers} layers, dim {model.dim}, vocabulary {model.vocab_size}"
    table = Table(title=f"{escape(config.name)}{', a proxy' if config.transfer.proxy else ''}: {shape}")
    for column in ("layer", "token mixer", "channel mixer"):
        table.add_column(column)
    for column in ("parameters", "active", "MFLOP/token"):
        table.add_column(column, justify="right")
    for i, layer in enumerate(account.layers):
        flops = (layer.matmul_flops + layer.attention_flops) / 1e6
        table.add_row(
            str(i), layer.mixer, layer.ffn, f"{layer.parameters:,}", f"{layer.active_parameters:,}", f"{flops:.3f}"
        )
    table.add_section()
    table.add_row(
        "all",
        _heads(model),
        "with embedding and head",
        f"{account.parameters:,}",
        f"{account.active_parameters:,}",
        f"{account.forward_flops / 1e6:.3f}",
    )
    console.print(table)
    tokens_per_step = training.tokens_per_step
    total_tokens = training.steps * tokens_per_step
    weights = account.weight_bytes()
    console.print(
        f"[bold]memory[/]  weights {_bytes(weights)}, gradients {_bytes(weights)}, "
        f"optimizer at most {_bytes(account.optimizer_bytes())}, activations {_bytes(activations)} per step"
    )
    source = escape(str(facts.get("source", config.data.source)))
    files = f", {facts['train_files']} + {facts['validation_files']} files" if "train_files" in facts else ""
    if left_out := facts.get("left_out"):
        files += f" (left out: {', '.join(f'{count:,} {why}' for why, count in left_out.items())})"
    console.print(
        f"[bold]data[/]    {source}{files}: {num_tokens['train']:,} training and {num_tokens['validation']:,} "
        "validation tokens"
    )
    console.print(
        f"[bold]plan[/]    {training.steps:,} steps of {tokens_per_step:,} tokens = {_tokens(total_tokens)} "
        f"({_short(total_tokens / max(1, num_tokens['train']))} epochs), "
        f"{_flop(total_tokens * account.training_flops)} active; {config.optimizer.name}, "
        f"{config.schedule.name}, {config.trainer.precision}"
    )
    if teacher is not None:
        console.print(f"[bold]teacher[/] {escape(teacher)}", highlight=False)
    console.print(f"[bold]run[/]     {escape(str(run_dir))}", highlight=False, soft_wrap=True)


def _heads(model: DecoderConfig) -> str:
    """What attention keeps of a token: keys and values of heads, or a latent and one key that all heads share."""
    mla, heads = model.attention.mla, f"{model.attention.num_heads} heads"
    if mla is None:
        return f"{heads}, {model.num_kv_heads} kv heads of {model.head_dim}"
    return f"{heads}, a latent of {mla.kv_lora_rank} and a key of {mla.qk_rope_head_dim} for all"


def describe_teacher(opened: OpenedTargets | None, account: Account | None) -> str:
    """Where soft targets come from and what a pass of the teacher costs; None is one that trains along."""
    words = ["joint: trains along, on top of the memory and FLOPs above" if opened is None else opened.description]
    if account is not None:
        words.append(f"{account.parameters:,} parameters, {account.active_parameters:,} active")
        words.append(f"{account.forward_flops / 1e6:.3f} MFLOP/token forward")
        if opened is None:
            words.append(
                f"weights {_bytes(account.weight_bytes())}, optimizer at most {_bytes(account.optimizer_bytes())}"
            )
    return "; ".join(words)


def print_verdict(
    console: Console,
    run_dir: Path,
    metrics: Mapping[str, Any],
    baselines: Mapping[str, float],
    sample: str | None,
    next_commands: Sequence[str],
) -> None:
    bits, loss = metrics.get("validation/bits_per_byte"), metrics.get("validation/loss")
    if bits is not None:
        text = f"Held-out text in windows of {metrics['validation/seq_len']:,} tokens"
        title = ", ".join(filter(None, [text, on_windows(metrics), "bits per byte (lower is better)"]))
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column("what", min_width=36)
        table.add_column("bits per byte", justify="right")
        rows = {**baselines, "this model": bits}
        if "validation/teacher_bits_per_byte" in metrics:
            rows["its teacher"] = metrics["validation/teacher_bits_per_byte"]
        for name, value in sorted(rows.items(), key=lambda row: -row[1]):
            table.add_row(name, f"{value:.3f}", style="bold green" if name == "this model" else "")
        console.print(table)
    if loss is not None:
        theirs = metrics.get("validation/teacher_loss")
        where = f"{scored} of the" if (scored := on_windows(metrics)) else "on the whole"
        its_teacher = "" if theirs is None else f"; its teacher {theirs:.4f}"
        console.print(
            f"[bold]loss[/]    {loss:.4f} nats per token {where} validation split, in windows of "
            f"{metrics['validation/seq_len']}{its_teacher}"
        )
    if sample is not None:
        console.print("[bold]sample[/]")
        console.print(sample, markup=False, highlight=False, soft_wrap=True)
    for layer in sorted({key.split("/")[1] for key in metrics if key.startswith("router/") and "max_violation" in key}):
        console.print(
            f"[bold]router[/]  {layer}: fullest expert {metrics[f'router/{layer}/max_violation'] + 1:.2f}x its ideal "
            f"load, {metrics[f'router/{layer}/dead_share']:.0%} of its experts dead"
        )
    if "stopped_by" in metrics:
        console.print(
            f"[bold]stopped[/] at step {metrics['steps']:,}: {escape(metrics['stopped_by'])}", highlight=False
        )
    for warning in metrics["warnings"]:
        console.print(f"[bold red]warning[/] {escape(warning)}", highlight=False)
    teacher = f" and {_flop(metrics['teacher_flops'])} of the teacher" if "teacher_flops" in metrics else ""
    console.print(
        f"[bold]cost[/]    {_tokens(metrics['tokens'])} in {_duration(metrics['seconds'])}, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s, {_flop(metrics['active_flops'])}{teacher}, "
        f"peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    console.print(f"[bold]written[/] {escape(str(run_dir))}", highlight=False, soft_wrap=True)
    console.print("[bold]next[/]")
    for command in next_commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _bytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds >= 3600 else f"{seconds:.0f} s"


def _short(number: float) -> str:
    """Two decimals, or two leading digits of what they would not show."""
    return f"{number:.2f}" if number >= 0.1 or number == 0 else f"{number:.2g}"


def _tokens(number: int) -> str:
    return f"{number / 1e6:.2f}M tokens" if number >= 1e5 else f"{number:,} tokens"


def _flop(number: float) -> str:
    return f"{number / 1e12:.2f} TFLOP" if number >= 1e11 else f"{_short(number / 1e9)} GFLOP"
