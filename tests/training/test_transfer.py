"""Settings that transfer: the rules by kind, their groups, and what a model computes as it grows."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from moesaic.cli import main
from moesaic.cli.common import composed
from moesaic.config import from_mapping, to_mapping
from moesaic.errors import InputError
from moesaic.interop import config_to_hf
from moesaic.layers import Fans, MoE, ScaledLogits, Scales, Transfer, parameter_fans
from moesaic.models import DecoderConfig, build_decoder, deepseek_v3, llama4_toy, tiny_twin
from moesaic.models.config import BaseShape
from moesaic.models.resizing import resized
from moesaic.training.config import OptimizerConfig, RunConfig, TrainingConfig
from moesaic.training.coordinates import QUANTITIES, Check, Curve, check
from moesaic.training.optimizers import build_optimizer, parameter_groups
from moesaic.training.transfer import TransferBase, TransferConfig, settings_at

BASE = {"dim": 32, "num_layers": 2}
WIDE = Transfer(0.02, dim=128, num_layers=8, base_dim=32, base_num_layers=2)


def transferred(dim: int, num_layers: int, **changes: Any) -> DecoderConfig:
    toy = resized(llama4_toy(257), dim=dim, num_layers=num_layers)
    base = BaseShape(llama4_toy(257).dim, 2)
    return dataclasses.replace(toy, parametrization="transfer", base=base, **changes)


@pytest.mark.parametrize(
    ("kind", "fans", "in_block", "by_muon", "expected"),
    [
        ("embedding", None, False, False, (1, 1, 1 / 4)),
        ("matrix", (128, 512), True, False, (1 / 4, 4, 1 / 16)),
        ("matrix", (512, 128), True, False, (1 / 16, 16, 1 / 16)),
        ("output", (128, 8), True, False, (1 / 4, 4, 1 / 4)),
        ("output", (128, 1000), False, False, (1 / 4, 4, 1)),
        ("vector", None, True, False, (1, 1, 1 / 16)),
        ("vector", None, False, False, (1, 1, 1 / 4)),
    ],
)
def test_the_table_of_rules_for_adamw(
    kind: Any, fans: Any, in_block: bool, by_muon: bool, expected: tuple[float, float, float]
) -> None:
    scales = WIDE.scales(kind, fans and Fans(*fans), in_block=in_block, by_muon=by_muon)
    assert scales == pytest.approx(expected)


@pytest.mark.parametrize("fans", [(32, 32), (128, 512), (512, 128)])
def test_a_step_of_muon_has_the_norm_of_its_map(fans: tuple[int, int]) -> None:
    """The optimizer's own factor times that of the rule is sqrt(fan_out / fan_in), in units of the base."""
    rate = WIDE.scales("matrix", Fans(*fans), in_block=True, by_muon=True).learning_rate
    whole = rate * 0.2 * math.sqrt(max(fans))
    assert whole == pytest.approx(0.2 * math.sqrt(32) * math.sqrt(fans[1] / fans[0]))


def test_weights_are_drawn_by_their_fan_in() -> None:
    decoder = build_decoder(transferred(128, 4, init_std=0.1))
    base = llama4_toy(257).dim
    expected = {
        "embedding.weight": 0.1,
        "head.weight": 0.1 * base / 128,
        "layers.1.ffn.router.weight": 0.1 * base / 128,
        "layers.0.mixer.q_proj.weight": 0.1 * math.sqrt(base / 128),
        "layers.1.ffn.experts.down_proj": 0.1 * math.sqrt(base / decoder.config.moe.active_hidden_dim),  # type: ignore[union-attr]
    }
    found = dict(decoder.named_parameters())
    for name, std in expected.items():
        assert float(found[name].detach().std()) == pytest.approx(std, rel=0.15), name


@pytest.mark.parametrize("by_muon", [False, True])
def test_experts_are_measured_by_what_a_token_meets(by_muon: bool) -> None:
    """A step moves the sum of the experts of a token as far as it moves one FFN of their width."""
    fine = MoE.build(32, 8, 16, top_k=4, shared_hidden_dim=16)
    fans = parameter_fans(fine)

    def moved(name: str) -> float:
        """How far the result of a down projection moves: by its rate, and the width that it reads or its root."""
        width, dim, _ = fans[name]
        rate = WIDE.scales("matrix", fans[name], in_block=True, by_muon=by_muon).learning_rate
        return rate * (0.2 * math.sqrt(max(width, dim) * width) if by_muon else width)

    whole = Fans(4 * 8 + 16, 32)
    rate = WIDE.scales("matrix", whole, in_block=True, by_muon=by_muon).learning_rate
    expected = rate * (0.2 * math.sqrt(max(whole[:2]) * whole.fan_in) if by_muon else whole.fan_in)
    found = 4 * moved("experts.down_proj") + moved("shared_expert.down_proj.weight")
    assert found == pytest.approx(expected)


