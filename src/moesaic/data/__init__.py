"""Text to batches: corpora, tokenizers, token streams on disk, loaders; and recall tasks, which need no text."""

from moesaic.data.corpora import Corpus, Document
from moesaic.data.loaders import EvaluationLoader, TrainingLoader, with_step_counts
from moesaic.data.pictures import PictureData, load_pictures
from moesaic.data.splits import AnyEvaluationLoader, AnyTrainingLoader, evaluation_loader, training_loader
from moesaic.data.streams import Data, DataConfig, TokenStream, load_data
from moesaic.data.tasks import Task, TaskEvaluationLoader, TaskTrainingLoader
from moesaic.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    token_bytes,
    token_strings,
    tokenizer_from_dict,
)

__all__ = [
    "AnyEvaluationLoader",
    "AnyTrainingLoader",
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "Data",
    "DataConfig",
    "Document",
    "EvaluationLoader",
    "PictureData",
    "Task",
    "TaskEvaluationLoader",
    "TaskTrainingLoader",
    "TokenStream",
    "Tokenizer",
    "TrainingLoader",
    "evaluation_loader",
    "load_data",
    "load_pictures",
    "token_bytes",
    "token_strings",
    "tokenizer_from_dict",
    "training_loader",
    "with_step_counts",
]
