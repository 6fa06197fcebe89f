"""What moesaic.compare takes as a candidate, up to the data that it then reads."""

import functools
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import moesaic
from moesaic.errors import InputError
from moesaic.layers import TopKRouter


def ask(new: Any, folder: Path, output: io.StringIO) -> None:
    """Of text that is not there."""
    console = Console(file=output, width=300)
    moesaic.compare(new=new, data=folder / "nothing", results_dir=folder / "out", console=console)


def arms(new: Any, folder: Path) -> str:
    output = io.StringIO()
    with pytest.raises(InputError, match=r"^data\.path"):
        ask(new, folder, output)
    return output.getvalue().split(": reading")[0].strip()


def test_a_part_of_a_notebook_says_its_seam_as_a_key(tmp_path: Path) -> None:
    def linear(dim: int) -> nn.Module:
        return nn.Linear(dim, dim)

    with pytest.raises(InputError, match=r'fits the seams mixer, ffn; must be given as \{"mixer": ...\} or \{"ffn"'):
        ask(linear, tmp_path, io.StringIO())
    assert arms({"ffn": linear}, tmp_path) == "baseline, linear"
    assert arms([{"mixer": linear, "model.dim": 64}], tmp_path) == "baseline, dim=64, linear"


def test_a_partial_is_called_after_what_it_is_of(tmp_path: Path) -> None:
    assert arms(functools.partial(TopKRouter, score_function="softmax"), tmp_path) == "baseline, TopKRouter"


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (print, "new: found a builtin_function_or_method; must be words, keys, or a part"),
        (math, "new: found a module"),
        (nn.functional.softmax, r"is a function of torch\.nn\.functional; must be a torch\.nn\.Module"),
        (5, "new: found a int"),
        (nn.Linear, r"new: torch\.nn\.modules\.linear\.Linear\(\) failed: .*missing 2 required"),
    ],
)
def test_what_is_no_part_is_refused_as_such(new: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        ask(new, tmp_path, io.StringIO())
