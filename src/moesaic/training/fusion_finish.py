"""What follows training on pictures: numbers of pairs, of names in pictures, of the experts that image tokens take."""

from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from moesaic.checkpoints import load_model
from moesaic.data.images.pairs import PairEvaluationLoader
from moesaic.evaluation.language_modeling import LanguageModelScore, evaluate_split
from moesaic.evaluation.modalities import experts_by_modality, plot_modalities
from moesaic.evaluation.naming import naming_numbers
from moesaic.evaluation.naming_plots import plot_answers
from moesaic.evaluation.specialization import Specialization
from moesaic.training.batches import evaluation_sizes
from moesaic.training.config import RunConfig
from moesaic.training.finish import Finished, Finisher, hyper_parameters, score_run
from moesaic.training.fit import Fitted
from moesaic.training.fusion import ContrastiveModel, FusionModel
from moesaic.training.fusion_batches import FusionBatches

__all__ = ["finishers_of", "score_any"]

MOST = 2048
"""Pairs of a split among which a name is looked for."""

MOST_NAMES = 500
"""Pictures of a split that a model names; with few `training.score_windows`, two for each of these."""

TEXT_BATCHES = 8
"""Batches of text whose experts are counted beside those of pictures."""


def score_any(fitted: Fitted, console: Console) -> Finished:
    """The score that a run ends with: of stage contrastive that of pairs, of any other that of text."""
    if not isinstance(fitted.module, ContrastiveModel):
        return score_run(fitted, console)
    return Finished(fitted, LanguageModelScore(), Specialization(fitted.prepared.model.vocab_size, None, None), console)


def finishers_of(config: RunConfig, finishers: tuple[Finisher, ...]) -> tuple[Finisher, ...]:
    """The finishers of a run, of which `finishers` are those of a text model."""
    if config.fusion is None:
        return finishers
    if config.fusion.stage == "contrastive":
        return (retrieval, hyper_parameters)
    if config.fusion.stage == "frozen":  # its text model is the one it began with
        return (*finishers, names_in_pictures)
    return (*finishers, names_in_pictures, text_model_before)


SHOWN = {
    "bits per character": ("bits_per_character", "bits_per_character_bigram"),
    "with shuffled pictures": ("bits_per_character_shuffled",),
    "exact": ("exact", "exact_chance"),
    "median rank": ("rank", "rank_chance"),
    "character errors": ("character_error_rate",),
}
"""Columns of the verdict: a number, and what chance has."""


def names_in_pictures(run: Finished) -> dict[str, float]:
    """What the model says of held-out pictures, and which experts take image tokens, names and text."""
    prepared, module = run.fitted.prepared, run.fitted.module
    assert isinstance(module, FusionModel) and isinstance(prepared.batches, FusionBatches)
    pictures, model = prepared.batches.pictures, module.multimodal
    samples = min(MOST_NAMES, 2 * (prepared.config.training.score_windows or MOST_NAMES))
    numbers = naming_numbers(model, pictures, samples=samples, ranked=max(1, samples // 5))
    text = islice(prepared.batches.text_batches(), TEXT_BATCHES)
    routed = experts_by_modality(model, pictures, text)
    run.console.print(_verdict(numbers))
    if run.draws:
        plot_answers(model, pictures, run.plots / "pictures.png")
        plot_modalities(routed, run.plots / "modalities.png")
    return {**numbers, **routed.numbers()}


def _verdict(numbers: dict[str, float]) -> Table:
    table = Table(title="What it says of held-out pictures (by chance)", title_justify="left")
    table.add_column("split")
    for title in SHOWN:
        table.add_column(title, justify="right")
    for split in dict.fromkeys(key.split("/")[1] for key in numbers):
        table.add_row(split, *(_cell(numbers, split, names) for names in SHOWN.values()))
    return table


def _cell(numbers: dict[str, float], split: str, names: tuple[str, ...]) -> str:
    """A number and chance behind it in brackets; nothing where there is no such number."""
    found = [f"{numbers[key]:.3f}" for name in names if (key := f"pictures/{split}/{name}") in numbers]
    return " ".join([*found[:1], *(f"({chance})" for chance in found[1:])])


def text_model_before(run: Finished) -> dict[str, float]:
    """The text model that a run began with, on the windows of text that the run is scored on."""
    prepared, fusion = run.fitted.prepared, run.fitted.prepared.config.fusion
    if fusion is None or fusion.text is None or not Path(fusion.text).exists():  # a resumed run does without
        return {}
    score = evaluate_split(
        load_model(fusion.text).decoder,
        prepared.data,
        **evaluation_sizes(prepared.config.training),
        windows=prepared.config.training.score_windows,
        token_bytes=run.token_bytes,
    )
    run.console.print(
        f"[bold]text[/]    {run.score.bits_per_byte:.3f} bits per byte; the text model that it began with has "
        f"{score.bits_per_byte:.3f}",
        highlight=False,
    )
    return {f"text_model/{name.rpartition('/')[2]}": value for name, value in score.numbers().items()}


@torch.no_grad()
def retrieval(run: Finished) -> dict[str, float]:
    """How pictures of each test split find their names among those of (up to) 2,048 pairs of it."""
    prepared, module = run.fitted.prepared, run.fitted.module
    assert isinstance(module, ContrastiveModel) and isinstance(prepared.batches, FusionBatches)
    pictures = prepared.batches.pictures
    module.eval()
    found: dict[str, float] = {}
    for split in pictures.samples.splits[1:]:
        if not (size := pictures.samples.size(split)):
            continue
        loader = PairEvaluationLoader(
            pictures.samples,
            pictures.layout,
            seq_len=prepared.config.training.seq_len,
            batch_size=min(size, MOST),
            splits=[split],
            max_batches=1,
        )
        [batch] = loader
        seen, names, _ = module.embed_pairs(batch)
        cosines = torch.nn.functional.normalize(seen, dim=1) @ torch.nn.functional.normalize(names, dim=1).T
        first = torch.zeros_like(batch["groups"]).bool()
        first[[int((batch["groups"] == group).int().argmax()) for group in batch["groups"].unique()]] = True
        own = cosines.diagonal()[:, None]
        ranks = 1 + ((cosines > own) & first & (batch["groups"][:, None] != batch["groups"])).sum(dim=1)
        found |= {
            f"retrieval/{split}/first": float((ranks == 1).double().mean()),
            f"retrieval/{split}/median_rank": float(ranks.double().median()),
            f"retrieval/{split}/names": float(first.sum()),
        }
        run.console.print(
            f"[bold]pairs[/]   {split}: the right name is first for {found[f'retrieval/{split}/first']:.1%} of "
            f"{len(ranks):,} pictures, its median rank {ranks.double().median():.0f} of {int(first.sum()):,} names",
            highlight=False,
        )
    return found
