"""Convert between transformers' directories and our checkpoints: moesaic convert SOURCE DESTINATION"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moesaic.checkpoints import load_checkpoint, load_model, load_multimodal, save_model, write_checkpoint
from moesaic.cli.arguments import require_switches
from moesaic.cli.common import launch, plain
from moesaic.data import BPETokenizer, Tokenizer
from moesaic.data.tokenizers import END_OF_TEXT
from moesaic.errors import InputError
from moesaic.interop import check_hf, config_to_hf, from_hf, multimodal_from_hf, to_hf
from moesaic.interop.llama4_vision_config import multimodal_config_to_hf
from moesaic.interop.weights import Progress as TensorProgress
from moesaic.models import Decoder, DecoderConfig, MultimodalDecoder, account
from moesaic.parallel.manifest import is_sharded_checkpoint
from moesaic.reading import reading

__all__ = ["convert", "convert_with_vision", "main"]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: Path, destination: Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> Decoder:
    """Convert `source` to `destination` (a .ckpt file, or else a transformers directory); returns the decoder.

    Of a checkpoint that several processes wrote, a directory, the file has all that is in it.

    Raises:
        InputError: either cannot be used; nothing is written then.
    """
    to_checkpoint = destination.suffix == ".ckpt"
    if destination.exists() and (to_checkpoint or not destination.is_dir()):
        raise InputError(f"{destination}: exists already; choose another name")
    if to_checkpoint and is_sharded_checkpoint(source):
        if dtype is not None:
            raise InputError(f"dtype={dtype}: must be null where {source} becomes one file, which holds what it holds")
        decoder = load_model(source).decoder
        write_checkpoint(destination, load_checkpoint(source))
        return decoder
    with _bar("reading") as tell:
        if _is_directory(source):
            decoder = from_hf(source, dtype=dtype, progress=tell)
            with reading(source / "tokenizer.json"):
                tokenizer = _read_tokenizer(decoder.foreign_files.get("tokenizer.json"))
                if tokenizer is not None and tokenizer.vocab_size > decoder.vocab_size:
                    raise InputError(f"it has {tokenizer.vocab_size} ids, the model {decoder.vocab_size}")
        else:
            if to_checkpoint and source.suffix == ".ckpt" and source.exists():
                raise InputError(f"{source}: a checkpoint already; a destination that ends in .ckpt takes a directory")
            loaded = load_model(source)
            decoder, tokenizer = loaded.decoder, loaded.tokenizer
            if not decoder.foreign_files and isinstance(tokenizer, BPETokenizer):
                decoder.foreign_files = _tokenizer_files(tokenizer)
    with _bar("writing") as tell:
        if to_checkpoint:
            save_model(destination, decoder, tokenizer)
        else:
            to_hf(decoder, destination, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=tell)
    return decoder


def convert_with_vision(
    source: Path, destination: Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> MultimodalDecoder:
    """Convert a model that sees pictures, whole; returns it. Arguments as of `convert`, a directory being of a Llama 4.

    Raises:
        InputError: either cannot be used; nothing is written then.
    """
    to_checkpoint, from_directory = destination.suffix == ".ckpt", _is_directory(source)
    if destination.exists() and (to_checkpoint or not destination.is_dir()):
        raise InputError(f"{destination}: exists already; choose another name")
    if to_checkpoint and not from_directory:
        raise InputError(f"{source}: no directory of transformers; a destination that ends in .ckpt takes one")
    with _bar("reading") as tell:
        if from_directory:
            model, tokenizer = multimodal_from_hf(source, dtype=dtype, progress=tell), None
        else:
            loaded = load_multimodal(source)
            assert loaded.multimodal is not None
            model, tokenizer = loaded.multimodal, loaded.tokenizer
    with _bar("writing") as tell:
        if to_checkpoint:
            save_model(destination, model, tokenizer)
        else:
            to_hf(model, destination, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=tell)
    return model


def _is_directory(source: Path) -> bool:
    """Whether this is a directory of transformers, rather than a checkpoint of ours."""
    return source.is_dir() and not is_sharded_checkpoint(source)


def _read_tokenizer(text: str | None) -> Tokenizer | None:
    """The tokenizer of a directory that `convert` wrote; that of others ends texts otherwise than our tools do."""
    if text is None or json.loads(text).get("model", {}).get("vocab", {}).get(END_OF_TEXT) != BPETokenizer.end_of_text:
        return None
    return BPETokenizer(text)


def _tokenizer_files(tokenizer: BPETokenizer) -> dict[str, str]:
    """What transformers' AutoTokenizer and generate() need."""
    content = json.loads(tokenizer.to_dict()["json"])
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"eos_token_id": tokenizer.end_of_text, "bos_token_id": tokenizer.end_of_text}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    return {
        "config.json": json.dumps(end),
        "tokenizer.json": json.dumps(content),
        "tokenizer_config.json": json.dumps(names),
    }


