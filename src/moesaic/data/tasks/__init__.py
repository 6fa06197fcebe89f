"""Recall tasks: synthetic sequences that ask for what stands earlier in them."""

from moesaic.data.tasks.associative_recall import AssociativeRecall
from moesaic.data.tasks.induction import Induction
from moesaic.data.tasks.loaders import TaskEvaluationLoader, TaskTrainingLoader
from moesaic.data.tasks.selective_copying import SelectiveCopying
from moesaic.data.tasks.task import Example, Task

__all__ = [
    "TASKS",
    "AssociativeRecall",
    "Example",
    "Induction",
    "SelectiveCopying",
    "Task",
    "TaskEvaluationLoader",
    "TaskTrainingLoader",
]

TASKS: dict[str, type[Task]] = {
    "associative_recall": AssociativeRecall,
    "selective_copying": SelectiveCopying,
    "induction": Induction,
}
"""By `data.source`."""
