"""Needles for base models: a constant assigned somewhere in real code, its value wanted when the name comes again.

    VOKETU_LIMIT = 48213        <- planted at a depth
    ... code ...
    VOKETU_LIMIT =              <- the end of the context

No instructions are followed: the true value is ranked by its log-likelihood among other values. Some of those stand in
the context too, behind other names, so that copying just any planted value is not enough.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.config import LARGEST_SEED
from moesaic.data.shards import ShardedIds
from moesaic.errors import InputError
from moesaic.evaluation.results import ResultFile, is_numbers
from moesaic.evaluation.variants import Variant
from moesaic.models import Decoder
from moesaic.statistics import mean_and_error

__all__ = ["NeedleCell", "NeedleConfig", "NeedleTask", "TextEncoder", "score_needles", "summarize_needles"]

Ids = npt.NDArray[np.integer[Any]]

SUFFIXES = ("LIMIT", "SIZE", "TIMEOUT", "OFFSET", "MASK", "DEPTH", "PORT", "COUNT")


class TextEncoder(Protocol):
    """The part of a tokenizer that needles need."""

    @property
    def vocab_size(self) -> int: ...

    def encode_batch(self, texts: Sequence[bytes]) -> Sequence[Ids]: ...

    def decode(self, ids: Iterable[int]) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """The grid of context lengths and depths, and how hard the choice is."""

    # context lengths over the training length
    multiples: tuple[float, ...] = dataclasses.field(default=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0), metadata={"most": 2**16})
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: at the start of the context, 1: just before its end
    samples: int = dataclasses.field(default=16, metadata={"most": 2**16})  # per cell of the grid
    distractors: int = dataclasses.field(default=15, metadata={"most": 2**12})  # values beside the true one
    planted: int = 3  # of these so many stand in the context, behind other names
    chunk_tokens: int = dataclasses.field(default=256, metadata={"most": 2**20})
    seed: int = dataclasses.field(default=0, metadata={"most": LARGEST_SEED})

    def __post_init__(self) -> None:
        for name in ("samples", "distractors", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be an integer >= 0")
        if not 0 <= self.planted <= self.distractors:
            raise ValueError(f"planted={self.planted}: must be 0 to distractors={self.distractors}")
        if not self.multiples or not all(0 < multiple < math.inf for multiple in self.multiples):
            raise ValueError(f"multiples={list(self.multiples)}: must be one or more numbers > 0")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={list(self.depths)}: must be one or more numbers from 0 to 1")


@dataclasses.dataclass(frozen=True)
class NeedleCell:
    """Scores of all samples of one length and depth, in the order of the samples."""

    length: int
    depth: float
    accuracy: list[float]
    """1 where the true value is the likeliest of all; a tie among n counts 1/n."""
    rank: list[float]
    """1 (best) to distractors + 1; ties take the middle."""
    exact_match: list[float]
    """1 where greedy decoding writes the true value."""


class NeedleTask:
    """Prompts of the grid; sample i of a cell is the same for every model with this tokenizer, text and seed.

    A needle is a line of its own between two lines of the text. Where none begins within 8 tokens or a twentieth of
    the text from the depth that is asked for, as in minified code, it breaks the line that is there.

    Args:
        tokens: (n,) the text that needles are planted in.
        train_length: what `config.multiples` multiply.

    Raises:
        InputError: a context longer than the text, or too short for needle and question.
    """

    def __init__(
        self, tokenizer: TextEncoder, tokens: Ids | ShardedIds, config: NeedleConfig, train_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.config = config
        self.lengths = tuple(max(1, round(multiple * train_length)) for multiple in config.multiples)
        if len(set(self.lengths)) < len(self.lengths) or len(set(config.depths)) < len(config.depths):
            raise InputError(f"needle: lengths {self.lengths}, depths {config.depths}: one of them stands twice")
        self.cells = [(length, depth) for length in self.lengths for depth in config.depths]
        spelled = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
        # a newline and the indentation behind it are often one token, so a line ends before that as well
        self._begins = np.array([token.startswith(b"\n") for token in spelled])
        self._ends = np.array([token.endswith(b"\n") for token in spelled])
        self._values = self._equally_long_values()
        longest = max(self.lengths)
        if longest > len(tokens):
            raise InputError(
                f"needle: a context of {longest} tokens: longer than the data, the text has {len(tokens)} tokens; "
                "it needs smaller multiples, another split or more text"
            )
        shortest = self.cells.index((min(self.lengths), config.depths[0]))
        for sample in range(config.samples):  # refuse before any work
            self.prompt(shortest, sample)

    def prompt(self, cell: int, sample: int) -> tuple[Tensor, Tensor]:
        """(context (length,), values (distractors + 1, tokens per value)), int64; the first value is the true one."""
        length, depth = self.cells[cell]
        config = self.config
        draw = np.random.default_rng((config.seed, length, round(depth * 1_000_000), sample))
        values = draw.choice(self._values, size=config.distractors + 1, replace=False)
        names: list[str] = []
        while len(names) < config.planted + 1:
            syllables = ["".join(draw.choice(list(x)) for x in ("BDFGKLMNPRSTVZ", "AEIOU")) for _ in range(3)]
            name = f"{''.join(syllables)}_{draw.choice(SUFFIXES)}"
            names += [] if name in names else [name]
        lines = [f"\n{name} = {value}\n".encode() for name, value in zip(names, values, strict=False)]
        texts = [*lines, f"\n{names[0]} =".encode(), *(f" {value}".encode() for value in values)]
        encoded = [ids.astype(np.int64) for ids in self.tokenizer.encode_batch(texts)]
        needles, question = encoded[: len(lines)], encoded[len(lines)]
        room = length - sum(map(len, needles)) - len(question)
        if room < 1:
            raise InputError(
                f"needle: a context of {length} tokens: shorter than the needles and the question, which take "
                f"{length - room}; it needs larger multiples or fewer planted values"
            )
        start = int(draw.integers(len(self.tokens) - room + 1))
        hay = np.asarray(self.tokens[start : start + room]).astype(np.int64)
        depths = [depth, *draw.uniform(size=len(needles) - 1)]
        order = sorted(range(len(needles)), key=depths.__getitem__)
        places = [self._place(hay, depths[i]) for i in order]
        pieces, last = [], 0
        for i, place in zip(order, places, strict=True):
            pieces += [hay[last:place], needles[i]]
            last = place
        context = np.concatenate([*pieces, hay[last:], question])
        return torch.from_numpy(context), torch.from_numpy(np.stack(encoded[len(lines) + 1 :]))

    def is_whole(self, cells: Any) -> bool:
        """Whether this, read from JSON, is the scores of the first cells of the grid."""
        scores = ("accuracy", "rank", "exact_match")
        count = len(cells) if isinstance(cells, list) else math.inf
        return count <= len(self.cells) and all(
            isinstance(cell, dict)
            and cell.keys() == {"length", "depth", *scores}
            and (cell["length"], cell["depth"]) == place
            and all(is_numbers(cell[name], self.config.samples) for name in scores)
            for cell, place in zip(cells, self.cells, strict=False)
        )

    def _place(self, hay: Ids, depth: float) -> int:
        """The place between two lines nearest to `depth`, or just there if none is near."""
        wanted = depth * len(hay)
        between = np.flatnonzero(self._begins[hay[1:]] | self._ends[hay[:-1]]) + 1
        places = np.concatenate(([0], between, [len(hay)]))
        nearest = int(places[np.abs(places - wanted).argmin()])
        return nearest if abs(nearest - wanted) <= max(8, 0.05 * len(hay)) else round(wanted)

    def _equally_long_values(self) -> npt.NDArray[np.int64]:
        """Five-digit numbers that all have the same number of tokens, so that likelihoods compare."""
        numbers = np.random.default_rng(self.config.seed).permutation(np.arange(10_000, 100_000))[:8000]
        encoded = self.tokenizer.encode_batch([f" {number}".encode() for number in numbers])
        sizes = np.array([len(ids) for ids in encoded])
        chosen: npt.NDArray[np.int64] = numbers[sizes == np.bincount(sizes).argmax()]
        if len(chosen) <= self.config.distractors:
            raise InputError(
                f"needle.distractors={self.config.distractors}: must be a number below {len(chosen)}, the values "
                "that this tokenizer spells in equally many tokens"
            )
        return chosen


def score_needles(
    variants: Sequence[Variant],
    task: NeedleTask,
    *,
    batch_size: int = 8,
    results: ResultFile | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[NeedleCell]]:
    """Every variant on every cell of the grid, the same prompts for all, and others that are finished in `results`.

    Args:
        results: saved after every cell; cells that it has already are not run again.
        advance: told how many tokens came on, and how many there are in all, for a progress bar.
    """
    found = {}
    total = len(variants) * task.config.samples * sum(length for length, _ in task.cells)
    # all of them before any work
    known: list[list[dict[str, Any]]] = [
        [] if results is None else results.rows(v.name, task.is_whole) for v in variants
    ]
    for variant, done in zip(variants, known, strict=True):
        for i, (length, depth) in enumerate(task.cells):
            if i >= len(done):
                cell = NeedleCell(length, depth, [], [], [])
                for first in range(0, task.config.samples, batch_size):
                    samples = range(first, min(task.config.samples, first + batch_size))
                    prompts = [task.prompt(i, sample) for sample in samples]
                    contexts = torch.stack([context for context, _ in prompts])
                    values = torch.stack([values for _, values in prompts])
                    _score(variant, contexts, values, task.config.chunk_tokens, cell)
                done.append(dataclasses.asdict(cell))
                if results is not None:
                    results.save()
            advance(length * task.config.samples, total)
        found[variant.name] = [NeedleCell(**cell) for cell in done]
    for name, done in {} if results is None else results.done.items():
        if name not in found and task.is_whole(done) and len(done) == len(task.cells):
            found[name] = [NeedleCell(**cell) for cell in done]
    return found


@torch.inference_mode()
def _score(variant: Variant, contexts: Tensor, values: Tensor, chunk_tokens: int, cell: NeedleCell) -> None:
    """contexts (B, L), values (B, N, l), the first of N true: append the scores of the B samples to `cell`."""
    decoder, size = variant.decoder, values.size(2)
    if variant.window is not None:
        contexts = contexts[:, -max(1, variant.window - size + 1) :]
    device = decoder.device
    contexts, values = contexts.to(device), values.to(device)
    cache = decoder.make_cache()
    if cache is not None:
        for start in range(0, contexts.size(1) - 1, chunk_tokens):
            decoder.hidden_states(contexts[:, start : min(contexts.size(1) - 1, start + chunk_tokens)], cache)
    likelihoods, exact = [], None
    for value in values.unbind(1):
        log_p = _value_logits(decoder, contexts, value, cache).float().log_softmax(dim=-1)
        if exact is None:  # of the true value: greedy decoding writes it iff each token of it is the likeliest
            best = log_p.amax(dim=-1)
            hit = log_p.gather(-1, value[..., None])[..., 0] == best
            unique = (log_p == best[..., None]).sum(dim=-1) == 1
            exact = (hit & unique).all(dim=-1)
        likelihoods.append(log_p.gather(-1, value[..., None])[..., 0].double().sum(dim=-1))
    assert exact is not None
    table = torch.stack(likelihoods, dim=1).cpu()
    if not bool(table.isfinite().all()):
        raise InputError(f"variants: {variant.name}: its log-likelihoods are not finite")
    better = (table[:, 1:] > table[:, :1]).sum(dim=1)
    ties = (table[:, 1:] == table[:, :1]).sum(dim=1)
    cell.rank.extend((1 + better + ties / 2).tolist())
    cell.accuracy.extend(((better == 0) / (1 + ties)).tolist())
    cell.exact_match.extend(exact.float().tolist())


def _value_logits(decoder: Decoder, contexts: Tensor, value: Tensor, cache: list[Any] | None) -> Tensor:
    """Logits (B, l, V) of the value's tokens (B, l) after the contexts; a cache holds all of these but the last."""
    if cache is None:
        tokens = torch.cat((contexts, value[:, :-1]), dim=1)
        hidden, _ = decoder.hidden_states(tokens)
    else:
        hidden, _ = decoder.hidden_states(torch.cat((contexts[:, -1:], value[:, :-1]), dim=1), deepcopy(cache))
    return torch.as_tensor(decoder.head(hidden[:, -value.size(1) :]))


def summarize_needles(cells: Sequence[NeedleCell], distractors: int, start: int = 0) -> dict[str, float]:
    """Means over the cells whose context is longer than `start`, with their standard error over samples.

    `rank_score` is 1 - (rank - 1) / distractors: 1 for a model that knows, 0.5 by chance. Chance of `accuracy` is
    1 / (distractors + 1). Empty if no cell is that long.
    """
    chosen = [cell for cell in cells if cell.length > start]
    if not chosen:
        return {}
    columns = {
        "accuracy": [x for cell in chosen for x in cell.accuracy],
        "rank_score": [1 - (x - 1) / distractors for cell in chosen for x in cell.rank],
        "exact_match": [x for cell in chosen for x in cell.exact_match],
    }
    summary = {name: sum(values) / len(values) for name, values in columns.items()}
    for name, values in columns.items():
        if len(values) > 1:
            summary[f"{name}_standard_error"] = mean_and_error(torch.tensor(values, dtype=torch.float64))[1]
    return summary
