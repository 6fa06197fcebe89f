"""A layer in which nothing is wrong, and relatives in each of which one thing is.

`Good` computes every expert on every token: slow, traceable, and easy to spoil in one place. It has a reference,
losses, a selection bias and a replay, so that every check applies to it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.testing import MoEUnderTest, Run, dense_moe

DIM, HIDDEN = 16, 12
RATE = 0.01


class Good(nn.Module):
    """Softmax top-k with scores on the output, ungated ReLU experts, a selection bias moved by the sign rule."""

    persistent = True

    def __init__(self, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, min(top_k, num_experts)
        self.router = nn.Parameter(torch.randn(num_experts, DIM))
        self.up = nn.Parameter(torch.randn(num_experts, DIM, HIDDEN))
        self.down = nn.Parameter(torch.randn(num_experts, HIDDEN, DIM))
        self.register_buffer("expert_bias", torch.zeros(num_experts), persistent=self.persistent)
        self.group: Any = None
        self.replayed: Tensor | None = None

    def logits(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, E)."""
        return x @ self.router.T

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    def choose(self, probabilities: Tensor) -> Tensor:
        """Mask (B, L, E) of the chosen experts, or of those that are replayed."""
        return self.own_choice(probabilities) if self.replayed is None else self.mask(self.replayed, probabilities)

    def own_choice(self, probabilities: Tensor) -> Tensor:
        ids = (probabilities.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
        return torch.zeros_like(probabilities).scatter(-1, ids, 1.0)

    def mask(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """Mask (B, L, E) of ids (B * L, K), of which E is no expert."""
        with_none = torch.zeros(*probabilities.shape[:-1], self.num_experts + 1)
        return with_none.scatter(-1, ids.view(*probabilities.shape[:-1], -1), 1.0)[..., :-1]

    def choice(self, x: Tensor) -> Tensor:
        """(B, L, D) -> ids (B * L, K)."""
        return self.own_choice(self.probabilities(self.logits(x))).flatten(0, 1).topk(self.top_k).indices

    def replay(self, x: Tensor, ids: Tensor) -> Tensor:
        self.replayed = ids
        try:
            return self(x)
        finally:
            self.replayed = None

    def replayed_load(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.mask(ids, self.logits(x)).sum(dim=(0, 1))

    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return probabilities * chosen

    def experts(self, x: Tensor) -> Tensor:
        """Every expert on every token: (B, L, D) -> (B, L, E, D)."""
        return torch.einsum("blef,efd->bled", F.relu(torch.einsum("bld,edf->blef", x, self.up)), self.down)

    def mix(self, x: Tensor, scores: Tensor) -> Tensor:
        if self.group is None:
            return torch.einsum("bled,ble->bld", self.experts(x), scores)
        # every rank runs its experts on the tokens of all ranks
        x, scores = (collectives.all_gather_tensor_autograd(each, 0, self.group) for each in (x, scores))
        own = scores.chunk(self.group.size(), dim=-1)[self.group.rank()]
        y = torch.einsum("bled,ble->bld", self.experts(x), own)
        return collectives.reduce_scatter_tensor_autograd(y, "sum", 0, self.group)

    def spread(self, group: Any) -> None:
        """Expert parallelism, as `MoEUnderTest.expert_parallel` says."""
        self.group = group
        for name in ("up", "down"):
            own = getattr(self, name).detach().chunk(group.size())[group.rank()]
            setattr(self, name, nn.Parameter(own.clone()))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.probabilities(self.logits(x))
        return self.mix(x, self.scores(probabilities, self.choose(probabilities)))

    def load(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.choose(self.probabilities(self.logits(x))).sum(dim=(0, 1))

    def balance_loss(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.balance(self.logits(x), valid)

    def balance(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        """Switch's."""
        fraction, share = self.fraction_and_share(logits, valid)
        return self.num_experts * (fraction * share).sum()

    def fraction_and_share(self, logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(dim=-1)
        weight = torch.ones(logits.shape[:2]) if valid is None else valid.float()
        weight = (weight / weight.sum())[..., None]
        fraction = (self.choose(probabilities) * weight).sum(dim=(0, 1)) / self.top_k
        return fraction, (probabilities * weight).sum(dim=(0, 1))

    def z_loss(self, x: Tensor) -> Tensor:
        return self.logits(x).logsumexp(dim=-1).square().mean()

    def bias_step(self, micro_batches: Sequence[Tensor], run: Run) -> None:
        load = torch.zeros(self.num_experts)
        for x in micro_batches:
            run(self, x).square().mean().backward()
            load += self.load(x)
        self.move(load)

    def move(self, load: Tensor) -> None:
        self.expert_bias.add_(RATE * (load.mean() - load).sign())

    @classmethod
    def reference(cls, top_k: int) -> Callable[..., Tensor]:
        def reference(weights: Mapping[str, Tensor], x: Tensor, expert_ids: Tensor | None = None) -> Tensor:
            def expert(e: int, rows: Tensor) -> Tensor:
                return F.relu(rows @ weights["up"][e]) @ weights["down"][e]

            bias = weights["expert_bias"]
            return dense_moe(x, weights["router"], expert, top_k=top_k, expert_bias=bias, expert_ids=expert_ids)

        return reference


def describe(layer: Good, **changes: Any) -> MoEUnderTest:
    """Everything that there is to know of a `Good`, and of a relative that changes it."""
    known: dict[str, Any] = {
        "dim": DIM,
        "reference": layer.reference(layer.top_k),
        "replay_reference": layer.reference(layer.top_k),
        "choice": lambda module, x: module.choice(x),
        "replay": lambda module, x, ids: module.replay(x, ids),
        "load": lambda module, x, ids: module.replayed_load(x, ids),
        "takes_no_expert": True,
        "router_weight": lambda module: module.router,
        "top_k": layer.top_k,
        "balance_loss": lambda module, x, valid: module.balance_loss(x, valid),
        "z_loss": lambda module, x: module.z_loss(x),
        "expert_bias": lambda module: module.expert_bias,
        "expert_parallel": lambda module, group: module.spread(group),
        "bias_step": lambda module, micro_batches, run: module.bias_step(micro_batches, run),
    }
    return MoEUnderTest(layer, **(known | changes))


class NoiseInEvaluation(Good):
    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits + torch.randn_like(logits)


class ScoreBeforeExperts(Good):
    def mix(self, x: Tensor, scores: Tensor) -> Tensor:
        up = torch.einsum("bled,edf->blef", x[:, :, None] * scores.square()[..., None], self.up)
        return torch.einsum("blef,efd->bld", F.relu(up), self.down)


class BiasInScores(Good):
    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return (probabilities + self.expert_bias) * chosen


class ExpertInputDetached(Good):
    def experts(self, x: Tensor) -> Tensor:
        return super().experts(x.detach())


class ScoresDetached(Good):
    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return super().scores(probabilities.detach(), chosen)


class ScoresWithoutGradient(Good):
    """The graph is there, and carries zeros."""

    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return super().scores(probabilities.detach() + 0.0 * probabilities, chosen)


class TopOneNormalized(Good):
    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        scores = super().scores(probabilities, chosen)
        return scores / scores.sum(dim=-1, keepdim=True)


class FirstTwoSwapped(Good):
    """Rows that come back in another order than they went."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[:, :2].flip(1), y[:, 2:]], dim=1)


class CenteredOverBatch(Good):
    def logits(self, x: Tensor) -> Tensor:
        logits = super().logits(x)
        return logits - 0.5 * logits.mean(dim=0, keepdim=True)


class CenteredOverLength(Good):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x - 0.5 * x.mean(dim=1, keepdim=True))


def first_come(chosen: Tensor, capacity: int) -> Tensor:
    """(B, L, E) without what arrives after the first `capacity` tokens of an expert."""
    flat = chosen.flatten(0, 1)
    return (flat * (flat.cumsum(dim=0) <= capacity)).view_as(chosen)


class CapacityOfABatch(Good):
    """1.25 times the even share."""

    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        capacity = int(1.25 * chosen[..., 0].numel() * self.top_k / self.num_experts)
        return super().scores(probabilities, first_come(chosen, capacity))


class BufferOf128Rows(Good):
    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return super().scores(probabilities, first_come(chosen, 128))


class ExpertsChoose(Good):
    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        flat = probabilities.detach().flatten(0, 1)
        each = max(1, flat.size(0) * self.top_k // self.num_experts)
        chosen = torch.zeros_like(flat).scatter(0, flat.topk(each, dim=0).indices, 1.0).view_as(probabilities)
        return super().scores(probabilities, chosen)


class TokensPerExpertTruncated(Good):
    def forward(self, x: Tensor) -> Tensor:
        rows = x[..., 0].numel() // self.num_experts
        torch.empty(rows).max()  # there is no largest of nothing
        return super().forward(x)


class OneExpertSqueezed(Good):
    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return super().scores(probabilities, chosen).squeeze(-1)


class PaddingCounted(Good):
    def balance_loss(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return super().balance_loss(x, None)


class BalanceDetached(Good):
    def balance(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        return super().balance(logits.detach(), valid)


class BalanceOfCounts(Good):
    """Counts have no gradient; the graph is there, and leads nowhere."""

    def balance(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        fraction, share = self.fraction_and_share(logits, valid)
        return self.num_experts * fraction.square().sum() + 0.0 * share.sum()


class ZLossDetached(Good):
    def z_loss(self, x: Tensor) -> Tensor:
        return super().z_loss(x).detach()


class VariationOfLoadTimesShare(Good):
    def balance(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        fraction, share = self.fraction_and_share(logits, valid)
        return (fraction * share).var().sqrt() / (fraction * share).mean()


class VariationOfShare(Good):
    def balance(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        _, share = self.fraction_and_share(logits, valid)
        return share.var().sqrt() / share.mean()


class CosineRouter(Good):
    def logits(self, x: Tensor) -> Tensor:
        return x @ (self.router / self.router.norm(dim=-1, keepdim=True)).T


class NaiveSoftmax(Good):
    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.exp() / logits.exp().sum(dim=-1, keepdim=True)


class NaiveZLoss(Good):
    def z_loss(self, x: Tensor) -> Tensor:
        return self.logits(x).exp().sum(dim=-1).log().square().mean()


class FixedPointOutputs(Good):
    """Six decimals: enough for outputs around 1."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + ((y * 1e6).round() / 1e6 - y).detach()


class QuantizedByTheLargest(Good):
    """One step for the whole batch, as of a quantized kernel with a scale per tensor."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        step = y.detach().abs().max().clamp(min=1e-30) * 2.0**-19
        return y + ((y / step).round() * step - y).detach()


class RowsOfAnEarlierStep(Good):
    """A buffer that only grows; in backward the rows past the end of today's tokens are still there."""

    def __init__(self, num_experts: int = 4, top_k: int = 2) -> None:
        super().__init__(num_experts, top_k)
        self.rows = torch.empty(0, DIM)

    def mix(self, x: Tensor, scores: Tensor) -> Tensor:
        y, own = super().mix(x, scores), x.detach().flatten(0, 1)
        if not self.training:
            return y
        left = self.rows[own.size(0) :]
        self.rows = torch.cat([own, left])
        stale = self.experts(left[None]).sum()
        return y + (stale - stale.detach())


class RowsNeverWritten(Good):
    """As many rows as a kernel likes, 16 of them at a time. Zero times what they hold is zero, unless it is NaN."""

    def experts(self, x: Tensor) -> Tensor:
        room = x.new_empty(x.size(0), -x.size(1) % 16, x.size(2))
        return super().experts(torch.cat([x, room], dim=1))[:, : x.size(1)]


class RecordsOfTheNextToken(Good):
    def choice(self, x: Tensor) -> Tensor:
        return super().choice(x).roll(1, 0)


class ReplaysTopScoresOnly(Good):
    """Scores are looked up where all but today's top-k are zero already."""

    def scores(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        return super().scores(probabilities, chosen * self.own_choice(probabilities))


class NoneIsTheLastExpert(Good):
    def replay(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().replay(x, ids.clamp(max=self.num_experts - 1))


class NoneIsCounted(Good):
    def replayed_load(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().replayed_load(x, ids.clamp(max=self.num_experts - 1))


class BiasNotSaved(Good):
    persistent = False


class BiasReplaced(Good):
    """Out of place: a state dict that was taken before keeps the old tensor."""

    def move(self, load: Tensor) -> None:
        self.expert_bias = self.expert_bias + RATE * (load.mean() - load).sign()


class CountsInForward(Good):
    """The load is counted where the layer runs, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = torch.zeros(self.num_experts)

    def is_counted(self) -> bool:
        return self.training and self.replayed is None

    def forward(self, x: Tensor) -> Tensor:
        if self.is_counted():
            self.counted += self.load(x)
        return super().forward(x)

    def bias_step(self, micro_batches: Sequence[Tensor], run: Run) -> None:
        for x in micro_batches:
            run(self, x).square().mean().backward()
        self.move(self.counted)
        self.counted.zero_()


class EvaluationCounted(CountsInForward):
    def is_counted(self) -> bool:
        return self.replayed is None


class ReplayCounted(CountsInForward):
    def is_counted(self) -> bool:
        return self.training


class BiasMovesInForward(Good):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.replayed is None:
            self.move(self.load(x))
        return super().forward(x)

    def bias_step(self, micro_batches: Sequence[Tensor], run: Run) -> None:
        for x in micro_batches:
            run(self, x).square().mean().backward()


class BiasMovesPerMicroBatch(Good):
    def bias_step(self, micro_batches: Sequence[Tensor], run: Run) -> None:
        for x in micro_batches:
            super().bias_step([x], run)


class BiasNeverMoves(Good):
    def move(self, load: Tensor) -> None:
        pass


class RecomputationCounted(CountsInForward):
    """By the load itself, not its sign: counted twice, it moves twice as far."""

    def move(self, load: Tensor) -> None:
        self.expert_bias.add_(1e-4 * (load.mean() - load))


class UnusedParameter(Good):
    def __init__(self) -> None:
        super().__init__()
        self.left_over = nn.Parameter(torch.ones(3))


class IdleExpertsSkipped(Good):
    """Experts as modules of which those without tokens do not run."""

    def __init__(self) -> None:
        super().__init__()
        ups, downs = self.up.detach(), self.down.detach()
        del self.up, self.down
        self.ups = nn.ParameterList([nn.Parameter(up) for up in ups])
        self.downs = nn.ParameterList([nn.Parameter(down) for down in downs])

    def mix(self, x: Tensor, scores: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            if bool(scores[..., e].any()):
                y = y + F.relu(x @ up) @ down * scores[..., e, None]
        return y


class CountsAsPythonNumbers(Good):
    def mix(self, x: Tensor, scores: Tensor) -> Tensor:
        flat, weights = x.flatten(0, 1), scores.flatten(0, 1)
        token, expert = weights.nonzero(as_tuple=True)
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts).tolist()
        rows = flat[token[order]].split(counts)
        out = torch.cat([F.relu(r @ up) @ down for r, up, down in zip(rows, self.up, self.down, strict=True)])
        out = out * weights[token[order], expert[order], None]
        return torch.zeros_like(flat).index_add(0, token[order], out).view_as(x)


class GradientsOfRanksAveraged(Good):
    """A mean over ranks, where their tokens are shares of one batch."""

    def spread(self, group: Any) -> None:
        super().spread(group)
        self.up.register_hook(lambda gradient: gradient / group.size())


class ExpertsOfAnotherRank(Good):
    def spread(self, group: Any) -> None:
        up = self.up.detach().roll(1, 0)
        super().spread(group)
        self.up = nn.Parameter(up.chunk(group.size())[group.rank()].clone())


class OneRankFails(Good):
    def spread(self, group: Any) -> None:
        if group.rank() == 1:
            raise MemoryError("no room for its experts")
        super().spread(group)


class ExpertsAsModules(Good):
    """Each rank keeps its own experts under their names, and has none of the others."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__(num_experts)
        ups = self.up.detach()
        del self.up
        self.ups = nn.ParameterDict({str(e): nn.Parameter(up) for e, up in enumerate(ups)})

    @property
    def up(self) -> Tensor:  # type: ignore[override]
        return torch.stack(list(self.ups.values()))

    def spread(self, group: Any) -> None:
        self.group = group
        self.down = nn.Parameter(self.down.detach().chunk(group.size())[group.rank()].clone())
        for e in range(self.num_experts):
            if e * group.size() // self.num_experts != group.rank():
                del self.ups[str(e)]
