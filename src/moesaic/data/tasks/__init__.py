"""Tasks: generated sequences that ask for what stands earlier in them, or for what was seen in training."""

from moesaic.data.tasks.associative_recall import AssociativeRecall
from moesaic.data.tasks.biographies import Biographies
from moesaic.data.tasks.induction import Induction
from moesaic.data.tasks.loaders import TaskEvaluationLoader, TaskTrainingLoader
from moesaic.data.tasks.selective_copying import SelectiveCopying
from moesaic.data.tasks.task import Example, RecallTask, Task

__all__ = [
    "TASKS",
    "AssociativeRecall",
    "Biographies",
    "Example",
    "Induction",
    "RecallTask",
    "SelectiveCopying",
    "Task",
    "TaskEvaluationLoader",
    "TaskTrainingLoader",
]

TASKS: dict[str, type[Task]] = {
    "associative_recall": AssociativeRecall,
    "selective_copying": SelectiveCopying,
    "induction": Induction,
    "biographies": Biographies,
}
"""By `data.source`."""
