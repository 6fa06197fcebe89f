"""Reading checkpoints back: for resuming, evaluating and sampling."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.config import from_mapping, require_same, to_mapping
from moesaic.data import DataConfig, Tokenizer, token_bytes, tokenizer_from_dict
from moesaic.devices import require_memory
from moesaic.errors import InputError, reason
from moesaic.files import atomic, standing
from moesaic.formats import translate_model, translate_run
from moesaic.imports import trusting, trusts_change
from moesaic.models import Decoder, DecoderConfig, MultimodalConfig, MultimodalDecoder, VisionConfig, build_decoder
from moesaic.models.custom import require_trusted_modules, source_hashes
from moesaic.models.multimodal import MULTIMODAL_FILES, with_encoder
from moesaic.models.shapes import num_parameters
from moesaic.parallel.manifest import (
    CONTENT,
    Manifest,
    is_sharded_checkpoint,
    map_tensors,
    read_manifest,
    require_listed,
)
from moesaic.reading import reading, require_file, require_finite

__all__ = [
    "TrainedModel",
    "decoder_weights",
    "load_checkpoint",
    "load_model",
    "load_multimodal",
    "require_checkpoint",
    "require_finite_weights",
    "require_same_keys",
    "require_same_model",
    "save_model",
    "with_config",
    "write_checkpoint",
]


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A decoder with its weights, and what is needed to use it."""

    decoder: Decoder
    config: DecoderConfig
    run_config: dict[str, Any]
    tokenizer: Tokenizer | None
    token_bytes: torch.Tensor | None
    multimodal: MultimodalDecoder | None = None
    """`decoder` with the encoder that it sees pictures with; None where there is none."""


def load_checkpoint(path: str | Path, whole: bool = True, checked: bool = True) -> dict[str, Any]:
    """Read the content of a checkpoint of ours onto the CPU, its configs in the words of this version.

    It is a file, or a directory that several processes wrote. Its checksums are compared first, and then whether
    everything has the form that its readers expect. Nothing that it names is imported or run.

    Args:
        whole: of a directory, whether the tensors that were sharded are read. Else they are on the meta device.
        checked: of a directory, whether the hashes of its files are compared.

    Raises:
        InputError: no such file, a damaged file, one of a newer version, or not a checkpoint of this project.
    """
    path = Path(path)
    with reading(f"checkpoint {path}"):
        require_checkpoint(path)
    there = standing(path)
    try:
        return _load(path, there, whole, checked)
    except InputError:
        if there == standing(path):
            raise
        return _load(path, path, whole, checked)  # the first rank has put it back while this one read it


def _load(path: Path, there: Path, whole: bool, checked: bool) -> dict[str, Any]:
    if not there.is_dir():
        checkpoint = _read_file(path, there)
    else:
        with reading(f"checkpoint {path}"):
            manifest = read_manifest(there, checked)
            checkpoint = _read_file(path / CONTENT, there / CONTENT)
            sharded = require_listed(checkpoint, manifest)
            if whole:
                checkpoint = _gathered(there, manifest, checkpoint, sharded)
    with reading(f"checkpoint {path}"):
        stored = to_mapping(from_mapping(_HyperParameters, checkpoint["hyper_parameters"], "hyper_parameters"))
        if stored["vision"] is None:
            del stored["vision"], stored["image_token"]
        from_mapping(_Header, {key: checkpoint["moesaic"].get(key, {}) for key in ("foreign_files", "sources")})
        require_finite({key: stored[key] for key in ("config", "model")}, "")
        model, config = translate_model(stored["model"]), translate_run(stored["config"])
        _require_weights(checkpoint["state_dict"], model, whole)
        from_mapping(DecoderConfig, model, "model")
        from_mapping(DataConfig, config["data"], "config.data")
        from_mapping(_Trained, {key: config[key] for key in ("name", "training", "distillation") if key in config})
        checkpoint["hyper_parameters"] = {**stored, "config": config, "model": model}
    return checkpoint


def require_checkpoint(path: Path) -> None:
    """Raise InputError where there is neither a checkpoint file nor a directory of one; its content is not looked at.

    Raises:
        InputError: what is there instead.
        OSError: the folder cannot be looked into.
    """
    there = standing(path)
    if not is_sharded_checkpoint(there):
        require_file(there, "a file, such as its checkpoints/last.ckpt, or a directory with a manifest.json")


