"""A decoder whose matrices are shared by ranks computes what the whole one does, in training and in generation."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.layers import Routing
from moesaic.losses import linear_cross_entropy, token_cross_entropy
from moesaic.models import AttentionConfig, Decoder, DecoderConfig, LayerConfig, MLAConfig, MoEConfig, build_decoder
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.workers import Workers

CONFIG = DecoderConfig(
    vocab_size=24,
    dim=8,
    num_layers=3,
    hidden_dim=16,
    attention=AttentionConfig(num_heads=4, head_dim=4, attention_chunk_size=4, conv_width=3, bias=True, qk_norm=True),
    moe=MoEConfig(num_experts=4, hidden_dim=12, top_k=2),
    pattern=(
        LayerConfig("chunked_rope", "moe"),
        LayerConfig("nope", "dense"),
        LayerConfig({"type": f"{__name__}.RunningMean"}, "moe"),
    ),
    init_std=0.3,
)


class RunningMean(nn.Module):
    """A custom mixer, of which nobody knows how to share it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            x = x * attention_mask[:, -x.size(1) :, None]
        return x.cumsum(1) * self.weight


class Skipping(nn.Module):
    """A router that gives every third token no expert."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_experts, bias=False)

    def forward(self, x: Tensor) -> Routing:
        logits = self.linear(x)
        ids = logits.argmax(1, keepdim=True)
        ids[::3] = logits.size(1)
        scores = logits.sigmoid().gather(1, ids.clamp(max=logits.size(1) - 1))
        return Routing(logits, scores, ids)


def build(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = build_decoder(config, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():  # convolutions, biases and gains begin as nothing
            if weight.dim() == 1 or ".conv." in name:
                weight += 0.3 * torch.randn_like(weight)
    return decoder


def passes(config: DecoderConfig, parallel: ParallelConfig | None, length: int) -> dict[str, Tensor]:
    """Loss, nats, logits and gradients; of a decoder that is whole, or spread over the ranks, all of which see all."""
    from moesaic.parallel.shards import is_sharded, whole

    decoder = build(config)
    if parallel is not None:
        from moesaic.parallel.apply import parallelize

        parallelize(decoder, parallel, torch.device("cpu"))
    tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    if config.padding_token is not None:
        tokens[0, ::2] = config.padding_token
    labels = tokens.flatten().roll(-1)
    labels[1] = -100
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    hidden, routing = decoder.hidden_states(tokens)
    loss = linear_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, labels, num_valid=7, chunk_tokens=4)
    (2 * loss + sum(decided.logits.square().sum() for decided in routing.values())).backward()
    found = {f"gradient of {name}": each.grad for name, each in decoder.named_parameters() if each.grad is not None}
    assert parallel is None or all(is_sharded(each) for each in found.values())
    found = {name: whole(each).clone() for name, each in found.items()}
    with torch.no_grad():
        hidden, routing = decoder.hidden_states(tokens)
        nats = token_cross_entropy(hidden.flatten(0, 1), decoder.head.weight, labels, chunk_tokens=3)
        found |= {"loss": loss.detach(), "nats": nats, "hidden": hidden.clone()}
        found |= {f"counts of {name}": decided.tokens_per_expert for name, decided in routing.items()}
        found["logits"] = decoder.head(hidden)
        mask = torch.ones(1, length, dtype=torch.int64)
        mask[:, :2] = 0
        found["padded"] = decoder.hidden_states(tokens, attention_mask=mask)[0][:, 2:].clone()
    return found


WITHOUT_CUSTOM = {"pattern": CONFIG.pattern[:2] if CONFIG.pattern else None, "num_layers": 2}
SKIPPING = MoEConfig(num_experts=4, hidden_dim=12, router={"type": f"{__name__}.Skipping"}, shared_hidden_dim=0)
LATENT = DecoderConfig(
    vocab_size=24,
    dim=8,
    num_layers=2,
    hidden_dim=16,
    attention=AttentionConfig(num_heads=3, qk_norm=False, bias=True, mla=MLAConfig(5, 3, 2, 4, q_lora_rank=7)),
    moe=MoEConfig(
        num_experts=4,
        hidden_dim=12,
        top_k=2,
        router={"type": "group_limited", "num_groups": 2, "top_groups": 1, "scale": 2.5},
        score_before_experts=False,
        expert_bias=True,
    ),
    pattern=(LayerConfig("mla", "dense"), LayerConfig("mla", "moe")),
    init_std=0.3,
)
"""Three heads, which two ranks could not share evenly: each has all of them."""


@pytest.mark.slow_but_for("tied")
@pytest.mark.parametrize(
    ("config", "ranks", "parallel", "length"),
    [
        pytest.param(CONFIG, 2, ParallelConfig(tensor=2), 9, id="odd number of tokens"),
        pytest.param(CONFIG, 4, ParallelConfig(tensor=4, expert=2), 9, id="more ranks than experts' ranks"),
        pytest.param(CONFIG, 4, ParallelConfig(tensor=4, expert=4), 2, id="ranks without a token"),
        pytest.param(
            dataclasses.replace(CONFIG, padding_token=15, tie_embeddings=True, **WITHOUT_CUSTOM),
            2,
            ParallelConfig(tensor=2),
            8,
            id="tied, padding token",
        ),
        pytest.param(
            dataclasses.replace(CONFIG, moe=SKIPPING), 2, ParallelConfig(tensor=2, expert=2), 7, id="no expert"
        ),
        pytest.param(LATENT, 2, ParallelConfig(tensor=2, expert=2), 7, id="latent attention"),
    ],
)
def test_equals_the_whole_decoder(
    workers: Workers, config: DecoderConfig, ranks: int, parallel: ParallelConfig, length: int
) -> None:
    if length < 3:  # nothing is left beside padding
        config = dataclasses.replace(config, **WITHOUT_CUSTOM)
    [wanted] = workers.run(passes, 1, config, None, length)
    for found in workers.run(passes, ranks, config, parallel, length):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            within = 1e-6 if name == "nats" else 1e-12  # which are in fp32
            torch.testing.assert_close(found[name], value, atol=within, rtol=within, msg=lambda m, n=name: f"{n}: {m}")


def held_numbers(tensor: int) -> dict[str, int]:
    from moesaic.parallel.apply import parallelize
    from moesaic.parallel.shards import held

    decoder = build(CONFIG)
    parallelize(decoder, ParallelConfig(tensor=tensor), torch.device("cpu"))
    return {name: held(weight).numel() for name, weight in decoder.named_parameters()}


def test_each_rank_holds_its_part(workers: Workers) -> None:
    """On 2 ranks that share all matrices nothing else is sharded: there are no ranks with other rows."""
    here = workers.run(held_numbers, 2, 2)[1]
    for name, weight in build(CONFIG).named_parameters():
        is_whole = "norm" in name or "router" in name or ".conv." in name or name == "layers.2.mixer.weight"
        is_whole = is_whole or name.endswith("o_proj.bias")
        assert here[name] == (weight.numel() if is_whole else weight.numel() // 2), name


def generated(tensor: int) -> list[int]:
    """Greedy choices, one by one with a cache."""
    decoder = build(dataclasses.replace(CONFIG, **WITHOUT_CUSTOM))
    if tensor > 1:
        from moesaic.parallel.apply import parallelize

        parallelize(decoder, ParallelConfig(tensor=tensor), torch.device("cpu"))
    decoder.eval()
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    tokens, chosen, cache = torch.tensor([[3, 1, 4]]), [], decoder.make_cache()
    with torch.no_grad():
        for _ in range(6):
            hidden, _ = decoder.hidden_states(tokens, cache)
            tokens = decoder.head(hidden[:, -1:]).argmax(-1)
            chosen.append(int(tokens))
    return chosen


@pytest.mark.slow
def test_text_goes_on_as_on_one_rank(workers: Workers) -> None:
    assert workers.run(generated, 2, 2) == 2 * workers.run(generated, 1, 1)
