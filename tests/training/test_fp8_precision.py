"""`trainer.precision=fp8`: what it means on which machine, and what is exchanged for it."""

import pytest
import torch
from torch import nn

from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.layers import Fp8Recipe
from moesaic.layers.fp8_emulation import Fp8Linear
from moesaic.models import build_decoder, llama4_toy
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.shards import is_sharded, whole
from moesaic.parallel.workers import Workers
from moesaic.training.config import RunConfig, TrainerConfig
from moesaic.training.fp8 import lightning_precision, multiplying_in_fp8, plan_fp8, torchao_linears
from moesaic.training.module import LanguageModel
from moesaic.training.optimizers import build_optimizer

WEIGHTS = Fp8Recipe("tensorwise", ("weights",))


def test_a_cpu_emulates_in_fp32_and_says_so() -> None:
    plan = plan_fp8(TrainerConfig(precision="fp8"))
    assert plan.emulated
    assert plan.why == (
        "emulated, as a CPU has no FP8: activations, weights, gradients rounded to 8 bits by rowwise scales; all else "
        "is fp32"
    )
    assert "weights rounded to 8 bits by tensorwise" in plan_fp8(TrainerConfig(precision="fp8", fp8=WEIGHTS)).why
    assert lightning_precision(TrainerConfig(precision="fp8")) == "32-true"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_are_passed_on(precision: str) -> None:
    trainer = from_mapping(TrainerConfig, {"precision": precision})
    assert lightning_precision(trainer) == precision
    decoder = build_decoder(llama4_toy())
    with multiplying_in_fp8(trainer, decoder):
        assert not [part for part in decoder.modules() if isinstance(part, Fp8Linear)]


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"precision": "fp4"}, r"trainer\.precision: found 'fp4' .*; must be auto \| .* \| fp8"),
        ({"fp8": {"scaling": "tensorwise"}}, r"trainer\.precision='auto': must be fp8, as only that reads the keys"),
        (
            {"precision": "fp8", "fp8": {"scaling": "block"}},
            r"trainer\.fp8\.scaling: .* must be rowwise \| tensorwise \| mxfp8",
        ),
        ({"precision": "fp8", "fp8": {"operands": []}}, r"trainer\.fp8\.operands=\(\): must be one or more of"),
        ({"precision": "fp8", "fp8": {"operands": ["x"]}}, r"trainer\.fp8\.operands\[0\]: found 'x'"),
    ],
)
def test_bad_config(trainer: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_mapping(RunConfig, {"trainer": trainer})


def test_mps_is_refused() -> None:
    with pytest.raises(InputError, match=r"trainer\.precision='fp8': torch has no FP8 on MPS"):
        plan_fp8(TrainerConfig(precision="fp8", accelerator="mps"))


def test_the_module_of_a_run_multiplies_in_fp8_with_the_parameters_of_any_other() -> None:
    model = {"format": 2, "vocab_size": 31, "dim": 16, "num_layers": 2, "hidden_dim": 32}
    model |= {"attention": {"num_heads": 2}, "interleave_moe_layer_step": 2, "nope_layer_interval": 0}
    model |= {"moe": {"num_experts": 3, "hidden_dim": 16}}
    module = LanguageModel({"trainer": {"precision": "fp8", "fp8": {"operands": ["weights"]}}}, model)
    names = [name for name, _ in module.named_parameters()]
    settings = module.config.optimizer
    before = [len(group["params"]) for group in build_optimizer(module.decoder, settings).param_groups]
    with multiplying_in_fp8(module.config.trainer, module):
        linears = [part for part in module.modules() if isinstance(part, Fp8Linear)]
        # four projections a layer, and the three of a dense and of a shared FFN
        assert len(linears) == 2 * 4 + 2 * 3 and {part.recipe.operands for part in linears} == {("weights",)}
        assert [len(group["params"]) for group in build_optimizer(module.decoder, settings).param_groups] == before
        assert [name for name, _ in module.named_parameters()] == names
    assert not [part for part in module.modules() if isinstance(part, Fp8Linear)]


def test_torchao_takes_the_same_layers() -> None:
    """What a GPU does, on torchao's CPU kernels: the same parameters, and the modules from before at the end."""
    pytest.importorskip("torchao")
    decoder = build_decoder(llama4_toy())
    modules, weights = dict(decoder.named_modules()), dict(decoder.named_parameters())
    tokens = torch.randint(512, (2, 16))
    exact = decoder(tokens).logits
    with torchao_linears(decoder):
        kinds = {name: type(part).__name__ for name, part in decoder.named_modules()}
        assert {name for name, kind in kinds.items() if kind == "Float8Linear"} == {
            name for name, part in modules.items() if isinstance(part, nn.Linear) and name != "head"
        }
        assert all(weights[name] is p for name, p in decoder.named_parameters())
        logits = decoder(tokens).logits
        logits.square().mean().backward()
    assert 1e-4 < ((logits - exact).norm() / exact.norm()).item() < 0.2
    assert all(part is modules[name] for name, part in decoder.named_modules())


def torchao_after_a_step() -> tuple[bool, float]:
    """Whether all weights are sharded after the context, and how far the linear layers have moved."""
    decoder = build_decoder(llama4_toy(num_layers=1))
    before = decoder.layers[0].get_parameter("mixer.q_proj.weight").detach().clone()
    with torchao_linears(decoder):
        parallelize(decoder, ParallelConfig(), torch.device("cpu"))
        optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
        decoder.hidden_states(torch.randint(512, (2, 16)))[0].square().mean().backward()
        optimizer.step()
    moved = (whole(decoder.layers[0].get_parameter("mixer.q_proj.weight").detach()) - before).abs().max()
    return all(is_sharded(weight) for weight in decoder.parameters()), float(moved)


def test_torchao_keeps_what_a_sharded_run_has_trained(workers: Workers) -> None:
    """FSDP2 gives torchao's layers other parameters than those that the layers from before had."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    for all_sharded, moved in workers.run(torchao_after_a_step, 2):
        assert all_sharded and moved > 0
