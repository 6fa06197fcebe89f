"""The sweeps change what they say and nothing else."""

from collections import defaultdict

import pytest
import torch

from benchmarks import scaling
from benchmarks.harness import parse_options
from benchmarks.scaling import SWEEPS, Point
from moesaic.models import account


@pytest.mark.parametrize("arguments", [[], ["--smoke"]])
def test_sweeps(arguments: list[str]) -> None:
    threads = torch.get_num_threads()
    options, _ = parse_options("", [*arguments, "--device", "cpu"])
    torch.set_num_threads(threads)
    sweeps: dict[str, list[Point]] = defaultdict(list)
    for point in scaling.points_for(options):
        sweeps[point.sweep].append(point)
    assert tuple(sweeps) == SWEEPS
    for points in sweeps.values():
        assert len(points) > 1
    assert len({point.tokens for point in sweeps["experts"]}) == 1
    assert len({point.tokens / point.experts for point in sweeps["experts and tokens"]}) == 1
    assert len({point.experts for point in sweeps["tokens"]}) == 1
    assert [point.depth for point in sweeps["depth"]] == [2**i for i in range(len(sweeps["depth"]))]


def test_a_deep_point_is_a_decoder_of_moe_blocks_and_its_twin() -> None:
    point = Point("depth", experts=4, tokens=32, dim=32, hidden_dim=24, depth=3, length=16)
    layers, tokens, flops = point.build(torch.device("cpu"), torch.float32)
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64 and not tokens.requires_grad
    config = point.config()
    assert [layer.ffn for layer in config.layers] == ["moe"] * 3
    routers = 3 * 2 * point.dim * point.experts * point.tokens
    assert account(config, 16).forward_flops * 32 - flops == routers, "the same active FLOPs but for the routers"
    logits, routing = layers["MoE"](tokens)
    assert logits.shape == layers["dense"](tokens).logits.shape == (2, 16, config.vocab_size)
    assert len(routing) == 3


def test_a_single_layer_has_a_limit_of_the_same_active_width() -> None:
    point = Point("tokens", experts=8, tokens=40, dim=32, hidden_dim=24)
    layers, x, flops = point.build(torch.device("cpu"), torch.bfloat16)
    assert x.shape == (40, 32) and x.dtype == torch.bfloat16 and x.requires_grad
    assert flops == 6 * 40 * 32 * 2 * 24
    assert layers["MoE"](x).shape == layers["dense"](x).shape == x.shape
