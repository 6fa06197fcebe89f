"""A decoder on the test sets of a recall task, at every length it has."""

from moesaic.data import Task, TaskEvaluationLoader
from moesaic.evaluation.recall import RecallScore, evaluate_recall
from moesaic.models import Decoder

__all__ = ["score_recall"]


def score_recall(decoder: Decoder, task: Task, seq_len: int, batch_size: int) -> dict[int, RecallScore]:
    """Multiple of the training length -> score; `recall_numbers` makes metrics of them.

    Args:
        seq_len: the training length.
        batch_size: of sequences of that length; as many tokens of longer ones run together.

    Raises:
        InputError: the test sequences do not fit seq_len.
    """
    scores = {}
    for multiple in task.test_multiples:
        loader = TaskEvaluationLoader(
            task,
            seq_len=multiple * seq_len,
            batch_size=max(1, batch_size // multiple),
            growth=task.growth(multiple),
        )
        scores[multiple] = evaluate_recall(decoder, loader)
    return scores
