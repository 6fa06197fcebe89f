"""The modules of runs that train on pictures: their stages differ from `LanguageModel` in what a batch goes through."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.config import from_mapping
from moesaic.data.mixing import picture_rows
from moesaic.evaluation.language_modeling import LanguageModelScore
from moesaic.layers import Parametrization, Routing, count_tokens
from moesaic.layers.part import initialize as initialize_part
from moesaic.losses import contrastive_loss, linear_cross_entropy, load_balance_loss, token_cross_entropy
from moesaic.losses.cross_entropy import IGNORE_INDEX
from moesaic.models import MultimodalConfig, MultimodalDecoder, VisionConfig
from moesaic.models.encoder_costs import account_encoder
from moesaic.models.multimodal import build_encoder
from moesaic.parallel.context import side_by_side
from moesaic.training.module import Batch, LanguageModel, StepCounts

__all__ = ["ContrastiveModel", "FusionModel"]

FIRST_SCALE = 10.0
"""The inverse temperature that contrastive training begins with."""
LARGEST_SCALE = 100.0
"""And the largest one, both of CLIP's size (Radford et al. 2021, arXiv 2103.00020)."""


class _WithPictures(LanguageModel):
    """A decoder with an encoder and a projector beside it: the parts, and names, of a `MultimodalDecoder`.

    Args:
        vision: plain mapping of the `VisionConfig`.
        image_token: the id at every place of an image.
    """

    def __init__(
        self,
        config: dict[str, Any],
        model: dict[str, Any],
        tokenizer: dict[str, Any] | None,
        token_bytes: list[int] | None,
        vision: dict[str, Any],
        image_token: int,
    ) -> None:
        super().__init__(config, model, tokenizer, token_bytes)
        shape = from_mapping(VisionConfig, vision, "fusion.vision")
        recompute = self.config.trainer.checkpoint_activations
        self.vision = build_encoder(shape, checkpoint_activations=recompute)
        self.projector = nn.Linear(shape.output_dim, self.decoder.embedding.embedding_dim, bias=False)
        for part in (self.vision, self.projector):
            with torch.no_grad():
                initialize_part(part, self.parametrization)
        self.image_token = image_token
        assert self.decoder.config is not None
        whole = MultimodalConfig(self.decoder.config, shape, image_token)
        self._flops_per_tile = account_encoder(whole).training_flops
        self.tiles = 0
        """Tiles that were trained on so far, on all ranks."""
        self._has_images = False
        """Whether any rank has some in this batch."""

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        tiles = int(self._over_ranks(torch.tensor(len(batch.get("images", ())))))
        self.tiles += tiles
        self._has_images = tiles > 0

    @property
    def active_flops(self) -> float:
        return super().active_flops + self.tiles * self._flops_per_tile

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["moesaic"]["tiles"] = self.tiles

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.tiles = checkpoint["moesaic"].get("tiles", 0)

    @property
    def beside(self) -> str:
        size = sum(p.numel() for part in (self.vision, self.projector) for p in part.parameters())
        flops = self._flops_per_tile / 1e6
        return f"{size:,} parameters and {flops:.3f} MFLOP per tile in training, on top of the memory and FLOPs above"

    @property
    def parametrization(self) -> Parametrization:
        return self.decoder.parametrization

    @property
    def trained(self) -> nn.Module:
        return self

    def _pixels(self, batch: Batch) -> Tensor:
        """The images in the dtype of the encoder's weights."""
        return batch["images"].to(self.projector.weight.dtype)


