"""A teacher from a checkpoint of ours or a transformers directory, refused where its ids mean something else."""

import logging
from pathlib import Path
from typing import Any

from moesaic.checkpoints import load_checkpoint, load_model, require_finite_weights
from moesaic.data import DataConfig, Tokenizer, tokenizer_from_dict
from moesaic.data.tokenizers import same_meaning
from moesaic.errors import InputError, naming
from moesaic.files import standing
from moesaic.models import Decoder
from moesaic.parallel.manifest import is_sharded_checkpoint

__all__ = ["load_teacher", "require_teacher", "teacher_tokenizer"]

logger = logging.getLogger("moesaic.training")


def require_teacher(path: str | Path) -> None:
    """Raise InputError if there is no such file or directory, or if it is one of a run: a check that costs nothing."""
    if not standing(Path(path)).exists():
        raise InputError(
            f"teacher={str(path)!r}: no such file or directory; give a checkpoint, such as a run's "
            "checkpoints/last.ckpt, or a transformers directory"
        )
    last = Path(path) / "checkpoints" / "last.ckpt"
    if last.exists():
        raise InputError(f"teacher={str(path)!r}: the directory of a run; give its checkpoint, {last}")


def teacher_tokenizer(path: str | Path, data: DataConfig) -> Tokenizer | None:
    """The tokenizer with which text for a student of this teacher is read, or None for the one that `data` describes.

    On other text than the teacher's, a BPE of the same kind and size would be another one. So a checkpoint's BPE takes
    its place; what `data` explicitly has otherwise (bytes, another size) is left for `load_teacher` to refuse.

    Raises:
        InputError: as `load_checkpoint`.
    """
    if _is_directory(path) or data.tokenizer != "bpe" or data.source == "memmap" or data.make_task() is not None:
        return None
    checkpoint = load_checkpoint(path)
    stored = checkpoint["hyper_parameters"]["tokenizer"]
    if stored is None or stored["kind"] != "bpe":
        return None
    tokenizer = tokenizer_from_dict(stored)
    sizes = {tokenizer.vocab_size}
    if "optimizer_states" in checkpoint:  # of a run here, which asked for a size; little text gives fewer entries
        sizes.add(checkpoint["hyper_parameters"]["config"]["data"]["vocab_size"])
    return tokenizer if data.vocab_size in sizes else None


def load_teacher(path: str | Path, tokenizer: Tokenizer | None, vocab_size: int) -> Decoder:
    """The teacher, in evaluation mode on the CPU.

    Where one side has no tokenizer, only the sizes of the vocabularies can be compared; the log says so.

    Args:
        path: a checkpoint, or a directory of config.json and safetensors (needs the [hf] extra).
        tokenizer: the student's.
        vocab_size: the student's.

    Raises:
        InputError: not there, not readable, not finite, another vocabulary or another tokenizer.
    """
    require_teacher(path)
    theirs: dict[str, Any] | None
    if _is_directory(path):
        try:
            from moesaic.interop import from_hf
        except ImportError as error:
            raise InputError(f"teacher={str(path)!r}: a directory needs the [hf] extra ({error})") from error
        decoder = from_hf(path)
        with naming(f"teacher={str(path)!r}"):
            require_finite_weights(decoder.state_dict())
        text = decoder.foreign_files.get("tokenizer.json")
        theirs = None if text is None else {"kind": "bpe", "json": text}
    else:
        model = load_model(path)
        decoder, theirs = model.decoder, None if model.tokenizer is None else model.tokenizer.to_dict()
    if decoder.vocab_size != vocab_size:
        raise InputError(
            f"teacher={str(path)!r}: a vocabulary of {decoder.vocab_size}, the student's has {vocab_size}; soft "
            "targets need the same"
        )
    if theirs is None or tokenizer is None:
        side = "teacher" if theirs is None else "data"
        logger.warning("%s: the %s came without a tokenizer, only the vocabulary size was compared", path, side)
    else:
        with naming(str(path)):
            is_same = same_meaning(theirs, tokenizer.to_dict())
        if not is_same:
            raise InputError(
                f"teacher={str(path)!r}: its tokenizer ({theirs['kind']}) is not that of the student's data "
                f"({tokenizer.to_dict()['kind']}); soft targets need the same ids, so read the data as it was trained "
                "on"
            )
    return decoder


def _is_directory(path: str | Path) -> bool:
    """Whether this is a directory of transformers, rather than a checkpoint of ours."""
    return Path(path).is_dir() and not is_sharded_checkpoint(path)
