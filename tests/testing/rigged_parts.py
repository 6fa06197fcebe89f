"""Parts alone in which nothing is wrong, and relatives of them with one bug each."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.layers import Routing

DIM, EXPERTS = 32, 4


class LinearRouter(nn.Module):
    """Nothing is wrong: softmax top-2."""

    def __init__(self, dim: int = DIM, num_experts: int = EXPERTS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        scores, expert_ids = logits.softmax(dim=-1).topk(2, dim=-1)
        return Routing(logits, scores.to(x.dtype), expert_ids)


class ExpertChoice(LinearRouter):
    """Each expert takes the half of all tokens that it likes best: later ones push earlier ones out."""

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        scores = logits.softmax(dim=-1)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(0, scores.topk(max(1, x.size(0) // 2), dim=0).indices, True)
        experts = torch.arange(EXPERTS).expand_as(chosen)
        return Routing(logits, scores, torch.where(chosen, experts, EXPERTS))


class Chained(LinearRouter):
    """Nothing is wrong: its logits are those of the layer before, too."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.full((EXPERTS,), 0.5))

    def forward(self, x: Tensor, router_state: Tensor | None) -> Routing:
        logits = x @ self.weight.T
        if router_state is not None:
            logits = logits + self.before * router_state
        scores, expert_ids = logits.softmax(dim=-1).topk(2, dim=-1)
        return Routing(logits, scores.to(x.dtype), expert_ids, state=logits)


class LeavesTheMean(LinearRouter):
    """Its own choice is causal. What it leaves for the next layer is the mean of all tokens."""

    def forward(self, x: Tensor) -> Routing:
        routing = super().forward(x)
        return routing._replace(state=routing.logits.mean(dim=0).expand_as(routing.logits))


class ReadsTheMean(Chained):
    """Leaves what is causal, and reads the mean of what the layer before left."""

    def forward(self, x: Tensor, router_state: Tensor | None) -> Routing:
        return super().forward(x, None if router_state is None else router_state.mean(dim=0, keepdim=True))


class LeavesTheMeanLater(Chained):
    """What the second layer leaves is the mean of all tokens; the first one leaves what is causal."""

    def forward(self, x: Tensor, router_state: Tensor | None) -> Routing:
        routing = super().forward(x, router_state)
        return routing if router_state is None else routing._replace(state=routing.logits.mean(0).expand(len(x), -1))


class CountsLayers(LinearRouter):
    """From the third layer on, by a count that it hands on, it chooses by the mean of all tokens."""

    def forward(self, x: Tensor, router_state: Tensor | None) -> Routing:
        number = torch.zeros_like(x[:, :1]) if router_state is None else router_state
        return super().forward(x + (number >= 2) * x.mean(0))._replace(state=number + 1)


class LeaksInLaterLayers(LinearRouter):
    """Chooses by the mean of all tokens, but in the first two layers."""

    def __init__(self, dim: int, num_experts: int, layer_index: int) -> None:
        super().__init__(dim, num_experts)
        self.leaks = layer_index >= 2

    def forward(self, x: Tensor) -> Routing:
        return super().forward(x + x.mean(dim=0) if self.leaks else x)


class ChangesTheState(Chained):
    """Adds to what the layer before left, in its place."""

    def forward(self, x: Tensor, router_state: Tensor | None) -> Routing:
        routing = super().forward(x, router_state)
        return routing if router_state is None else routing._replace(state=router_state.add_(routing.logits.detach()))


class Moved(LinearRouter):
    """Nothing is wrong with "buffer": a bias is moved away from the experts that were chosen most."""

    def __init__(self, kept: str = "buffer", observes: bool = True) -> None:
        super().__init__()
        self.observes = observes
        bias = torch.zeros(EXPERTS)
        if kept == "buffer":
            self.register_buffer("bias", bias)
        else:
            self.bias = bias

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        expert_ids = (logits + self.bias.to(x)).topk(2, dim=-1).indices
        return Routing(logits, logits.sigmoid().gather(1, expert_ids), expert_ids)

    def observe(self, routing: Routing, valid: Tensor | None) -> Tensor | None:
        return routing.expert_ids.flatten().bincount(minlength=EXPERTS).float() if self.observes else None

    def end_step(self, observed: Tensor) -> None:
        self.bias -= 0.1 * (observed - observed.mean()).sign()


