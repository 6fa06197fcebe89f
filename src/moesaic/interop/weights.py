"""Weights between transformers' files or models and our decoder.

A parameter or buffer of ours is one tensor of theirs, or several that stand side by side in it; `layouts` says which.
Nothing is computed, only copied, so a round trip is bit-equal. Files are read and written tensor by tensor.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moesaic.devices import require_memory
from moesaic.errors import InputError
from moesaic.files import LOCK, staging_folder, sync, write_atomically, write_json, writing
from moesaic.interop.architectures import Architecture, architecture_of, config_to_hf
from moesaic.interop.layouts import AS_OURS, WHOLE, Layout, Piece, WithVision
from moesaic.interop.llama4_vision_config import multimodal_config_from_hf, multimodal_config_to_hf
from moesaic.layers import BackendName
from moesaic.models import (
    Decoder,
    DecoderConfig,
    MultimodalConfig,
    MultimodalDecoder,
    VisionConfig,
    build_decoder,
    build_multimodal,
)
from moesaic.models.decoder import FOREIGN_FILES
from moesaic.models.multimodal import MULTIMODAL_FILES
from moesaic.models.shapes import num_parameters
from moesaic.reading import read_json, reading, require_finite

__all__ = [
    "CheckReport",
    "Progress",
    "check_hf",
    "from_hf",
    "gradients_to_hf",
    "hf_name",
    "multimodal_from_hf",
    "to_hf",
]

Progress = Callable[[int, int, str], None]
"""Called as progress(tensors done, tensors in all, name) after each tensor."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DIGEST = "moesaic.sha256"
"""Name in the metadata of a file that we wrote: SHA-256 of its data."""
ABSENT = "absent"
"""Stands for the dtype of a tensor whose file is not here."""
VISION = ("vision_model.", "multi_modal_projector.")

logger = logging.getLogger("moesaic.interop")


