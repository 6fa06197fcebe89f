"""What routers gave the tokens, against models that give them as much by their config."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moesaic.config import from_mapping
from moesaic.models import DecoderConfig, account, build_decoder
from moesaic.training.spent import routed_numbers

TOKENS, SEQ_LEN = 1000, 16


def model(**moe: Any) -> DecoderConfig:
    sizes = {"vocab_size": 16, "dim": 8, "num_layers": 2, "hidden_dim": 8, "attention": {"num_heads": 2}}
    whole = {"num_experts": 4, "hidden_dim": 12, "top_k": 2, **moe}
    return from_mapping(DecoderConfig, {**sizes, "moe": whole, "pattern": [{"mixer": "rope", "ffn": "moe"}]})


def flops(config: DecoderConfig) -> float:
    return account(config, SEQ_LEN).training_flops * TOKENS


def numbers(config: DecoderConfig, folder: Path, columns: dict[str, list[float]]) -> dict[str, float]:
    table = folder / "metrics.csv"
    lines = [",".join(columns), *(",".join(map(str, line)) for line in zip(*columns.values(), strict=True))]
    table.write_text("\n".join(lines) + "\n")
    return routed_numbers(build_decoder(config), table, TOKENS, SEQ_LEN, flops(config))


def test_where_every_token_has_as_many_nothing_is_measured(tmp_path: Path) -> None:
    found = numbers(model(), tmp_path, {"step": [1, 2]})
    assert "measured_flops" not in found
    assert found["router/layers.1.ffn/experts_per_token"] == 2 and found["router/layers.1.ffn/no_expert_share"] == 0


def test_flops_are_those_of_the_experts_that_tokens_had(tmp_path: Path) -> None:
    config = model(router="threshold")
    columns = {f"router/layers.{i}.ffn/experts_per_token": [4.0, 2.0] for i in range(2)}
    columns["router/layers.0.ffn/no_expert_share"] = [0.3, 0.1]
    found = numbers(config, tmp_path, columns)
    assert found["router/layers.0.ffn/no_expert_share"] == pytest.approx(0.2)
    assert found["router/layers.1.ffn/experts_per_token"] == 3
    assert config.moe is not None
    three = dataclasses.replace(config, moe=dataclasses.replace(config.moe, top_k=3))
    assert found["measured_flops"] == pytest.approx(flops(three))
    one = {f"router/layers.{i}.ffn/experts_per_token": [1.0] for i in range(2)}
    assert numbers(config, tmp_path, one)["measured_flops"] < flops(config)


def test_experts_without_weights_cost_nothing(tmp_path: Path) -> None:
    config = model(identity_experts=4, top_k=2)  # one of two has weights, with equal loads
    assert config.moe is not None
    columns = {f"router/layers.{i}.ffn/active_width": [24.0] for i in range(2)}  # both had
    both = flops(model(identity_experts=0, top_k=2))
    more_logits = 2 * TOKENS * 3 * 2 * 4 * config.dim
    assert numbers(config, tmp_path, columns)["measured_flops"] == pytest.approx(both + more_logits)
    equal = {name: [12.0] for name in columns}
    assert numbers(config, tmp_path, equal)["measured_flops"] == pytest.approx(flops(config))