class ByTokenId(LinearRouter):
    """Nothing is wrong: each token id has a preference, and ids must be given."""

    def __init__(self, dim: int = DIM, num_experts: int = EXPERTS) -> None:
        super().__init__(dim, num_experts)
        self.preference = nn.Embedding(512, num_experts)

    def forward(self, x: Tensor, token_ids: Tensor) -> Routing:
        logits = x @ self.weight.T + self.preference(token_ids)
        scores, expert_ids = logits.softmax(dim=-1).topk(2, dim=-1)
        return Routing(logits, scores.to(x.dtype), expert_ids)


class Odd(nn.Module):
    """Neither a layer nor a part: nobody has a gain for it."""

    def __init__(self, dim: int, num_experts: int, gain: float) -> None:
        super().__init__()

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        return x


class LimitedCapacity(LinearRouter):
    """Drops tokens beyond a fair share of each expert, by order: causal, as far as what later tokens are goes."""

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        scores, expert_ids = logits.softmax(dim=-1).topk(1, dim=-1)
        place = nn.functional.one_hot(expert_ids[:, 0], EXPERTS).cumsum(dim=0).gather(1, expert_ids)
        return Routing(logits, scores, expert_ids.masked_fill(place > x.size(0) // EXPERTS, EXPERTS))


class UnusedParameter(LinearRouter):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(EXPERTS))


class NormalizedTop1(LinearRouter):
    """The one score is divided by itself, so that the router learns nothing."""

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        scores, expert_ids = logits.softmax(dim=-1).topk(1, dim=-1)
        return Routing(logits, scores / scores.sum(dim=-1, keepdim=True), expert_ids)


class NoisyRouter(LinearRouter):
    """Nothing is wrong: in training it adds noise, the same for a token whatever stands beside it."""

    def forward(self, x: Tensor) -> Routing:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class RunningLoad(LinearRouter):
    """Prefers experts that had little load, which it counts outside the state dict."""

    load: Tensor

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(EXPERTS), persistent=persistent)

    def forward(self, x: Tensor) -> Routing:
        logits = x @ self.weight.T
        expert_ids = (logits.softmax(dim=-1) - 0.01 * self.load).topk(2, dim=-1).indices
        scores = logits.sigmoid().gather(1, expert_ids)
        if self.training:
            with torch.no_grad():
                self.load.lerp_(expert_ids.flatten().bincount(minlength=EXPERTS).to(self.load), 0.1)
        return Routing(logits, scores, expert_ids)


class Average(nn.Module):
    """Nothing is wrong: the mean of all real tokens so far, with a cache, a mask and dropout."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(0.1)
        nn.init.zeros_(self.out.weight)

    def make_cache(self) -> dict[str, Tensor]:
        return {}

    def forward(
        self, x: Tensor, cache: dict[str, Tensor] | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.out(self.dropout(self.average(self.value(x), cache, attention_mask)))

    def average(self, x: Tensor, cache: dict[str, Tensor] | None, mask: Tensor | None) -> Tensor:
        real = torch.ones(x.shape[:2]) if mask is None else mask[:, -x.size(1) :].float()
        weights = real.to(x)[:, :, None]
        before = {} if cache is None else cache
        total = (weights * x).cumsum(dim=1) + before.get("total", 0)
        count = weights.cumsum(dim=1) + before.get("count", 0)
        if cache is not None:
            cache["total"], cache["count"] = total[:, -1:], count[:, -1:]
        return total / count.clamp(min=1)


class Centered(Average):
    """The mean of the whole sequence is taken off."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x - 0.01 * x.mean(dim=1, keepdim=True), cache, attention_mask)


class ByLength(Average):
    """Weights a token by its place within the whole sequence: no leak, but decoding cannot repeat it."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        place = torch.arange(1, x.size(1) + 1).to(x)[:, None] / x.size(1)
        return super().forward(x * place, cache, attention_mask)


class SeesOneBeyondItsChunk(nn.Module):
    """The last token of every chunk of 8 adds a thousandth of the first one of the next."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        following = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)
        is_last = (torch.arange(1, x.size(1) + 1) % 8 == 0)[None, :, None]
        return self.out(x + 0.001 * following * is_last)


class BatchNorm(nn.Module):
    """Normalizes over the batch in training; in evaluation nothing shows."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x.flatten(0, 1)).view_as(x))


class BatchMean(nn.Module):
    """Takes off the mean over the batch, each position apart: causal, but not independent."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x - 0.01 * x.mean(dim=0))


class TimesZero(Average):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, cache, attention_mask) + 0 * self.gate


