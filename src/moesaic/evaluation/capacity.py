"""Knowledge capacity: how many bits of a task's answers a model has stored, also per parameter."""

import math

from moesaic.data import Task
from moesaic.evaluation.language_modeling import LanguageModelScore
from moesaic.models import Account

__all__ = ["capacity_numbers"]


def capacity_numbers(score: LanguageModelScore, task: Task | None, account: Account) -> dict[str, float]:
    """What metrics.json holds of a task whose answers training tells; nothing for other data.

    What a model knows are the bits of all answers less those that it still needs, its cross-entropy to them: the
    second term of the bit complexity of Allen-Zhu & Li 2024 (arXiv:2404.05405). It is below 0 for a model that is worse
    than one that guesses among the values.

    Args:
        score: on every answer of the test set once.

    Returns:
        capacity/known_bits and capacity/data_bits, their ratio capacity/share, and capacity/bits_per_parameter and
        capacity/bits_per_active_parameter, of the known ones.
    """
    if task is None or task.answer_bits is None:
        return {}
    known = task.answer_bits - score.loss * score.num_tokens / math.log(2)
    return {
        "capacity/known_bits": known,
        "capacity/data_bits": task.answer_bits,
        "capacity/share": known / task.answer_bits,
        "capacity/bits_per_parameter": known / account.parameters,
        "capacity/bits_per_active_parameter": known / account.active_parameters,
    }
