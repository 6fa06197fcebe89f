"""What follows training on pictures: numbers of pairs, of names in pictures, of the experts that image tokens take."""

import torch

from moesaic.data.images.pairs import PairEvaluationLoader
from moesaic.evaluation.language_modeling import LanguageModelScore
from moesaic.evaluation.specialization import Specialization
from moesaic.training.config import RunConfig
from moesaic.training.finish import Finished, Finisher, hyper_parameters, score_run
from moesaic.training.fit import Fitted
from moesaic.training.fusion import ContrastiveModel
from moesaic.training.fusion_batches import FusionBatches
from rich.console import Console

__all__ = ["finishers_of", "score_any"]

MOST = 2048
"""Pairs of a split among which a name is looked for."""


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
    return finishers


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