def dry_run(source: Path, with_vision: bool = False) -> Table:
    """Check all that can be checked without weights; returns what was found."""
    if not _is_directory(source):
        loaded = (load_multimodal if with_vision else load_model)(source)
        whole = loaded.multimodal if with_vision else None
        carried = json.loads((whole or loaded.decoder).foreign_files.get("config.json", "{}"))
        if whole is not None and whole.config is not None:
            written = multimodal_config_to_hf(whole.config, carried, "float32")
        else:
            written = config_to_hf(loaded.config, carried, "float32")
        return _summary(str(source), loaded.config, {"can be written as": written["architectures"][0]})
    report = check_hf(source, with_vision=with_vision)
    facts = {"tensors": f"{report.tensors}, all accounted for", "bytes": f"{report.bytes:,}"}
    if report.skipped:
        facts[f"{report.skipped_kind} tensors"] = f"{report.skipped}, would be skipped"
    if report.absent_shards:
        facts["shards not here"] = f"{len(report.absent_shards)}: of their tensors only the names were checked"
        facts["bytes"] += " in the shards that are here"
    return _summary(str(source), report.config, facts)


def _summary(title: str, config: DecoderConfig, facts: dict[str, str]) -> Table:
    counted = account(config, seq_len=config.attention.attention_chunk_size or 8192)
    moe_layers = sum(layer.ffn == "moe" for layer in config.layers)
    nope_layers = sum(layer.mixer in ("nope", "chunked_nope") for layer in config.layers)
    table = Table(title=escape(title), show_header=False)
    table.add_row("layers", f"{config.num_layers}, {moe_layers} of them MoE, {nope_layers} without positions")
    if config.moe is not None and moe_layers:
        shared = ", and a shared one" if config.moe.shared_width else ""
        table.add_row("experts", f"{config.moe.num_experts}, top {config.moe.top_k}{shared}")
    table.add_row("parameters", f"{counted.parameters:,}, {counted.active_parameters:,} active")
    for name, value in facts.items():
        table.add_row(name, escape(value))
    return table


@contextmanager
def _bar(what: str) -> Iterator[TensorProgress]:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(emoji=False, stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total, name: progress.update(task, completed=done, total=total, description=f"{what} {name}")


def _task(config: DictConfig) -> None:
    given = plain(config)
    console = Console(emoji=False)
    started = time.perf_counter()
    require_switches(given, "dry_run", "with_vision")
    for key in ("source", "destination"):
        if not isinstance(given[key], str) and (key == "source" or not given["dry_run"]):
            raise InputError(f"{key}: missing; give moesaic convert SOURCE DESTINATION, or SOURCE dry_run=true")
    source = Path(given["source"])
    if given["dry_run"]:
        console.print(dry_run(source, given["with_vision"]))
        return
    if given["dtype"] not in (None, *DTYPES):
        raise InputError(f"dtype={given['dtype']!r}: must be one of {', '.join(DTYPES)}, or null")
    limit = given["max_shard_gb"]
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < 1e9:
        raise InputError(f"max_shard_gb={limit!r}: must be a number > 0 and < 1e9")
    dtype = DTYPES.get(given["dtype"])
    write = convert_with_vision if given["with_vision"] else convert
    decoder = write(source, Path(given["destination"]), dtype, int(limit * 1e9))
    parameters = dict(decoder.named_parameters())
    dtypes = {dtype or p.dtype for p in parameters.values()}
    facts = {
        "tensors": str(len(parameters)),
        "bytes": f"{sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters.values()):,}",
        "dtype": ", ".join(sorted(str(x).removeprefix("torch.") for x in dtypes)),
        "seconds": f"{time.perf_counter() - started:.1f}",
        "written": given["destination"],
    }
    text = decoder.decoder if isinstance(decoder, MultimodalDecoder) else decoder
    assert text.config is not None
    if text is not decoder:
        facts["parameters with vision"] = f"{sum(p.numel() for p in parameters.values()):,}"
    console.print(_summary(given["source"], text.config, facts))


def main(arguments: Sequence[str]) -> None:
    launch("convert", arguments, _task)
