"""Say how much memory a model takes, without allocating any of it: moesaic memory MODEL [key=value ...]"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from moesaic.cli.arguments import require_known, require_switches
from moesaic.cli.common import composed, launch, options_of, plain
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig, MultimodalConfig, VisionConfig, llama4_maverick, llama4_vision
from moesaic.models.encoder_costs import estimate_multimodal_memory
from moesaic.models.memory import MemoryEstimate, estimate_memory, trace_memory
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizers import build_optimizer

__all__ = ["main"]

LARGEST = 2**40
"""Sequences, or tokens in one."""
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


def find_config(name: object) -> DecoderConfig:
    """A file of conf/model; where it leaves the vocabulary to the data, it has that of the default data.

    Raises:
        InputError: there is no such model.
    """
    files = options_of("model")
    require_known("name", name, files)
    config = composed("train", [f"model={name}"])
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


def report(given: Mapping[str, Any]) -> Table:
    for key, allowed in (("dtype", [*DTYPES]), ("optimizer", ["adamw", "muon", None])):
        if given[key] not in allowed:
            raise InputError(f"{key}={given[key]!r}: must be one of {', '.join(x or 'null' for x in allowed)}")
    for key in ("batch_size", "seq_len"):
        if type(given[key]) is not int or given[key] > LARGEST:
            raise InputError(f"{key}={given[key]!r}: must be an integer >= 1, and at most {LARGEST:,}")
    require_switches(given, "checkpoint_activations", "trace")
    config, dtype, optimizer = find_config(given["name"]), DTYPES[given["dtype"]], given["optimizer"]
    sizes = {"batch_size": given["batch_size"], "seq_len": given["seq_len"]}
    checkpoint = given["checkpoint_activations"]
    how: dict[str, Any] = {**sizes, "dtype": dtype, "optimizer": optimizer, "checkpoint_activations": checkpoint}
    columns = {"formula": estimate_memory(config, **how)}
    if given["vision"] is not None:
        columns["with vision"] = estimate_multimodal_memory(_seeing(config, given), images=given["images"], **how)
    if given["trace"]:
        make = None if optimizer is None else lambda decoder: build_optimizer(decoder, OptimizerConfig(name=optimizer))
        columns["traced"] = trace_memory(
            config, **sizes, dtype=dtype, make_optimizer=make, checkpoint_activations=checkpoint
        )
    title = f"{given['name']}: {given['batch_size']} x {given['seq_len']:,} tokens, {given['dtype']}"
    made = table(title, columns)
    if left_out := columns["formula"].uncounted:
        made.caption = f"the formula leaves out {', '.join(left_out)}, which only trace=true can count"
    return made


def _seeing(text: DecoderConfig, given: Mapping[str, Any]) -> MultimodalConfig:
    """The text model with the encoder that `vision` names or describes."""
    if type(given["images"]) is not int or not 0 <= given["images"] <= LARGEST:
        raise InputError(f"images={given['images']!r}: must be an integer >= 0, and at most {LARGEST:,}")
    if given["trace"]:
        raise InputError("trace=true: must be false with vision, which only the formula counts")
    vision = llama4_vision(llama4_maverick()).vision
    if given["vision"] != "llama4":
        if not isinstance(given["vision"], Mapping):
            raise InputError(f"vision={given['vision']!r}: must be llama4, a mapping of an encoder's keys, or null")
        vision = from_mapping(VisionConfig, given["vision"], "vision")
    return MultimodalConfig(text, vision, image_token=0 if text.padding_token else 1)


def _task(config: DictConfig) -> None:
    Console(emoji=False).print(report(plain(config)))


def main(arguments: Sequence[str]) -> None:
    launch("memory", arguments, _task)