def hf_name(name: str) -> str:
    """transformers' name of one of our decoder's parameters, in a Llama 4."""
    return AS_OURS.hf_name(name)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # the file's own name where it is none of DTYPES
    read: Callable[[], Tensor]
    keeps_dtype: bool = False  # whatever the files are asked to have


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check_hf` found to be in order."""

    config: DecoderConfig
    tensors: int
    bytes: int
    """Bytes of these tensors, in the dtypes of the files; 0 if no shard was there."""
    skipped: int
    """Tensors that have no place in the model."""
    skipped_kind: str
    """What they are: "vision", "multi-token prediction", or empty for an architecture that has no such."""
    vision: VisionConfig | None
    """The config of the encoder, where it was checked too."""
    absent_shards: tuple[str, ...]
    """Files that the index names and that are not here: of their tensors only the names were checked."""


def from_hf(
    source: str | Path | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    checkpoint_activations: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """The decoder with the weights of a model in transformers' format, in evaluation mode.

    Supported are Llama 4, Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and gpt-oss (`ARCHITECTURES`). The text part of
    `Llama4ForConditionalGeneration` is taken, its vision tensors are skipped (and counted in the log). So are
    DeepSeek-V3's layers for multi-token prediction.
    Every tensor must be accounted for. Memory: the decoder and one tensor; nothing is shared with the source.

    Args:
        source: a directory with config.json and (sharded) safetensors, or a transformers model.
        dtype: of the decoder; None keeps each tensor's own. With a dtype, selection biases are in fp32.
        backend: of the experts, see `moesaic.layers.BACKENDS`.
        checkpoint_activations: see `Decoder`.
        progress: called after each tensor.

    Raises:
        InputError: no config, an unsupported architecture or value, a missing, truncated or unexpected file or tensor,
            a wrong shape, or a dtype that is not floating point.
    """
    with _source(source, FOREIGN_FILES) as (where, config_json, stored, files):
        architecture, text, prefix = architecture_of(config_json)
        config = _on(backend, _config(architecture, text, stored))
        require_memory(f"{where}: its model", num_parameters(config) * (dtype or torch.bfloat16).itemsize)
        decoder = build_decoder(config, checkpoint_activations=checkpoint_activations, device="meta")
        kind, ignored = _ignored(architecture, text, prefix)
        tensors, skipped = _match(decoder, architecture.layout, stored, prefix, ignored, where)
        if skipped:
            logger.warning("%s: %d %s tensors skipped, the decoder has no place for them", where, skipped, kind)
        _fill_all(decoder, tensors, dtype, progress)
        decoder.foreign_files = {**files, "config.json": json.dumps(dict(text), default=str)}
        return decoder.eval()


def multimodal_from_hf(
    source: str | Path | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    checkpoint_activations: bool = False,
    progress: Progress | None = None,
) -> MultimodalDecoder:
    """The whole of a `Llama4ForConditionalGeneration`, vision included, in evaluation mode.

    Arguments, strictness and memory are those of `from_hf`.

    Raises:
        InputError: as `from_hf`.
    """
    with _source(source, MULTIMODAL_FILES) as (where, config_json, stored, files):
        config = _whole_config(config_json, stored)
        config = dataclasses.replace(config, text=_on(backend, config.text))
        model = build_multimodal(config, checkpoint_activations=checkpoint_activations, device="meta")
        size = sum(p.numel() for p in model.parameters())
        require_memory(f"{where}: its model", size * (dtype or torch.bfloat16).itemsize)
        tensors, _ = _match(model, WHOLE, stored, "", (), where)
        _fill_all(model, tensors, dtype, progress)
        model.foreign_files = {**files, "config.json": json.dumps(dict(config_json), default=str)}
        return model.eval()


@contextmanager
def _source(
    source: str | Path | nn.Module, file_names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, _Stored], dict[str, str]]]:
    """The name of a source for messages, its config.json, its tensors, and the other files of these names."""
    if isinstance(source, nn.Module):
        yield type(source).__name__, *_of_module(source), {}
        return
    path, files = Path(source), {}
    with reading(path):
        config_json, stored = _read_config(path), _of_directory(path)
        for name in file_names[1:]:
            if (path / name).is_file():
                with reading(path / name):
                    files[name] = (path / name).read_text(encoding="utf-8")
        yield str(source), config_json, stored, files


def _on(backend: BackendName, config: DecoderConfig) -> DecoderConfig:
    if config.moe is None or backend == "auto":
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, backend=backend))


def _fill_all(
    model: Decoder | MultimodalDecoder,
    tensors: Mapping[str, list[tuple[Piece, _Stored]]],
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> None:
    """Replace every parameter and stored buffer of a model on the meta device."""
    done, total = 0, sum(map(len, tensors.values()))

    def tell(piece: Piece) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, piece.name)

    for name, pieces in tensors.items():
        _fill(model, name, pieces, dtype, tell)
    text = _text_of(model)
    if text.tie_embeddings:
        text.head.weight = text.embedding.weight


def _text_of(model: Decoder | MultimodalDecoder) -> Decoder:
    return model.decoder if isinstance(model, MultimodalDecoder) else model


def check_hf(directory: str | Path, *, with_vision: bool = False) -> CheckReport:
    """Check a directory's config, index, names, shapes and dtypes without reading a weight or allocating one.

    Shards that the index names but that are not there are allowed, so that config.json and the index of a model too
    large to download can be checked; `CheckReport.absent_shards` lists them.

    Args:
        with_vision: check for `multimodal_from_hf`, instead of `from_hf`.

    Raises:
        InputError: as `from_hf`.
    """
    path = Path(directory)
    with reading(path):
        return _check(path, with_vision)


def _config(architecture: Architecture, text: Mapping[str, Any], stored: Mapping[str, _Stored]) -> DecoderConfig:
    """The config, if its number of layers is possible: it is refused before anything of this size is made."""
    require_finite(text, "config.json")
    _require_layers(text, stored)
    return architecture.read(text)


def _ignored(architecture: Architecture, text: Mapping[str, Any], prefix: str) -> tuple[str, tuple[str, ...]]:
    """What the source may have besides, and how the names of these tensors begin."""
    return ("vision", VISION) if prefix else (architecture.unused_name, architecture.unused(text))


def _whole_config(config_json: Mapping[str, Any], stored: Mapping[str, _Stored]) -> MultimodalConfig:
    require_finite(config_json, "config.json")
    for part in ("text_config", "vision_config"):
        if isinstance(fields := config_json.get(part), Mapping):
            _require_layers(fields, stored)
    return multimodal_config_from_hf(config_json)


def _require_layers(fields: Mapping[str, Any], stored: Mapping[str, _Stored]) -> None:
    layers = fields.get("num_hidden_layers", 0)
    if isinstance(layers, (int, float)) and layers > len(stored):
        raise InputError(f"config.json: num_hidden_layers={layers}: the files hold {len(stored)} tensors in all")


def _check(path: Path, with_vision: bool) -> CheckReport:
    config_json = _read_config(path)
    stored = _of_directory(path, absent_allowed=True)
    vision = None
    if with_vision:
        whole = _whole_config(config_json, stored)
        config, vision, kind = whole.text, whole.vision, ""
        matched, skipped = _match(build_multimodal(whole, device="meta"), WHOLE, stored, "", (), str(path))
    else:
        architecture, text, prefix = architecture_of(config_json)
        config = _config(architecture, text, stored)
        kind, ignored = _ignored(architecture, text, prefix)
        decoder = build_decoder(config, device="meta")
        matched, skipped = _match(decoder, architecture.layout, stored, prefix, ignored, str(path))
    tensors = [tensor for pieces in matched.values() for _, tensor in pieces]
    present = [t for t in tensors if isinstance(t.dtype, torch.dtype)]
    return CheckReport(
        config=config,
        tensors=len(tensors),
        bytes=sum(t.dtype.itemsize * torch.Size(t.shape).numel() for t in present if isinstance(t.dtype, torch.dtype)),
        skipped=skipped,
        skipped_kind=kind,
        vision=vision,
        absent_shards=_absent_shards(path),
    )


def to_hf(
    decoder: Decoder | MultimodalDecoder,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Write the decoder in transformers' format: config.json and (sharded) safetensors.

    It becomes the architecture that it was read from, or else the first of `ARCHITECTURES` that holds it exactly. A
    `MultimodalDecoder` becomes a `Llama4ForConditionalGeneration`. Each expert has tensors of its own where the
    architecture's published files have that.

    What `from_hf` read beside the weights (token ids, generation_config.json, tokenizer) is written again. The files
    appear under their names only when all are complete, config.json last. Memory: the decoder and one tensor.

    Args:
        directory: new, or without a model in it.
        dtype: of the files; None keeps each parameter's own. Selection biases keep theirs, fp32, as in published files.
        max_shard_bytes: a shard holds at most this much, or one tensor.
        progress: called after each tensor.

    Raises:
        InputError: no architecture holds the decoder (every difference to the nearest is named), it has no weights
            (meta device) or no config, or the directory already holds a model.
    """
    target = Path(directory)
    if decoder.config is None:
        raise InputError("this decoder has no config: only decoders of build_decoder can be written")
    _require_writable(decoder, dtype)
    _require_free(target)
    config, layout = _written_config(decoder, str(dtype or decoder.dtype).removeprefix("torch."))
    parameters = _tensors_to_write(decoder, layout)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(target) as staging:
        _write_weights(staging, parameters, dtype, max_shard_bytes, progress)
        for file_name in MULTIMODAL_FILES[1:]:  # by our names: a checkpoint may come from anybody
            if file_name in decoder.foreign_files:
                write_atomically(staging / file_name, decoder.foreign_files[file_name])
        write_json(staging / "config.json", config)
        target.mkdir(exist_ok=True)
        for file in sorted(staging.iterdir(), key=lambda file: file.name == "config.json"):
            if file.name != LOCK:
                file.replace(target / file.name)
        sync(target)


def _written_config(decoder: Decoder | MultimodalDecoder, dtype: str) -> tuple[dict[str, Any], Layout | WithVision]:
    """config.json for a model, and the names of its tensors.

    Raises:
        InputError: no architecture holds it.
    """
    carried = json.loads(decoder.foreign_files.get("config.json", "{}"))
    if isinstance(decoder, MultimodalDecoder):
        assert decoder.config is not None
        return multimodal_config_to_hf(decoder.config, carried, dtype), WHOLE
    assert decoder.config is not None
    config = config_to_hf(decoder.config, carried, dtype)
    return config, architecture_of(config)[0].layout


def gradients_to_hf(decoder: Decoder | MultimodalDecoder) -> dict[str, Tensor | None]:
    """The gradients of a decoder by the names and in the layouts of a transformers model in memory.

    They are copies; None where there is none. A tied head has its embedding's name.

    Raises:
        InputError: no architecture holds the decoder, or it has no config.
    """
    if decoder.config is None:
        raise InputError("this decoder has no config: only decoders of build_decoder have names in transformers")
    layout, gradients = _written_config(decoder, "float32")[1], {}
    for name, parameter in decoder.named_parameters():
        (piece,) = layout.pieces(name, tuple(parameter.shape), _head_dim(decoder), in_model=True)
        gradient = parameter.grad
        gradients[piece.name] = None if gradient is None else piece.view(gradient).reshape(piece.shape).clone()
    return gradients


def _head_dim(decoder: Decoder | MultimodalDecoder) -> int:
    config = _text_of(decoder).config
    assert config is not None
    return config.head_dim


def _require_writable(decoder: Decoder | MultimodalDecoder, dtype: torch.dtype | None) -> None:
    """Raise InputError for a parameter without data, a dtype that files do not have, or two tied that differ."""
    for name, p in decoder.named_parameters(remove_duplicate=False):
        if p.is_meta:
            raise InputError(f"{name}: on the meta device, it has no data to write")
        if (dtype or p.dtype) not in DTYPES.values():
            raise InputError(
                f"{name}: found dtype {dtype or p.dtype}; must be one of {', '.join(map(str, DTYPES.values()))}"
            )
    text = _text_of(decoder)
    head, embedding = text.head.weight, text.embedding.weight
    if text.tie_embeddings and head is not embedding and not torch.equal(head, embedding):
        raise InputError("head.weight differs from embedding.weight, but the config says tie_embeddings=true")


def _buffers(model: Decoder | MultimodalDecoder) -> dict[str, Tensor]:
    """What belongs to the weights and is no parameter: the selection biases of routers."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _tensors_to_write(decoder: Decoder | MultimodalDecoder, layout: Layout | WithVision) -> dict[str, _Stored]:
    """By transformers' names in files, without the head of a tied decoder."""
    tensors, buffers = {}, _buffers(decoder)
    for name, x in [*decoder.named_parameters(remove_duplicate=False), *buffers.items()]:
        if name in ("head.weight", "decoder.head.weight") and _text_of(decoder).tie_embeddings:
            continue
        for piece in layout.pieces(name, tuple(x.shape), _head_dim(decoder), in_model=False):
            tensors[piece.name] = _Stored(piece.shape, x.dtype, partial(_read_piece, x, piece), name in buffers)
    return tensors


def _read_piece(parameter: Tensor, piece: Piece) -> Tensor:
    return piece.view(parameter.detach()).reshape(piece.shape)


def _require_free(target: Path) -> None:
    """Raise InputError unless `target` is a directory without a model, or does not exist."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: a file, not a directory")
    for pattern in ("config.json", "*.safetensors", INDEX):
        if found := sorted(target.glob(pattern)):
            raise InputError(f"{found[0]}: there is already a model in this directory; choose another one")


def _write_weights(
    directory: Path,
    parameters: Mapping[str, _Stored],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    """The shards, and their index if there are several."""
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(parameters), name)

    shards = _shards(parameters, dtype, max_shard_bytes)
    for file_name, names in shards.items():
        _write_safetensors(directory / file_name, {name: parameters[name] for name in names}, dtype, tell)
    if len(shards) > 1:
        total = sum(_bytes(p, dtype) for p in parameters.values())
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


# ---- matching names


def _match(
    decoder: Decoder | MultimodalDecoder,
    layout: Layout | WithVision,
    stored: Mapping[str, _Stored],
    prefix: str,
    ignored: tuple[str, ...],
    where: str,
) -> tuple[dict[str, list[tuple[Piece, _Stored]]], int]:
    """Names of our parameters and buffers -> tensors of the source; every one on either side accounted for.

    Args:
        ignored: how the names of tensors begin that may be there besides; the second result is their number.
    """
    # files may have the stacked tensors of a model in memory too
    in_model = layout.experts is not None and any(name.endswith(".experts.gate_up_proj") for name in stored)
    skipped = {name for name in stored if name.startswith(ignored)}
    sizes = {name: tuple(x.shape) for name, x in [*decoder.named_parameters(), *_buffers(decoder).items()]}
    pieces = {
        name: [
            dataclasses.replace(piece, name=prefix + piece.name)
            for piece in layout.pieces(name, shape, _head_dim(decoder), in_model=in_model)
        ]
        for name, shape in sizes.items()
    }
    wanted = {piece.name: piece for parts in pieces.values() for piece in parts}
    of_text = prefix if isinstance(layout, Layout) else layout.prefix
    tied_head = of_text + "lm_head.weight"
    unused_head = stored.get(tied_head) if _text_of(decoder).tie_embeddings else None
    missing = [name for name in wanted if name not in stored]
    unexpected = [
        name for name in stored if name not in wanted and name not in skipped and (name != tied_head or not unused_head)
    ]
    problems = [_listed(missing, "missing"), _listed(unexpected, "unexpected")]
    for name, piece in wanted.items():
        tensor = stored.get(name)
        if tensor is None or tensor.dtype == ABSENT:
            continue
        if tensor.shape != piece.shape:
            problems.append(f"{name}: found shape {list(tensor.shape)}, config.json says {list(piece.shape)}")
        if tensor.dtype not in DTYPES.values():
            problems.append(f"{name}: found dtype {tensor.dtype}; must be one of {', '.join(DTYPES)}")
    for parts in pieces.values():
        found = {x.dtype: part.name for part in parts if (x := stored.get(part.name)) and x.dtype != ABSENT}
        if len(found) > 1:
            listed = ", ".join(f"{name} {dtype}" for dtype, name in found.items())
            problems.append(f"{listed}: must have one dtype, they become one parameter")
    problems = [problem for problem in problems if problem]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise InputError(f"{where}: {'; '.join(problems[:4])}{more}")
    if unused_head is not None and unused_head.dtype != ABSENT:
        embedding = stored[of_text + "model.embed_tokens.weight"]
        if unused_head.shape != embedding.shape or not torch.equal(unused_head.read(), embedding.read()):
            raise InputError(f"{where}: {tied_head} differs from the embedding although tie_word_embeddings=true")
    return {name: [(piece, stored[piece.name]) for piece in parts] for name, parts in pieces.items()}, len(skipped)


def _listed(names: list[str], word: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{word} tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


@torch.no_grad()
def _fill(
    decoder: nn.Module,
    name: str,
    pieces: list[tuple[Piece, _Stored]],
    dtype: torch.dtype | None,
    tell: Callable[[Piece], None],
) -> None:
    """Replace a parameter or buffer on the meta device by a copy of the stored tensors that it is made of."""
    module_name, _, parameter_name = name.rpartition(".")
    module = decoder.get_submodule(module_name)
    is_buffer = parameter_name in module._buffers
    if is_buffer and dtype is not None:
        dtype = getattr(module, parameter_name).dtype
    copy: Tensor | None = None
    for piece, tensor in pieces:
        read = tensor.read()
        if copy is None:
            # a copy, also where the dtype is right: what is read may be a view of a mapped file or of the source model
            shape = getattr(module, parameter_name).shape
            copy = torch.empty(shape, dtype=dtype or read.dtype, device=read.device)
        part = piece.view(copy)
        part.copy_(read.reshape(part.shape))
        tell(piece)
    assert copy is not None
    setattr(module, parameter_name, copy if is_buffer else nn.Parameter(copy))


# ---- reading


def _of_module(model: nn.Module) -> tuple[dict[str, Any], dict[str, _Stored]]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise InputError(f"{type(model).__name__}: no transformers model, it has no config")
    stored = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise InputError(f"{type(model).__name__}: {name} is on the meta device, it has no data to read")
        known = tensor.dtype if tensor.dtype in DTYPES.values() else str(tensor.dtype)
        stored[name] = _Stored(tuple(tensor.shape), known, lambda tensor=tensor: tensor)  # type: ignore[misc]
    return {**config.to_dict(), "architectures": [type(model).__name__]}, stored


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json in this directory; it needs one beside its safetensors")
    return read_json(directory / "config.json")


def _of_directory(directory: Path, absent_allowed: bool = False) -> dict[str, _Stored]:
    """Name -> tensor of every safetensors file that belongs to the model; only the headers are read."""
    if not (directory / INDEX).is_file():
        if not (directory / SINGLE).is_file():
            others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
            raise InputError(f"{directory}: found {others or 'no weights'}; must be {SINGLE} or {INDEX}")
        return _header(directory / SINGLE, with_digest=not absent_allowed)
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{directory / INDEX}: damaged, it has no weight_map")
    stored: dict[str, _Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        mapped = {name for name, file in weight_map.items() if file == file_name}
        path = directory / str(file_name)
        if not path.is_file():
            if not absent_allowed:
                raise InputError(f"{path}: missing; {INDEX} expects {len(mapped)} tensors in it")
            stored |= {name: _Stored((), ABSENT, torch.Tensor) for name in mapped}
            continue
        found = _header(path, with_digest=not absent_allowed)
        if found.keys() != mapped:
            parts = (
                _listed(sorted(mapped - found.keys()), "missing"),
                _listed(sorted(found.keys() - mapped), "unexpected"),
            )
            raise InputError(f"{path}: does not hold what {INDEX} says: {'; '.join(part for part in parts if part)}")
        stored |= found
    return stored


def _absent_shards(directory: Path) -> tuple[str, ...]:
    if not (directory / INDEX).is_file():
        return ()
    names = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
    return tuple(name for name in names if not (directory / name).is_file())


def _header(path: Path, with_digest: bool) -> dict[str, _Stored]:
    """Name -> tensor of one file; its data are compared with the digest in its metadata, if there is one."""

    def read(name: str) -> Tensor:
        # opened anew for each tensor: an open file stays mapped, and counts as memory, up to the last page touched
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get(DIGEST)
            stored = {}
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                entry = file.get_slice(name)
                shape, kind = tuple(entry.get_shape()), str(entry.get_dtype())
                stored[name] = _Stored(shape, DTYPES.get(kind, kind), lambda name=name: read(name))  # type: ignore[misc]
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({error})") from error
    if digest is not None and with_digest and digest != _data_digest(path):
        raise InputError(f"{path}: damaged, its data have not the SHA-256 in its metadata; take a copy of it")
    return stored


def _data_digest(path: Path) -> str:
    """SHA-256 of all that follows the header."""
    with path.open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing


def _bytes(tensor: _Stored, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * _written_as(tensor, dtype).itemsize


def _written_as(tensor: _Stored, dtype: torch.dtype | None) -> torch.dtype:
    written = tensor.dtype if tensor.keeps_dtype else dtype or tensor.dtype
    assert isinstance(written, torch.dtype)  # of a parameter
    return written


def _shards(parameters: Mapping[str, _Stored], dtype: torch.dtype | None, limit: int) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order."""
    if limit < 1:
        raise InputError(f"max_shard_bytes={limit}: must be a number >= 1")
    groups: list[list[str]] = [[]]
    held = 0
    for name, parameter in parameters.items():
        size = _bytes(parameter, dtype)
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


@torch.no_grad()
def _write_safetensors(
    path: Path, tensors: Mapping[str, _Stored], dtype: torch.dtype | None, tell: Callable[[str], None]
) -> None:
    """The safetensors format: length of the header, header, data.

    Its metadata hold the SHA-256 of the data, which other readers ignore.

    Written here because the package's own writer wants all tensors of a file at once, a second copy where they are cast
    or come from another device.
    """
    names_of = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST: "0" * 64}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _bytes(tensor, dtype)
        header[name] = {
            "dtype": names_of[_written_as(tensor, dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    hashed = hashlib.sha256()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors.items():
            written = tensor.read().to("cpu", _written_as(tensor, dtype)).contiguous()
            data = written.reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            hashed.update(data)
            tell(name)
        file.seek(8)  # known now, and as long as what stands there
        file.write(encoded.replace(b"0" * 64, hashed.hexdigest().encode(), 1))
        file.flush()
        os.fsync(file.fileno())