class FusionModel(_WithPictures):
    """Stages frozen and joint: rows of text and rows of pictures with text in one decoder, each loss logged apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fusion = self.config.fusion
        assert fusion is not None
        self.is_frozen = fusion.stage == "frozen"
        self.balances_apart = fusion.balance_per_modality
        self._is_image: Tensor | None = None
        self._of_kinds: dict[str, tuple[Tensor, Tensor]] = {}
        """Nats and labels of a kind of rows in the step at hand."""
        self.picture_score = LanguageModelScore(self.token_bytes)
        if self.is_frozen:
            self.decoder.requires_grad_(False)
            self.training_flops_per_token *= 2 / 3  # no gradients of weights

    @property
    def multimodal(self) -> MultimodalDecoder:
        """The three parts as one model, which shares them."""
        return MultimodalDecoder(self.decoder, self.vision, self.projector, image_token=self.image_token)

    def hidden_states(self, batch: Batch) -> tuple[Tensor, dict[str, Routing]]:
        self._is_image = batch["tokens"].flatten() == self.image_token
        if "images" not in batch:
            return super().hidden_states(batch)
        return self.multimodal.hidden_states(
            batch["tokens"], images=self._pixels(batch), image_rows=batch["image_rows"]
        )

    def label_loss(self, hidden: Tensor, batch: Batch, counts: StepCounts) -> Tensor:
        loss = self._loss_of_modalities(hidden, batch, counts)
        # rows without pictures teach nothing to an encoder below a frozen decoder; backward wants a graph all the same
        return loss if loss.requires_grad else loss + 0 * self.projector.weight.sum()

    def _loss_of_modalities(self, hidden: Tensor, batch: Batch, counts: StepCounts) -> Tensor:
        of_pictures = picture_rows(batch) if self._has_images else torch.zeros_like(batch["labels"][:, 0]).bool()
        is_label = batch["labels"] != IGNORE_INDEX
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for name, rows in (("text", ~of_pictures), ("pictures", of_pictures)):
            if not (everywhere := self._over_ranks(is_label[rows].sum())):
                continue  # on no rank; each notes what any has
            loss = torch.zeros_like(total)
            if len(labels := batch["labels"][rows].flatten()):
                states = hidden[rows].flatten(0, 1)
                loss = linear_cross_entropy(states, self.decoder.head.weight, labels, num_valid=counts.labels)
            self._note_kind(f"train/loss_{name}", loss.detach() * counts.labels, everywhere)
            total = total + loss
        return total

    def _note_kind(self, name: str, nats: Tensor, labels: Tensor) -> None:
        """Log the mean over the labels of a kind in a step: `nats` of this rank, `labels` of all."""
        noted = self.log_book.auxiliary
        before = self._of_kinds[name] if name in noted else (0, 0)
        self._of_kinds[name] = nats, labels = before[0] + nats, before[1] + labels
        noted[name] = nats / labels

    def load_balance_term(
        self, decided: Routing, valid: Tensor | None, load: Tensor | None, counts: StepCounts
    ) -> Tensor:
        if not self.balances_apart or not self._has_images:
            return super().load_balance_term(decided, valid, load, counts)
        assert self._is_image is not None  # set by `hidden_states`
        terms = []
        for is_kind in (self._is_image, ~self._is_image):
            kept = is_kind if valid is None else is_kind & valid
            of_kind = self._over_ranks(count_tokens(decided.expert_ids, decided.logits.size(1), kept))
            num_kept = self._over_ranks(kept.sum())
            term = load_balance_loss(decided.logits, decided.expert_ids, kept, of_kind, num_valid=num_kept)
            terms.append(term / counts.share)
        return torch.stack(terms).mean()

    def _move_biases(self, *args: Any) -> None:
        if not self.is_frozen:
            super()._move_biases(*args)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.picture_score = LanguageModelScore(self.token_bytes)

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> dict[str, Routing]:
        if "images" not in batch:
            return super().score_batch(batch)
        hidden, routing = self.hidden_states(batch)
        labels = batch["labels"]
        nats = token_cross_entropy(hidden.flatten(0, 1), self.decoder.head.weight, labels.flatten())
        self.picture_score.update(nats.view_as(labels), labels, routing, batch.get("valid"))
        return {}

    def validation_numbers(self) -> dict[str, float]:
        if self.trainer.world_size > 1:
            self.picture_score.add_up(self._over_ranks)
        found = {"validation/loss_pictures": self.picture_score.loss}
        if self.picture_score.bits_per_byte is not None:
            found["validation/bits_per_byte_pictures"] = self.picture_score.bits_per_byte
        return found


class ContrastiveModel(_WithPictures):
    """Stage contrastive: the decoder is a text tower, whose last state of a text is to be like that of its picture.

    A picture is the mean of its projected tokens. Loss and score are nats of `contrastive_loss` per pair.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        self.training_flops_per_token -= 6 * self.decoder.head.weight.numel()  # which is not used

    def embed_pairs(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Routing]]:
        """The pictures and the texts of B pairs, each (B, D), and the routing of the texts."""
        hidden, routing = self.decoder.hidden_states(batch["tokens"])
        pictures = self.projector(self.vision(self._pixels(batch))).mean(dim=1)
        return pictures, hidden[batch["labels"] != IGNORE_INDEX], routing

    def _nats(self, pictures: Tensor, texts: Tensor, groups: Tensor) -> Tensor:
        scale = self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
        return contrastive_loss(pictures, texts, scale, groups)

    def hidden_states(self, batch: Batch) -> tuple[Tensor, dict[str, Routing]]:
        """The nats of each pair, (B,), in place of states: what `label_loss` takes.

        Wrong answers are the pairs of all ranks.
        """
        pictures, texts, routing = self.embed_pairs(batch)
        groups, size = batch["groups"], len(texts)
        if (ranks := self.trainer.world_size) > 1:
            everywhere = [torch.empty_like(groups) for _ in range(ranks)]
            torch.distributed.all_gather(everywhere, groups)
            world = torch.distributed.group.WORLD
            assert world is not None  # the strategy made it
            pictures, texts = (side_by_side(each, 0, world) for each in (pictures, texts))
            groups = torch.cat(everywhere)
        first = self.trainer.global_rank * size if ranks > 1 else 0
        return self._nats(pictures, texts, groups)[first : first + size], routing

    def label_loss(self, hidden: Tensor, batch: Batch, counts: StepCounts) -> Tensor:
        return hidden.sum() / counts.labels

    @torch.no_grad()
    def score_batch(self, batch: Batch) -> dict[str, Routing]:
        pictures, texts, _ = self.embed_pairs(batch)
        nats = self._nats(pictures, texts, batch["groups"])
        labels = batch["labels"].amax(dim=1, keepdim=True)  # the one of a row
        self.score.update(nats[:, None], labels)
        return {}
