"""Hold this package against transformers on any directory of theirs, without writing Python.

    python -m moesaic.interop logits DIRECTORY INPUTS OUTPUT [--dtype float32] [--prefill N]
    python -m moesaic.interop roundtrip DIRECTORY OUTPUT_DIRECTORY [--with-vision]

DIRECTORY has config.json and (sharded) safetensors in transformers' format. INPUTS holds input_ids (B, L) and, if some
of them are padding, attention_mask (B, L): .safetensors, .npz or .pt with these names, .json with these keys, or .npy
with the ids alone. With pixel_values (tiles, C, H, W) among them the model is the whole of a Llama 4, vision included.
OUTPUT gets the logits (B, L, V) in fp32 (fp64 of fp64 weights): .safetensors, .npz or .pt under the name logits, or
.npy. --prefill N runs the first N tokens at once, with all pictures, and the rest one by one through the KV cache.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from moesaic.errors import InputError
from moesaic.files import atomic
from moesaic.interop.weights import from_hf, multimodal_from_hf, to_hf

__all__ = ["compute_logits", "main"]


@torch.no_grad()
def compute_logits(
    directory: str | Path, inputs: str | Path, *, dtype: torch.dtype | None = None, prefill: int | None = None
) -> Tensor:
    """Logits (B, L, V), at least fp32, of the model in `directory` for a file of inputs; see the module's docstring.

    Raises:
        InputError: a directory or file that cannot be used, or ids outside the vocabulary.
    """
    tokens, attention_mask, pixels = _read_inputs(Path(inputs))
    if prefill is not None and not 1 <= prefill <= tokens.size(1):
        raise InputError(f"--prefill {prefill}: must be 1 to the number of tokens, {tokens.size(1)}")
    decoder = from_hf(directory, dtype=dtype) if pixels is None else multimodal_from_hf(directory, dtype=dtype)
    seen = {} if pixels is None else {"images": pixels.to(decoder.dtype)}
    if tokens.min() < 0 or tokens.max() >= decoder.vocab_size:
        raise InputError(
            f"{inputs}: found ids {int(tokens.min())} to {int(tokens.max())}; must be 0 to {decoder.vocab_size - 1}"
        )
    cache = None if prefill is None else decoder.make_cache()
    length, pieces = tokens.size(1), []
    starts = [0] if prefill is None else [0, *range(prefill, length)]
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        mask = None if attention_mask is None else attention_mask[:, :end]
        try:
            pieces.append(decoder(tokens[:, start:end], cache, mask, **(seen if start == 0 else {})).logits)
        except ValueError as error:  # pictures that do not fit the tokens
            raise InputError(f"{inputs}: {error}") from error
    logits = torch.cat(pieces, dim=1)
    return logits if logits.dtype == torch.float64 else logits.float()


def _read_inputs(path: Path) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        values = _load(path)
        if isinstance(values, dict):
            names = ("input_ids", "attention_mask", "pixel_values")
            values = {name: torch.as_tensor(x) for name, x in values.items() if name in names}
    except InputError:
        raise
    except Exception as error:  # each format has errors of its own
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict) or "input_ids" not in values:
        raise InputError(f"{path}: no input_ids in it; it needs these, and attention_mask where there is padding")
    tensors = []
    for name in ("input_ids", "attention_mask"):
        tensor = values.get(name)
        if tensor is not None and (tensor.dim() != 2 or not tensor.numel() or tensor.is_floating_point()):
            raise InputError(
                f"{path}: {name} of shape {tuple(tensor.shape)}, {tensor.dtype}; must be integers (batch, length)"
            )
        tensors.append(tensor)
    tokens, attention_mask = tensors
    pixels = values.get("pixel_values")
    if pixels is not None and (pixels.dim() != 4 or not pixels.is_floating_point()):
        raise InputError(
            f"{path}: pixel_values of shape {tuple(pixels.shape)}, {pixels.dtype}; must be floating-point (tiles, "
            "channels, height, width)"
        )
    assert tokens is not None
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise InputError(
            f"{path}: attention_mask of shape {tuple(attention_mask.shape)}; must be that of input_ids, "
            f"{tuple(tokens.shape)}"
        )
    return tokens.long(), attention_mask, pixels


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".npy":
        return {"input_ids": np.load(path)}
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix in (".pt", ".pth"):
        loaded = torch.load(path, weights_only=True)
        return {"input_ids": loaded} if isinstance(loaded, Tensor) else loaded
    raise InputError(f"{path}: must be one of .safetensors, .npz, .npy, .pt, .json")


def _save(path: Path, logits: Tensor) -> None:
    logits = logits.contiguous()
    with atomic(path) as partial, partial.open("wb") as file:
        if path.suffix == ".safetensors":
            file.write(save({"logits": logits}))
        elif path.suffix == ".npz":
            np.savez(file, logits=logits.numpy())
        elif path.suffix == ".npy":
            np.save(file, logits.numpy())
        else:
            torch.save({"logits": logits}, file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moesaic.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    logits = commands.add_parser("logits", help="logits of a directory for a file of input ids")
    for name in ("directory", "inputs", "output"):
        logits.add_argument(name, type=Path)
    logits.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], help="default: as stored")
    logits.add_argument("--prefill", type=int, help="tokens at once; the rest one by one through the cache")
    roundtrip = commands.add_parser("roundtrip", help="read a directory into our decoder, and write it again")
    for name in ("directory", "output"):
        roundtrip.add_argument(name, type=Path)
    roundtrip.add_argument("--with-vision", action="store_true", help="the whole of a Llama 4, not its text alone")
    given = parser.parse_args(arguments)
    try:
        if given.command == "roundtrip":
            read = multimodal_from_hf if given.with_vision else from_hf
            to_hf(read(given.directory), given.output)
        else:
            if given.output.suffix not in (".safetensors", ".npz", ".npy", ".pt"):
                raise InputError(f"{given.output}: must be one of .safetensors, .npz, .npy, .pt")
            if not given.output.parent.is_dir():
                raise InputError(f"{given.output}: no such directory as {given.output.parent}")
            dtype = None if given.dtype is None else getattr(torch, given.dtype)
            _save(given.output, compute_logits(given.directory, given.inputs, dtype=dtype, prefill=given.prefill))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
