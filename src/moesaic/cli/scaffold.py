"""Write a study's file to fill in: moesaic scaffold NAME"""

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from moesaic.cli.common import launch, plain
from moesaic.errors import InputError
from moesaic.files import make_folder, write_atomically
from moesaic.overrides import command_line

__all__ = ["main", "scaffold"]

STUDY = """\
# @package _global_
# What is asked, in a sentence. Everything above `study` is a difference to train.yaml and holds for all arms.
defaults:
  - override /model: study # the small model of most studies; remove it for the default one

name: {name}
training:
  steps: 300
  validation_seq_len: 256
  validate_every: 50
  checkpoint_every: 100

study:
  question: Are two experts per token better than one?
  equal: tokens, order of the data, active width of every FFN
  baseline: top-1
  arms: # name: keys of the run that differ; a part of yours is model.moe.router: {{type: my_parts.Router}}
    top-1: {{}}
    top-2: {{model.moe.top_k: 2, model.moe.hidden_dim: 32}}
  seeds: [0, 1, 2]
  # axes: # every arm at every value
  #   experts:
  #     values:
  #       "8": {{model.moe.num_experts: 8}}
  #       "16": {{model.moe.num_experts: 16}}
  # variants: # the checkpoints of an arm, evaluated under other keys; nothing is trained
  #   cold: {{arm: top-1, overrides: {{model.attention.temperature: null}}}}
"""


def scaffold(name: str, folder: Path) -> Path:
    """Write the file of a study that runs as it is; returns its path.

    Raises:
        InputError: a name that cannot be one, or a file that is there.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InputError(f"name={name!r}: must be letters, digits and _, with a letter first")
    path = folder / "experiment" / f"study_{name}.yaml"
    if path.exists():
        raise InputError(f"{path}: is there already; must have another name")
    make_folder(path.parent, "folder")
    write_atomically(path, STUDY.format(name=name))
    return path


def _task(config: DictConfig) -> None:
    given = plain(config)
    if not isinstance(given["name"], str):
        raise InputError("name: missing; give moesaic scaffold NAME")
    if not isinstance(given["folder"], str):
        raise InputError(f"folder={given['folder']!r}: must be a path; before a number write ./")
    folder = Path(given["folder"])
    path = scaffold(given["name"], folder)
    print(f"written: {path}; fill it in, then run")
    print(f"  {command_line('study', '--config-dir', folder, f'experiment={path.stem}')}")


def main(arguments: Sequence[str]) -> None:
    launch("scaffold", arguments, _task)
