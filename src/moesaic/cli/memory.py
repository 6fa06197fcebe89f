"""How much memory does a model take, also one that no machine here can hold? Nothing of it is allocated.

python scripts/memory.py scout                  # one sequence of 8192 tokens in bf16, AdamW
python scripts/memory.py maverick --batch-size 4 --seq-len 32768 --optimizer muon --checkpoint-activations
python scripts/memory.py small --dtype float32 --trace    # by formula, and counted on tensors without memory

MODEL is scout, maverick, behemoth_guess, or a file of conf/model. One process holds everything: nothing is sharded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from moesaic.cli.common import CONFIG_PATH, exit_on_bad_input, plain
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig, llama4_behemoth_guess, llama4_maverick, llama4_scout
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizers import build_optimizer

__all__ = ["main"]

PRESETS = {"scout": llama4_scout, "maverick": llama4_maverick, "behemoth_guess": llama4_behemoth_guess}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
ROWS = {
    "weights": "",
    "gradients": "once all are there",
    "optimizer": "its state",
    "activations": "kept for the backward",
    "loss": "on top: logits, gradients of the head",
    "step": "peak with gradients, forward to backward",
    "optimizer_step": "peak with gradients, of its step",
    "total": "weights, state, the higher of both peaks",
    "kv_cache": "all sequences, full length",
    "decoding": "weights and KV cache",
}


def find_config(name: str) -> DecoderConfig:
    """A preset, or a file of conf/model with the vocabulary of the default data.

    Raises:
        InputError: there is no such model.
    """
    if name in PRESETS:
        return PRESETS[name]()
    files = sorted(path.stem for path in (Path(CONFIG_PATH) / "model").glob("*.yaml"))
    if name not in files:
        raise InputError(f"model={name}: allowed are {', '.join([*PRESETS, *files])}")
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        config = plain(compose("train", [f"model={name}"]))
    model = config["model"]
    return from_mapping(DecoderConfig, {**model, "vocab_size": model["vocab_size"] or config["data"]["vocab_size"]})


def table(title: str, columns: dict[str, MemoryEstimate]) -> Table:
    made = Table(title=title)
    made.add_column("")
    for name in columns:
        made.add_column(name, justify="right")
    made.add_column("what")
    for row, what in ROWS.items():
        made.add_row(row.replace("_", " "), *(show(getattr(found, row)) for found in columns.values()), what)
    return made


def show(n: int) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def report(given: argparse.Namespace) -> Table:
    config, dtype = find_config(given.model), DTYPES[given.dtype]
    optimizer = None if given.optimizer == "none" else given.optimizer
    sizes = {"batch_size": given.batch_size, "seq_len": given.seq_len}
    checkpoint = given.checkpoint_activations
    columns = {
        "formula": estimate_memory(config, **sizes, dtype=dtype, optimizer=optimizer, checkpoint_activations=checkpoint)
    }
    if given.trace:
        make = None if optimizer is None else lambda decoder: build_optimizer(decoder, OptimizerConfig(name=optimizer))
        columns["traced"] = trace_memory(
            config, **sizes, dtype=dtype, make_optimizer=make, checkpoint_activations=checkpoint
        )
    return table(f"{given.model}: {given.batch_size} x {given.seq_len:,} tokens, {given.dtype}", columns)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="scout, maverick, behemoth_guess, or a file of conf/model")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of everything; default: bfloat16")
    parser.add_argument("--optimizer", choices=["adamw", "muon", "none"], default="adamw")
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--trace", action="store_true", help="count as well, on tensors without memory (seconds)")
    given = parser.parse_args(arguments)
    exit_on_bad_input(lambda: Console().print(report(given)))


if __name__ == "__main__":
    main()
