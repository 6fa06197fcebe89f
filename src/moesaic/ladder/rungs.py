"""From FLOPs to a run: width, tokens and batch of every rung by one rule, and the study that runs them.

The baseline sets the shape of a rung. Every arm has its width, its tokens and its batches.

- A parameter is two forward FLOPs per token, head and attention included, so that training C FLOPs on D tokens with N
  of them is C = 6 N D.
- D = 20 N, after Hoffmann et al. (2022, arXiv 2203.15556). The width is the one that comes nearest, in whole heads.
- The depth is that of the model, at every rung.
- The batch grows as the square root of the tokens, near the exponent of Bergsma et al. (2025, arXiv 2505.13738).
- Learning rates are tuned at the lowest rung, and follow by `model.parametrization=transfer` at the others.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.ladder.config import LadderConfig, name_of
from moesaic.models import DecoderConfig
from moesaic.models.accounting import account
from moesaic.models.leaks import leaks_of
from moesaic.models.resizing import resized
from moesaic.overrides import apply_overrides
from moesaic.studies.config import AxisConfig, Overrides, StudyConfig

__all__ = ["AXIS", "METRIC", "Rung", "Rungs", "require_fresh_tokens"]

AXIS = "rung"
METRIC = "validation/bits_per_byte"

FARTHEST = 3.0
"""By how much tokens per parameter may miss what they should be: small widths are few."""

FEWEST_STEPS = 20

CHECKS, CHECKPOINTS = 5, 10
"""How often a run is checked and kept."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """The shape that all arms have at one number of FLOPs."""

    name: str
    dim: int
    num_layers: int
    batch_size: int
    """Sequences of a micro-batch."""
    steps: int
    tokens: int
    """Tokens of the whole training."""
    flops: float
    """Active, of the baseline, forward and backward."""
    parameters: float
    """Two forward FLOPs per token are one; of the baseline."""

    @property
    def tokens_per_step(self) -> int:
        return self.tokens // self.steps


class Rungs:
    """The rule of a ladder.

    Args:
        base: the run config that all rungs start from.
        vocab_size: of the tokenizer.

    Raises:
        InputError: a model that is none, or a rung that the rule cannot meet.
    """

    def __init__(self, ladder: LadderConfig, base: Mapping[str, Any], vocab_size: int) -> None:
        self.ladder, self.base, self.vocab_size = ladder, base, vocab_size
        if ladder.baseline not in ladder.arms:
            raise InputError(
                f"ladder.baseline={ladder.baseline!r}: unknown arm; must be one of {', '.join(ladder.arms)}"
            )
        self._flops: dict[tuple[str, int], float] = {}
        self.models = {arm: self._model_of(arm) for arm in ladder.arms}
        self.leaks = {arm: leaks_of(model) for arm, model in self.models.items()}
        """What the parts of each arm state of later tokens and other sequences."""
        self.unit = self._smallest_width()
        self.lowest = self._tokens_of(ladder.rungs[0])[1]

    def _model_of(self, arm: str) -> DecoderConfig:
        where = f"ladder.arms.{arm}"
        model = apply_overrides(self.base, self.ladder.arms[arm], where)["model"]
        if model["dim"] != self.base["model"]["dim"]:
            raise InputError(f"{where}: model.dim={model['dim']}: must be left to the rungs")
        model = {**model, "vocab_size": self.vocab_size, "parametrization": "standard", "base": None}
        return from_mapping(DecoderConfig, model, "model")

    def _smallest_width(self) -> int:
        """The width of which all others are multiples: heads and FFNs of all arms are whole there."""
        dim: int = self.base["model"]["dim"]
        for smallest in range(1, dim):
            try:
                for model in self.models.values():
                    resized(model, dim=smallest)
            except InputError:
                continue
            return smallest
        return dim

    def model_at(self, arm: str, dim: int) -> DecoderConfig:
        return resized(self.models[arm], dim=dim)

    def flops_per_token(self, arm: str, dim: int) -> float:
        """Active, forward and backward."""
        if (arm, dim) not in self._flops:
            forward = account(self.model_at(arm, dim), self.base["training"]["seq_len"]).forward_flops
            self._flops[arm, dim] = 3 * forward
        return self._flops[arm, dim]

    def _tokens_of(self, flops: float) -> tuple[int, float]:
        """Width and tokens of a rung; the tokens are not whole steps yet."""
        wanted = self.ladder.tokens_per_parameter

        def ratio(k: int) -> float:
            per_token = self.flops_per_token(self.ladder.baseline, k * self.unit)
            return flops / per_token / (per_token / 6)

        most = 1
        while ratio(most) > wanted:
            most *= 2
        least = most // 2
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if ratio(middle) > wanted else (least, middle)
        k = min((k for k in (least, most) if k), key=lambda k: abs(math.log(ratio(k) / wanted)))
        if not 1 / FARTHEST < ratio(k) / wanted < FARTHEST:
            raise InputError(
                f"ladder.rungs: {name_of(flops)}: at the nearest width, {k * self.unit}, it is {ratio(k):.3g} tokens "
                f"per parameter; must be within a factor of {FARTHEST:g} of ladder.tokens_per_parameter={wanted:g}"
            )
        dim = k * self.unit
        return dim, flops / self.flops_per_token(self.ladder.baseline, dim)

    def at(self, flops: float) -> Rung:
        """The rung of so many FLOPs.

        Raises:
            InputError: no width comes near enough, or too few steps.
        """
        dim, tokens = self._tokens_of(flops)
        training = self.base["training"]
        in_batch = training["seq_len"] * training.get("accumulate", 1)
        batch_tokens = self.ladder.batch * (tokens / self.lowest) ** self.ladder.batch_exponent
        batch_size = max(1, round(batch_tokens / in_batch))
        steps = round(tokens / (batch_size * in_batch))
        if steps < FEWEST_STEPS:
            raise InputError(
                f"ladder.rungs: {name_of(flops)}: {steps} steps of {batch_size * in_batch:,} tokens; must be "
                f"{FEWEST_STEPS} or more, so make ladder.batch or training.seq_len smaller"
            )
        tokens = steps * batch_size * in_batch
        per_token = self.flops_per_token(self.ladder.baseline, dim)
        layers = self.models[self.ladder.baseline].num_layers
        return Rung(name_of(flops), dim, layers, batch_size, steps, tokens, per_token * tokens, per_token / 6)

    @property
    def all(self) -> list[Rung]:
        """The rungs of the fit and those beyond."""
        return [self.at(flops) for flops in (*self.ladder.rungs, *self.ladder.targets)]

    def study(self) -> tuple[StudyConfig, dict[str, Any]]:
        """The study that runs the ladder, and the run config that it starts from."""
        rungs, ladder = self.all, self.ladder
        axis = AxisConfig(
            values={rung.name: self._overrides(rung) for rung in rungs},
            of_arm={arm: {rung.name: self._widths(arm, rung) for rung in rungs} for arm in ladder.arms},
        )
        study = StudyConfig(
            question=ladder.question,
            equal="width, tokens and data order of each rung; active FLOPs and seconds stand in the table",
            baseline=ladder.baseline,
            arms=ladder.arms,
            seeds=ladder.seeds,
            marks={arm: leaks.mark for arm, leaks in self.leaks.items() if leaks.mark is not None},
            metric=METRIC,
            tune=None if ladder.tune is None else dataclasses.replace(ladder.tune, at="first"),
            axes={AXIS: axis},
        )
        first = rungs[0]
        shape = {"dim": first.dim, "num_layers": first.num_layers}
        base_shape = {**shape, "batch": first.tokens_per_step, "tokens": first.tokens}
        overrides = {f"transfer.base.{key}": value for key, value in base_shape.items()}
        return study, apply_overrides(self.base, overrides, "ladder")

    def _overrides(self, rung: Rung) -> Overrides:
        """What all arms have at a rung."""
        return {
            "model.dim": rung.dim,
            "training.steps": rung.steps,
            "training.batch_size": rung.batch_size,
            "training.validate_every": max(1, rung.steps // CHECKS),
            "training.checkpoint_every": max(1, rung.steps // CHECKPOINTS),
            "schedule.warmup_steps": round(self.ladder.warmup * rung.steps),
        }

    def _widths(self, arm: str, rung: Rung) -> Overrides:
        """What follows from the width, by the arm's own model."""
        model = self.model_at(arm, rung.dim)
        widths: Overrides = {
            "model.attention.num_heads": model.attention.num_heads,
            "model.attention.num_kv_heads": model.attention.num_kv_heads,
            "model.attention.head_dim": model.attention.head_dim,
            "model.hidden_dim": model.hidden_dim,
        }
        if (mla := model.attention.mla) is not None:
            widths["model.attention.mla.kv_lora_rank"] = mla.kv_lora_rank
            widths["model.attention.mla.q_lora_rank"] = mla.q_lora_rank
        if model.moe is not None:
            widths["model.moe.hidden_dim"] = model.moe.hidden_dim
            widths["model.moe.shared_hidden_dim"] = model.moe.shared_hidden_dim
            if model.moe.latent_dim is not None:
                widths["model.moe.latent_dim"] = model.moe.latent_dim
            if isinstance(model.moe.router, dict):
                widths["model.moe.router"] = model.moe.router
        if model.pattern is not None and any(isinstance(layer.ffn, dict) for layer in model.pattern):
            widths["model.pattern"] = [to_mapping(layer) for layer in model.pattern]
        return widths


def require_fresh_tokens(rungs: list[Rung], training_tokens: int, seq_len: int) -> None:
    """Refuse a ladder in which a token is met twice: its laws would be about memory, too.

    Args:
        training_tokens: of the training split.

    Raises:
        InputError: a rung needs more; it says how many there are.
    """
    there = max(0, (training_tokens - 1) // seq_len - 1) * seq_len
    for rung in rungs:
        if rung.tokens > there:
            raise InputError(
                f"ladder: rung {rung.name} trains on {rung.tokens:,} tokens, and the training split has {there:,} in "
                f"whole windows of training.seq_len={seq_len}; no token may be repeated, so take larger data"
            )
