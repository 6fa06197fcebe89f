"""Loss on text of another kind than a checkpoint was trained on: the sources of installed packages, by their hash."""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.checkpoints import load_model
from moesaic.config import from_mapping, require
from moesaic.data import EvaluationLoader, Tokenizer
from moesaic.data.corpora import Document, load_files
from moesaic.data.tokenizers import Ids
from moesaic.errors import InputError, naming
from moesaic.evaluation.language_modeling import evaluate_language_model, sampled_windows

__all__ = ["OtherTextConfig", "documents_of", "other_text_evaluation"]

Documents = tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class OtherTextConfig:
    """One text: all .py files of a package at one version."""

    package: str  # as it is imported; found, not imported
    sha256: str  # of names and contents, as `documents_of` makes it; its first 16 digits
    windows: int = dataclasses.field(default=64, metadata={"most": 2**20})  # scored, at fixed places

    def __post_init__(self) -> None:
        require(self, "package", self.package.isidentifier(), "the name of a top-level package")
        require(self, "windows", self.windows >= 1, "a number >= 1")


def documents_of(package: str) -> tuple[Documents, str]:
    """The .py files of an installed package by name, and the first 16 digits of a sha256 over names and contents.

    Raises:
        InputError: there is no such package, or no text in it.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"package={package!r}: not installed; must be a package of this Python")
    root = found.submodule_search_locations[0]
    corpus = load_files(f"{root}/**/*.py", 0.5)
    documents = tuple(sorted((*corpus.train, *corpus.validation), key=lambda document: document.name))
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{len(document.text)}\0".encode() + document.text)
    return documents, digest.hexdigest()[:16]


def other_text_evaluation(
    checkpoint: Path, run_config: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, float]:
    """Bits per byte on other texts, as "other_text/<name>/bits_per_byte", in windows of the validation's length.

    Args:
        run_config: of which the window length is used. The tokenizer is the checkpoint's.
        options: under "other_text" the fields of `OtherTextConfig` for each name.

    Raises:
        InputError: a checkpoint without tokenizer, no text, a package that is not there, or another version of it.
    """
    texts = options.get("other_text") or {}
    if not texts:
        raise InputError("evaluation_options.other_text: missing; must be {name: {package, sha256}}")
    model, training = load_model(checkpoint), run_config["training"]
    if model.tokenizer is None:
        raise InputError(f"checkpoint {checkpoint}: it has no tokenizer, so it cannot read text")
    seq_len = training["validation_seq_len"] or training["seq_len"]
    batch_size = max(1, training["batch_size"] * training["seq_len"] // seq_len)
    numbers: dict[str, float] = {}
    for name, given in texts.items():
        config = from_mapping(OtherTextConfig, given, f"evaluation_options.other_text.{name}")
        loader = EvaluationLoader(_tokens(config, model.tokenizer, name), seq_len=seq_len, batch_size=batch_size)
        loader.starts = seq_len * sampled_windows(len(loader.tokens), seq_len, config.windows)
        score = evaluate_language_model(model.decoder, loader, model.token_bytes)
        assert score.bits_per_byte is not None  # the tokenizer is known
        numbers[f"other_text/{name}/bits_per_byte"] = score.bits_per_byte
    return numbers


def _tokens(config: OtherTextConfig, tokenizer: Tokenizer, name: str) -> Ids:
    """(n,) ids, each document after an end-of-text id."""
    with naming(f"evaluation_options.other_text.{name}"):
        documents, digest = documents_of(config.package)
        if digest != config.sha256:
            raise InputError(
                f"package={config.package!r}: its content hash is {digest}; must be {config.sha256}, that of the "
                "version that other runs were scored on"
            )
    marker = np.array([tokenizer.end_of_text], dtype=np.uint32)
    return np.concatenate(
        [part for ids in tokenizer.encode_batch([document.text for document in documents]) for part in (marker, ids)]
    )
