"""A corpus that is the same everywhere: the sources of a fixed list of packages, each with its version and content.

The packages are those that `moesaic[train]` brings under constraints.txt. What else is installed changes nothing.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from moesaic.data.corpora import LEFT_OUT_FOLDERS, SMALLEST, Corpus, Document, heading_of, read_text, split_documents
from moesaic.errors import InputError

__all__ = ["PINNED", "Pin", "load_pinned", "read_package"]


@dataclasses.dataclass(frozen=True)
class Pin:
    """What a package must be."""

    version: str
    """Without what follows a +, such as the CUDA version that a build of torch is for."""
    sha256: str
    """Hash of the names and texts of all files that are read."""


GENERATED = frozenset(
    {
        "version.py",
        "_version.py",
        "__version__.py",
        "__config__.py",
        "_distributor_init.py",
        "_distributor_init_local.py",
    }
)
"""Files that a build writes: two builds of one version have different ones."""

GENERATED_FOLDERS = frozenset({"generated", "__pycache__"})

PINNED: dict[str, Pin] = {
    "fonttools": Pin("4.68.0", "42ece70b3834b2f9304a569f7c27af80b5bb239b9232641ea351946befdda614"),
    "lightning": Pin("2.6.6", "454e3b02bd6e57b89567dd202f87686907aa0c752db5dc423ba46597e75e0322"),
    "matplotlib": Pin("3.11.2", "c713c0640cac96104b9f833fa54ad8db40837a77bbf83293e1b1b7dd3a3f8089"),
    "mpmath": Pin("1.3.0", "cd6b7beb560ebddb857d1907ec2538ccc9c277cf9f021b31047fda76c8b47872"),
    "networkx": Pin("3.6.1", "6246f17355987960c5a31726626ec3bfcaef97efbf3beb173ed1de2fc3c9625f"),
    "numpy": Pin("2.4.6", "2f875af500f200ea8be1ac251baf7bf9a17f90f6876af4a43f70a6cbf5cc7c9f"),
    "pygments": Pin("2.21.0", "26066d64431e2bfb73d670058a1538f6ffa4da6474e8ad7f2ee5ed0b2c165b02"),
    "rich": Pin("15.0.0", "663934d749589b932641f9374a5a36748cd7c3a188849e9af5099c91f1a422e2"),
    "scipy": Pin("1.17.1", "ceeec9c8c27e0eb0d4b53733a71db8f1d8ce0ce7fa9599880e1ee003ecffa769"),
    "sympy": Pin("1.14.0", "9d0916a737578d0d7245977ce9dbb23ad36b615317ed8f5a1fb3179389ff7c5a"),
    "tensorboard": Pin("2.21.0", "901b6df5e52f20835018f98b60650354e4440875c074ba317f5e94e843f82e5a"),
    "torch": Pin("2.13.0", "395b7ffac032401f021ddf3412123bcdfacb2bee53b67e7e8c7b9319ef2a958c"),
    "torchmetrics": Pin("1.9.0", "54065473e5250618d5c71e679841e199682fda8a8fab246784b19f0036131560"),
}
"""The corpus of `data=pinned`."""


def load_pinned(
    validation_fraction: float, pins: Mapping[str, Pin] = PINNED, path: Sequence[str] | None = None
) -> Corpus:
    """The Python sources of the pinned packages, each as it was when it was pinned.

    Args:
        path: folders in which the packages are installed; None: those of this Python.

    Raises:
        InputError: a package is missing, or has another version or content; it says which, and what it must be.
    """
    wrong: list[str] = []
    documents, left_out = [], Counter[str]()
    for name, pin in pins.items():
        found, version, digest = read_package(name, left_out, path)
        if version != pin.version:
            wrong.append(f"{name} {version or 'is missing'}; must be {pin.version}")
        elif digest != pin.sha256:
            wrong.append(f"{name} {version} has the content {digest[:16]}; must be {pin.sha256[:16]}, as published")
        documents += found
    if wrong:
        raise InputError(
            f"data.source='pinned': {', '.join(wrong)}. Other content would be another corpus. Install these versions "
            "into a new environment, or take other data"
        )
    return split_documents("pinned", documents, validation_fraction, left_out)


def read_package(
    name: str, left_out: Counter[str], path: Sequence[str] | None = None
) -> tuple[list[Document], str | None, str]:
    """The sources of an installed package, its version, and the SHA-256 of what was read.

    Tests, files that a build generates and very short files are left out.

    Args:
        left_out: gets the number of files that are not read, by the reason.
        path: folders in which it is installed; None: those of this Python.

    Returns:
        Documents in the order of their names; the version without what follows a +, None if it is not installed.
    """
    options = {"name": name} if path is None else {"name": name, "path": list(path)}
    installed = next(iter(importlib.metadata.distributions(**options)), None)
    digest = hashlib.sha256()
    if installed is None:
        return [], None, digest.hexdigest()
    documents = []
    for file in sorted(installed.files or [], key=lambda file: file.as_posix()):
        folders = set(PurePosixPath(file).parts[:-1])
        if file.suffix != ".py" or ".." in folders or file.name in GENERATED:
            continue
        if folders & (LEFT_OUT_FOLDERS | GENERATED_FOLDERS):
            continue
        text = read_text(Path(str(file.locate())))
        if isinstance(text, str) or len(text) < SMALLEST:
            left_out[text if isinstance(text, str) else f"smaller than {SMALLEST} bytes"] += 1
            continue
        document = Document(file.as_posix(), text)
        digest.update(heading_of(document.name, len(text)))
        digest.update(text)
        documents.append(document)
    return documents, installed.version.partition("+")[0], digest.hexdigest()