class Exponential(Average):
    """Weights tokens by exp without taking off the largest."""

    def average(self, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        return super().average(x.exp(), cache, mask)


class ByDeviation(Average):
    """Divides by a deviation, which is zero for a constant."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x / x.std(dim=-1, keepdim=True), cache, attention_mask)


class Counts(Average):
    """Grows with the number of training steps, which it keeps as a number or as a buffer that is not saved."""

    steps: Any

    def __init__(self, how: str) -> None:
        super().__init__()
        if how == "number":
            self.steps = 0
        else:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=how == "saved")

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
        return super().forward(x, cache, attention_mask)


class BeginsAnew(Average):
    """The first batch in training sets the scale; the flag that says so is not saved."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(DIM))
        self.is_set = False

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        if self.training and not self.is_set:
            self.is_set = True
            with torch.no_grad():
                self.scale.copy_(x.abs().mean(dim=(0, 1)))
        return super().forward(x * self.scale, cache, attention_mask)


class RandomProjection(Average):
    """Draws a matrix in its constructor and keeps it as a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = torch.randn(DIM, DIM)

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x @ self.projection.to(x), cache, attention_mask)


class KeepsATable(Average):
    """Nothing is wrong: what it keeps can be made again, and what it notes comes of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[int, Tensor] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        if cache is None:
            self.table.setdefault(x.size(1), torch.linspace(0, 1, x.size(1)))
            x = x + self.table[x.size(1)].to(x)[:, None]
        y = super().forward(x, cache, attention_mask)
        self.last = y.mean()
        return y

    def make_cache(self) -> None:  # type: ignore[override]
        raise NotImplementedError


NOISE = torch.Generator()


class DrawsBeyondSeeds(nn.Module):
    """Adds noise of a generator that stands outside of it."""

    generator = NOISE

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + torch.randn(x.shape, generator=self.generator).to(x))


class DrawsFromItsOwn(DrawsBeyondSeeds):
    """Has its generator for itself, outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)


class DrawsFromNumpy(DrawsBeyondSeeds):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + torch.from_numpy(np.random.standard_normal(x.shape)).to(x))  # noqa: NPY002


class DrawsFromPython(DrawsBeyondSeeds):
    """Nothing is wrong: a run seeds this generator and its checkpoint keeps it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * random.uniform(0.5, 1.5))


class Remembers(DrawsBeyondSeeds):
    """Adds the mean of the batch before, also in evaluation."""

    before: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(x + self.before)
        self.before = x.detach().mean(dim=(0, 1))
        return y


class ForgetsTheMask(Average):
    def average(self, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        return super().average(x, cache, None)


class ForgetsTheCount(Average):
    """Decodes as if every token were the first, as far as the divisor goes."""

    def average(self, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        if cache:
            cache["count"] = torch.zeros_like(cache["count"])
        return super().average(x, cache, mask)


class OnlySingle(Average):
    """Nothing is wrong: it can do float32 alone."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("float32 only")
        return super().forward(x, cache, attention_mask)


class Stacked(nn.Module):
    """Nothing is wrong: one matrix per expert."""

    num_experts = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * DIM**-0.5)

    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        pieces = rows.split(rows_per_expert.tolist())
        return torch.cat([self.expert(piece) @ w for piece, w in zip(pieces, self.weight, strict=True)])

    def expert(self, rows: Tensor) -> Tensor:
        return rows


class CenteredExperts(Stacked):
    """Takes off the mean of an expert's rows, which are tokens of the whole batch."""

    def expert(self, rows: Tensor) -> Tensor:
        return rows - 0.01 * rows.mean(dim=0)


class Broken(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.out = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Ahead(nn.Module):
    """Sees the token 40 places ahead, which no short sequence has."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        y = x @ self.weight
        if x.size(1) > 40:
            y = y + torch.cat([x[:, 40:], torch.zeros_like(x[:, :40])], dim=1)
        return y


class WholeChunks(Ahead):
    """Nothing is wrong, but it wants sequences of whole chunks."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        chunks = (x @ self.weight).unflatten(1, (-1, 16))
        return (chunks.cumsum(dim=2) / 16).flatten(1, 2)


class DropsSequences(Ahead):
    """Nothing is wrong: in training it drops one sequence in ten."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        kept = torch.rand(x.size(0), 1, 1) > 0.1 if self.training else torch.ones(1)
        return kept.to(x) * (x @ self.weight)


class NotANumber(Ahead):
    """Begins with NaN."""

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        return (x @ self.weight) * float("nan")
