"""What the parts of the arms of a study state: whether they see later tokens, or other sequences."""

from collections.abc import Mapping
from typing import Any

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.models import DecoderConfig
from moesaic.models.leaks import Leaks, leaks_of
from moesaic.overrides import apply_overrides
from moesaic.studies.config import Cell, StudyConfig

__all__ = ["leaks_of_cell", "marks_of"]


def leaks_of_cell(base: Mapping[str, Any], cell: Cell) -> Leaks:
    """What the model of an arm states; nothing where its parts cannot be imported here."""
    try:
        model = apply_overrides(base, cell.overrides, f"study.arms.{cell.arm}")["model"]
        return leaks_of(from_mapping(DecoderConfig, {**model, "vocab_size": 1, "padding_token": None}, "model"))
    except InputError:
        return Leaks(None, None)


def marks_of(study: StudyConfig, base: Mapping[str, Any]) -> dict[str, str]:
    """What to say of arms whose parts leak, wherever such an arm is named."""
    found = {cell.arm: leaks_of_cell(base, cell).mark for cell in reversed(study.cells)}
    return {arm: mark for arm, mark in found.items() if mark is not None}