def _gathered(
    directory: Path, manifest: Manifest, content: dict[str, Any], sharded: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The content with whole tensors in place of those without numbers."""
    from moesaic.parallel.shard_files import read_parts  # torch's distributed checkpoints, which few need

    require_memory("its tensors", sum(each.numel() * each.itemsize for each in sharded.values()))
    tensors = {key: torch.zeros(each.shape, dtype=each.dtype) for key, each in sharded.items()}
    read_parts(directory, manifest, tensors)
    whole: dict[str, Any] = map_tensors(content, lambda key, tensor: tensors.get(key, tensor))
    return whole


def _read_file(path: Path, there: Path) -> dict[str, Any]:
    """What a file holds, whose checksums are right; `path` is its name for messages."""
    try:
        with zipfile.ZipFile(there) as file:
            damaged = file.testzip()
        if damaged is None:
            checkpoint: dict[str, Any] = torch.load(there, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"checkpoint {path}: cannot be read ({reason(error)})") from error
    except Exception as error:  # what the unpickler raises on garbage has no common base
        # not torch's own words: they advise to load without weights_only
        raise InputError(f"checkpoint {path}: truncated or not a checkpoint ({type(error).__name__})") from error
    if damaged is not None:
        raise InputError(f"checkpoint {path}: damaged, the checksum of {damaged} in it is wrong; take a copy of it")
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters", "moesaic"} <= checkpoint.keys():
        raise InputError(f"checkpoint {path}: not a checkpoint that moesaic wrote")
    return checkpoint


def load_model(path: str | Path, trust: Sequence[str] = ()) -> TrainedModel:
    """The model of a checkpoint, in evaluation mode on the CPU; of a codistilled run the student.

    Of one that sees pictures, `decoder` is its text model.

    Args:
        trust: packages whose code the checkpoint may name as its custom modules, see `moesaic.imports`.

    Raises:
        InputError: as `load_checkpoint`, custom modules that are not trusted or have changed since, or weights that do
            not fit the config or are not finite.
    """
    checkpoint = load_checkpoint(path)
    stored = checkpoint["hyper_parameters"]
    config = from_mapping(DecoderConfig, stored["model"], "model")
    with reading(f"checkpoint {path}"), trusting(trust):
        require_trusted_modules(config, f"checkpoint {path}")
        weights = decoder_weights(checkpoint)
        decoder = _filled(config, weights)
        require_finite_weights(weights)
        _require_same_sources(checkpoint, config)
        decoder.foreign_files = checkpoint["moesaic"].get("foreign_files", {})
        multimodal = None if "vision" not in stored else _seeing(checkpoint, config, decoder)
        tokenizer = None if stored["tokenizer"] is None else tokenizer_from_dict(stored["tokenizer"])
        lengths = stored["token_bytes"]
        if lengths != (None if tokenizer is None else token_bytes(tokenizer)):
            raise InputError("hyper_parameters.token_bytes: not those of its tokenizer")
        if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
            raise InputError(f"its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
    return TrainedModel(
        decoder=decoder.eval(),
        config=config,
        run_config=stored["config"],
        tokenizer=tokenizer,
        token_bytes=None if lengths is None else torch.tensor(lengths),
        multimodal=None if multimodal is None else multimodal.eval(),
    )


def load_multimodal(path: str | Path, trust: Sequence[str] = ()) -> TrainedModel:
    """The model of a checkpoint that sees pictures, as `load_model` gives it; its `multimodal` is not None.

    Raises:
        InputError: as `load_model`, or a checkpoint of a text model.
    """
    model = load_model(path, trust)
    if model.multimodal is None:
        raise InputError(f"checkpoint {path}: a text model; must be one that sees pictures")
    return model


def require_finite_weights(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError that names the first weight with a number that is nan or infinite."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} holds numbers that are not finite; the model has diverged")


@dataclasses.dataclass(frozen=True)
class _HyperParameters:
    """What a checkpoint says of its run."""

    config: dict[str, Any]
    model: dict[str, Any]
    tokenizer: dict[str, str] | None
    token_bytes: Any
    vision: dict[str, Any] | None = None
    image_token: int | None = None

    def __post_init__(self) -> None:
        if (self.vision is None) != (self.image_token is None):
            raise ValueError(f"image_token={self.image_token}: must stand beside vision, or neither")
        lengths = self.token_bytes
        if lengths is not None and (not isinstance(lengths, list) or any(type(n) is not int or n < 0 for n in lengths)):
            raise ValueError("token_bytes: must be a list of integers >= 0, or null")


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a checkpoint says of its files."""

    foreign_files: dict[str, str]
    sources: dict[str, str]

    def __post_init__(self) -> None:
        if unknown := sorted(self.foreign_files.keys() - set(MULTIMODAL_FILES)):
            raise ValueError(f"foreign_files: found {unknown[0]!r}; must be among {', '.join(MULTIMODAL_FILES)}")
        if not isinstance(json.loads(self.foreign_files.get("config.json", "{}")), dict):
            raise ValueError("foreign_files: config.json must hold an object")


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What the readers of a checkpoint need of its run's config."""

    name: str
    training: dict[str, Any]
    distillation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        seq_len = self.training.get("seq_len")
        if type(seq_len) is not int or seq_len < 1:
            raise ValueError(f"config.training.seq_len={seq_len!r}: must be an integer >= 1")
        teacher = self.distillation
        if teacher and not (isinstance(teacher["source"], str) and isinstance(teacher["teacher_model"], Mapping)):
            raise ValueError("config.distillation: must have a source, and a mapping teacher_model")


def _require_weights(state: Any, model: Mapping[str, Any], whole: bool) -> None:
    """Refuse weights that are no tensors on the CPU, and a number of layers that they do not have."""
    for name, tensor in state.items():
        is_tensor = isinstance(tensor, torch.Tensor) and not (whole and tensor.is_meta)
        if not is_tensor or tensor.layout is not torch.strided or tensor.is_quantized:
            raise InputError(f"state_dict.{name}: found a {type(tensor).__name__}; must be a dense tensor")
    found = {name.split(".")[2] for name in state if name.startswith("decoder.layers.")}
    if model["num_layers"] != len(found):  # before anything of this size is made
        raise InputError(f"model.num_layers={model['num_layers']!r}: the weights are of {len(found)} layers")


def _filled(config: DecoderConfig, weights: Mapping[str, torch.Tensor]) -> Decoder:
    """The decoder of a config with these weights; they are compared with it before it takes any memory."""
    with torch.random.fork_rng(devices=[]):
        wanted = build_decoder(config, device="meta").state_dict()
    _require_fitting(weights, wanted)
    dtype = weights["embedding.weight"].dtype
    require_memory("its model", num_parameters(config) * dtype.itemsize)
    decoder = build_decoder(config, dtype=dtype)
    decoder.load_state_dict(weights)
    return decoder


def _seeing(checkpoint: Mapping[str, Any], text: DecoderConfig, decoder: Decoder) -> MultimodalDecoder:
    """The decoder with the encoder of a checkpoint; its weights are compared with it before it takes any memory."""
    stored = checkpoint["hyper_parameters"]
    vision = from_mapping(VisionConfig, stored["vision"], "vision")
    try:
        config = MultimodalConfig(text, vision, stored["image_token"])
    except ValueError as error:
        raise InputError(str(error)) from error
    weights = _of_encoder(checkpoint["state_dict"])
    with torch.random.fork_rng(devices=[]):
        wanted = _of_encoder(with_encoder(decoder, config, device="meta").state_dict())
    _require_fitting(weights, wanted)
    require_finite_weights(weights)
    dtype = weights["projector.weight"].dtype
    require_memory("its encoder", sum(each.numel() for each in wanted.values()) * dtype.itemsize)
    with torch.random.fork_rng(devices=[]):
        model = with_encoder(decoder, config, dtype=dtype)
    model.load_state_dict(weights, strict=False)  # all of the two parts, as compared above
    model.foreign_files = checkpoint["moesaic"].get("foreign_files", {})
    return model


def _of_encoder(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a `MultimodalDecoder` that its text model does not have."""
    return {name: tensor for name, tensor in state.items() if name.startswith(("vision.", "projector."))}


def _require_fitting(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError that names the first weight that is missing, too much, or of another shape or kind."""
    for name in sorted(wanted.keys() | weights.keys()):
        ours, theirs = wanted.get(name), weights.get(name)
        found, must = (None if x is None else (list(x.shape), _kind(x)) for x in (theirs, ours))
        if found != must:
            told = ("absent" if x is None else f"{x[1]} {x[0]}" for x in (found, must))
            raise InputError(f"its weights do not fit its config: {name}: found {next(told)}; must be {next(told)}")


def _kind(tensor: torch.Tensor) -> str:
    return "floating" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def decoder_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of the decoder alone: a codistilled run keeps more in its checkpoints."""
    prefix = "decoder."
    return {key.removeprefix(prefix): v for key, v in checkpoint["state_dict"].items() if key.startswith(prefix)}


def save_model(
    path: str | Path,
    model: Decoder | MultimodalDecoder,
    tokenizer: Tokenizer | None = None,
    seq_len: int = 1024,
) -> None:
    """Write a model that was not trained here as a checkpoint that `load_model` and train.py's ckpt_path read.

    It has weights only, no state of an optimizer. The file appears complete or not at all.

    Args:
        tokenizer: stored with it, for text in and out.
        seq_len: the length at which evaluate.py cuts text unless told otherwise.

    Raises:
        InputError: the file exists, or the model was not built from a config.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path}: exists already; choose another name")
    decoder, sight = (model.decoder, model.config) if isinstance(model, MultimodalDecoder) else (model, None)
    if decoder.config is None or (isinstance(model, MultimodalDecoder) and sight is None):
        raise InputError("this model has no config: only models of build_decoder and build_multimodal can be written")
    prefix = "decoder." if model is decoder else ""
    seeing = {} if sight is None else {"vision": to_mapping(sight.vision), "image_token": sight.image_token}
    checkpoint = {
        "state_dict": {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()},
        "hyper_parameters": {
            "config": {"name": path.stem, "data": {}, "training": {"seq_len": seq_len}},
            "model": to_mapping(decoder.config),
            "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
            "token_bytes": None if tokenizer is None else token_bytes(tokenizer),
            **seeing,
        },
        "moesaic": {
            "foreign_files": model.foreign_files,
            "sources": source_hashes(decoder.config),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, checkpoint)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write what `load_checkpoint` reads, in place of a file or directory. It appears complete or not at all.

    Raises:
        CannotWrite: the disk is full or read-only.
    """
    # a file of ours, whose errors have a reason
    with atomic(path, over_folder=True) as partial, partial.open("wb") as file:
        torch.save(content, file)


def with_config(decoder: Decoder, config: DecoderConfig) -> Decoder:
    """Return a decoder of another config, in evaluation mode, that shares the weights of `decoder`.

    Raises:
        InputError: the config needs weights of other names or shapes.
    """
    with torch.random.fork_rng(devices=[]):  # its initial weights are thrown away
        changed = build_decoder(config, dtype=decoder.dtype)
    try:
        changed.load_state_dict(decoder.state_dict(), assign=True)
    except RuntimeError as error:
        raise InputError(f"it needs weights of another shape than the checkpoint's: {error}") from error
    return changed.to(decoder.device).eval()


def require_same_model(path: str, checkpoint: dict[str, Any], model: DecoderConfig) -> None:
    """Raise InputError that names every key in which a checkpoint's model differs from `model`.

    Custom modules whose source file has changed are refused too: the same keys would mean another model.
    """
    require_same_keys("model", path, checkpoint["hyper_parameters"]["model"], to_mapping(model))
    if changed := _changed_sources(checkpoint, model):
        raise InputError(
            f"checkpoint {path}: the source file of {', '.join(changed)} has changed since; it must be as it was (the "
            "run directory keeps a copy in sources/), or a new run must start from nothing"
        )


def _require_same_sources(checkpoint: Mapping[str, Any], model: DecoderConfig) -> None:
    """Refuse changed custom modules: the weights would be read by code that they were not trained with."""
    now = source_hashes(model)
    changed = {path: now[path][:12] for path in _changed_sources(checkpoint, model)}
    if asked := [f"{path}@{digest}" for path, digest in changed.items() if not trusts_change(path, now[path])]:
        raise InputError(
            f"the source file of {', '.join(changed)} has changed since it was written; must be as it was (the run "
            f"directory keeps a copy in sources/), or be trusted as it is now: trust=[{','.join(asked)}]"
        )


def _changed_sources(checkpoint: Mapping[str, Any], model: DecoderConfig) -> list[str]:
    """The custom modules, by dotted path, whose file is not the one that a checkpoint was made with."""
    stored, now = checkpoint["moesaic"].get("sources", {}), source_hashes(model)
    return [path for path, digest in stored.items() if now.get(path, digest) != digest]


def require_same_keys(key: str, path: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError that names every key in which two models differ; one that `stored` lacks has its default."""
    whole = to_mapping(from_mapping(DecoderConfig, stored, key))
    ignored = (f"{key}.moe.backend", f"{key}.init_std", f"{key}.format")
    require_same(f"checkpoint {path}: a model of another shape", {key: whole}, {key: wanted}, ignored)