def test_what_blocks_add_shrinks_with_the_depth() -> None:
    decoder = build_decoder(transferred(32, 8)).eval()
    block, x = decoder.layers[0], torch.randn(2, 5, 32)
    mixed = x + block.mixer(block.mixer_norm(x)) / 4  # type: ignore[operator]
    expected = mixed + block.ffn(block.ffn_norm(mixed)) / 4  # type: ignore[operator]
    torch.testing.assert_close(block(x)[0], expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_with_its_rule(name: Any) -> None:
    decoder = build_decoder(transferred(128, 4))
    groups = parameter_groups(decoder, OptimizerConfig(name=name, learning_rate=1.0, weight_decay=1.0, eps=1.0))
    of = {id(p): group for group in groups for p in group["params"]}
    assert len({group["name"] for group in groups}) == len(groups)
    parameters = dict(decoder.named_parameters())
    assert of.keys() == {id(p) for p in parameters.values()}
    ratio = 128 / llama4_toy(257).dim
    for path in ("head.weight", "layers.1.ffn.router.weight"):
        group = of[id(parameters[path])]
        assert group["lr"] == pytest.approx(1 / ratio)
        assert group["lr"] * group["weight_decay"] == pytest.approx(1)
    group = of[id(parameters["layers.1.ffn.experts.gate_up_proj"])]
    assert group["muon"] == (name == "muon")
    assert name == "muon" or (group["lr"], group["eps"]) == pytest.approx((1 / ratio, 1 / ratio / 2))


class Bare(nn.Module):
    """A mixer whose matrix nothing says the way around of."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, x: torch.Tensor, cache: Any = None, attention_mask: Any = None) -> torch.Tensor:
        return x @ self.weight


class Stating(Bare):
    def fans(self) -> dict[str, Fans]:
        return {"weight": Fans(*self.weight.shape)}


def test_a_parameter_without_a_rule_is_refused_by_name() -> None:
    decoder = build_decoder(transferred(32, 2))
    decoder.layers[0].mixer = Bare(32)
    with pytest.raises(InputError, match=r"layers\.0\.mixer\.weight of shape \[32, 32\] has no fan-in"):
        parameter_groups(decoder, OptimizerConfig())
    decoder.layers[0].mixer = Stating(32)
    assert parameter_groups(decoder, OptimizerConfig())


@pytest.mark.slow_but_for("muon")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_check_takes_custom_parts(optimizer: Any) -> None:
    folder = "moesaic.examples.custom_modules"
    toy = llama4_toy(257)
    assert toy.moe is not None
    moe = dataclasses.replace(
        toy.moe, router={"type": f"{folder}.CosineRouter"}, experts={"type": f"{folder}.ReluSquaredExperts"}
    )
    curves = check(
        dataclasses.replace(toy, moe=moe), OptimizerConfig(), Check("transfer", optimizer, "moe", (32, 64), (2, 4), 2)
    )
    assert {curve.quantity for curve in curves} == set(QUANTITIES)
    assert all(math.isfinite(curve.slope) for curve in curves)


@pytest.mark.slow_but_for("transfer-0.0-passes: no slope beyond")
@pytest.mark.parametrize(
    ("parametrization", "slope_of", "said"),
    [
        ("standard", 1.0, "residual stream grows with width"),
        ("standard", -1.0, "residual stream shrinks with width"),
        ("standard", 0.0, "holds"),
        ("transfer", 0.0, "passes: no slope beyond"),
    ],
)
def test_the_check_says_which_way_it_goes_and_passes_only_what_it_checked(
    parametrization: str,
    slope_of: float,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    curve = Curve("residual stream", "width", (32, 64), (1.0, 2.0**slope_of))
    monkeypatch.setattr("moesaic.cli.transfer.check", lambda *_: [curve])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["transfer", "check", f"parametrizations=[{parametrization}]", "optimizers=[muon]", "kinds=[dense]"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert said in out
    assert ("no verdict" in out) == (parametrization == "standard") and ("passes" in out) == (
        parametrization == "transfer"
    )


def test_the_command_alone_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["transfer"])
    assert ended.value.code == 2
    assert "action: missing; must be check: moesaic transfer check trains small models" in capsys.readouterr().err


def test_batch_and_tokens() -> None:
    """4 times the batch and 16 times the tokens: a step forgets a quarter as much of a training."""
    base = TransferBase(batch=1024, tokens=100_000)
    settings = settings_at(base, 4096, 1_600_000)
    assert (settings.rate, settings.eps, settings.forgetting) == (0.5, 0.5, 0.25)
    model = {"parametrization": "transfer"}
    run = RunConfig(
        model=model,
        training=TrainingConfig(steps=100, batch_size=4, seq_len=8, accumulate=2),
        transfer=TransferConfig(TransferBase(dim=32, num_layers=2, batch=16, tokens=6400)),
    )
    at = run.optimizer_at_scale()
    assert run.model["base"] == {"dim": 32, "num_layers": 2}
    assert at.learning_rate == pytest.approx(run.optimizer.learning_rate * 2)  # k = 4
    assert (1 - at.beta2, at.eps) == pytest.approx((0.2, run.optimizer.eps / 2))
    assert RunConfig().optimizer_at_scale() == RunConfig().optimizer


def test_the_proxy_of_a_training_is_one_override() -> None:
    base = {"dim": 48, "num_layers": 2, "batch": 256, "tokens": 25_600}
    run = composed("train", ["model.parametrization=transfer"])
    run |= {"transfer": {"base": base, "proxy": True}, "training": {**run["training"], "seq_len": 64, "steps": 1000}}
    run = {key: value for key, value in run.items() if key in {field.name for field in dataclasses.fields(RunConfig)}}
    target, proxy = (from_mapping(RunConfig, {**run, "transfer": {"base": base, "proxy": on}}) for on in (False, True))
    assert (proxy.model["dim"], proxy.model["num_layers"], proxy.model["attention"]["num_heads"]) == (48, 2, 2)
    assert proxy.model["moe"]["hidden_dim"] == run["model"]["moe"]["hidden_dim"] / 2
    assert (proxy.training.batch_size, proxy.training.steps, proxy.schedule.warmup_steps) == (4, 100, 5)
    assert (target.training.steps, target.schedule.warmup_steps) == (1000, 50)
    assert proxy.optimizer_at_scale() == proxy.optimizer
    assert target.optimizer_at_scale() != target.optimizer
    assert from_mapping(RunConfig, to_mapping(proxy)) == proxy
    standard = {**run, "model": {**run["model"], "parametrization": "standard"}}
    with pytest.raises(InputError, match=r"proxy=True: needs model\.parametrization=transfer"):
        from_mapping(RunConfig, {**standard, "transfer": {"base": base, "proxy": True}})
    with pytest.raises(InputError, match=r"transfer\.base\.batch=256: must be a multiple of .* = 768"):
        from_mapping(RunConfig, {**run, "training": {**run["training"], "seq_len": 768}})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parametrization": "transfer"}, "base=None"),
        ({"base": BASE}, "parametrization=standard"),
        ({"base": BASE, "parametrization": "scaled_logits"}, "parametrization=scaled_logits"),
        ({"parametrization": "scaled_logits", "tie_embeddings": True}, "tie_embeddings"),
        (
            {"parametrization": "transfer", "base": {"dim": 8, "num_layers": 1}, "tie_embeddings": True},
            "tie_embeddings",
        ),
        ({"parametrization": "transfer", "base": {"dim": 0, "num_layers": 1}}, "model.base.dim=0"),
        ({"parametrization": "mup"}, "parametrization: found 'mup'"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], named: str) -> None:
    values = {**dataclasses.asdict(llama4_toy(257)), **changes}
    with pytest.raises(InputError, match=named):
        from_mapping(DecoderConfig, values, "model")


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.factor * weight


def test_scaled_logits_are_logits_with_a_multiplier() -> None:
    """Three steps of AdamW end where those of the standard rule do with 1 / sqrt(width / 256) in the forward pass."""
    config = dataclasses.replace(llama4_toy(257), parametrization="scaled_logits")
    settings = OptimizerConfig("adamw", learning_rate=0.01, weight_decay=0.1, eps=1e-3)
    scaled, multiplied = build_decoder(config), build_decoder(dataclasses.replace(config, parametrization="standard"))
    multiplier = math.sqrt(256 / config.dim)
    outputs = ("head", "layers.1.ffn.router", "layers.3.ffn.router")
    multiplied.load_state_dict(
        {
            name: weight / multiplier if name.removesuffix(".weight") in outputs else weight
            for name, weight in scaled.state_dict().items()
        }
    )
    optimizers = [build_optimizer(each, settings) for each in (scaled, multiplied)]
    for name in outputs:
        parametrize.register_parametrization(multiplied.get_submodule(name), "weight", Times(multiplier))
    batches = torch.randint(257, (4, 2, 16), generator=torch.Generator().manual_seed(0))
    for batch in batches[:-1]:
        for decoder, optimizer in zip((scaled, multiplied), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(decoder(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
    torch.testing.assert_close(scaled(batches[-1]).logits, multiplied(batches[-1]).logits, rtol=1e-4, atol=1e-5)


def test_at_width_256_logits_are_not_scaled() -> None:
    assert ScaledLogits(dim=256).multiplier == 1
    assert ScaledLogits(dim=256).scales("output", None, in_block=True, by_muon=False) == Scales()
    assert ScaledLogits(0.02, dim=1024).std("output", 1024) == 0.01
    assert ScaledLogits(0.02, dim=1024).std("matrix", 1024) == 0.02


def test_a_model_with_scaled_logits_is_a_llama4() -> None:
    """The multiplier is in the weights, so nothing of it is left to write."""
    toy = llama4_toy(257)
    assert config_to_hf(dataclasses.replace(toy, parametrization="scaled_logits"), {}, "float32") == config_to_hf(
        toy, {}, "float32"
    )


def test_a_wider_model_has_more_heads_of_one_size() -> None:
    toy = llama4_toy(257)
    wide = resized(toy, dim=2 * toy.dim, num_layers=6)
    assert (wide.attention.num_heads, wide.head_dim) == (2 * toy.attention.num_heads, toy.head_dim)
    assert wide.hidden_dim == 2 * toy.hidden_dim
    assert len(wide.layers) == 6
    with pytest.raises(InputError, match=r"dim=7: attention\.num_heads"):
        resized(toy, dim=7)


def test_a_wider_model_has_wider_latents() -> None:
    toy = tiny_twin(deepseek_v3())
    wide = resized(toy, dim=2 * toy.dim)
    mla, wider = toy.attention.mla, wide.attention.mla
    assert mla is not None and wider is not None and mla.q_lora_rank is not None
    assert (wider.kv_lora_rank, wider.q_lora_rank) == (2 * mla.kv_lora_rank, 2 * mla.q_lora_rank)
    assert (wide.attention.num_heads, wide.head_dim) == (2 * toy.attention.num_heads, toy.head_dim)
    assert wide.first_dense_layers == toy.first_dense_layers


def test_slopes() -> None:
    assert Curve("x", "width", (64, 128, 256), (1.0, 2.0, 4.0)).slope == pytest.approx(1)
    assert not Curve("x", "width", (64, 128, 256), (1.0, 2.0, math.inf)).holds
    falling = (1.0, 2**-0.6, 2**-1.2)
    assert Curve("router logits", "width", (64, 128, 256), falling).holds
    assert not Curve("router logits", "depth", (2, 4, 8), falling).holds
    assert not Curve("mixer", "width", (64, 128, 256), falling).holds


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_nothing_grows_under_transfer_and_much_does_under_the_standard(optimizer: Any) -> None:
    model = from_mapping(DecoderConfig, {**composed("train", ["model=proxy"])["model"], "vocab_size": 256}, "model")
    settings = OptimizerConfig(learning_rate=8e-3, muon_learning_rate=1.6e-2)
    found = {
        each: check(model, settings, Check(each, optimizer, "moe", (64, 128, 256), (2, 4, 8)))  # type: ignore[arg-type]
        for each in ("standard", "transfer")
    }
    assert [curve for curve in found["transfer"] if not curve.holds] == []
    stream = [curve.slope for curve in found["standard"] if curve.quantity == "residual stream"]
    assert min(stream) > 0.5
