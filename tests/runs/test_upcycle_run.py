"""experiment=upcycle on a model of seconds: a dense checkpoint trains on as a mixture of experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoints import load_checkpoint, load_model, save_model
from moesaic.config import from_mapping, to_mapping
from moesaic.data import DataConfig, load_data
from moesaic.errors import InputError
from moesaic.models import DecoderConfig, account, build_decoder, upcycle
from moesaic.overrides import apply_overrides
from moesaic.studies.config import StudyConfig
from moesaic.training.config import RunConfig, UpcycleConfig
from moesaic.training.module import LanguageModel
from moesaic.training.run import run

Composed = Callable[..., dict[str, Any]]


@pytest.fixture
def dense(composed: Composed, tmp_path: Path) -> Path:
    """A checkpoint of the dense twin with the tokenizer of the data."""
    config = composed("experiment=dense_twin")
    data = load_data(from_mapping(DataConfig, config["data"], "data"), None)
    torch.manual_seed(5)
    twin = build_decoder(from_mapping(DecoderConfig, {**config["model"], "vocab_size": data.vocab_size}, "model"))
    save_model(tmp_path / "dense.ckpt", twin, data.tokenizer, seq_len=64)
    return tmp_path / "dense.ckpt"


@pytest.fixture
def upcycled(composed: Composed, dense: Path) -> Composed:
    return lambda *overrides: composed("experiment=upcycle", f"upcycle.from={dense}", "training.steps=2", *overrides)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
def test_it_begins_with_the_function_of_the_checkpoint_and_trains_on(upcycled: Composed, dense: Path) -> None:
    rates = ("optimizer.learning_rate=1e-12", "optimizer.muon_learning_rate=1e-12", "optimizer.weight_decay=0")
    config = upcycled(*rates, "finish=score")
    assert run(config)["steps"] == 2
    [last] = Path(config["output_dir"]).glob("smoke/*/checkpoints/last.ckpt")
    start, end = load_model(dense), load_model(last)
    assert end.config.moe is not None and not end.config.dense_twin
    assert end.tokenizer is not None and start.tokenizer is not None
    assert end.tokenizer.to_dict() == start.tokenizer.to_dict()
    tokens = torch.randint(start.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(end.decoder(tokens).logits, start.decoder(tokens).logits, rtol=1e-4, atol=1e-5)
    router = end.decoder.get_parameter("layers.1.ffn.router.weight")
    assert router.abs().max() > 1e-13, "it began near zero, and the two steps have moved it"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*has collapsed:RuntimeWarning")
def test_killed_and_resumed_without_the_dense_checkpoint(upcycled: Composed, dense: Path) -> None:
    steps = ("training.steps=4", "training.checkpoint_every=2", "upcycle.noise=0.1", "finish=score")
    whole = run(upcycled("name=whole", *steps))
    config = upcycled("name=killed", *steps)
    with pytest.MonkeyPatch.context() as patch:
        original = LanguageModel.training_step

        def crash(self: Any, batch: Any, batch_index: int) -> Any:
            if self.trainer.global_step == 3:
                raise RuntimeError("power cut")
            return original(self, batch, batch_index)

        patch.setattr(LanguageModel, "training_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config)
    dense.unlink()
    [run_dir] = Path(config["output_dir"]).glob("killed/*")
    rest = run({**config, "resume": True, "run_dir": str(run_dir)})
    assert rest["validation/loss"] == whole["validation/loss"]
    assert load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 4


@pytest.mark.slow
def test_what_no_checkpoint_can_help_is_refused_by_name(composed: Composed) -> None:
    for overrides, message in (
        ([], r"upcycle.from=None: must be a checkpoint \(upcycle.from=RUN/checkpoints/last.ckpt\)"),
        (["upcycle.from=3"], r"upcycle.from: found 3 \(int\); must be a string or null"),
        (["upcycle.from=it", "upcycle.noise=-1"], r"upcycle.noise=-1.0: must be a number >= 0"),
        (["upcycle.from=it", "+upcycle.to=it"], r"upcycle.to: unknown key.*; must be one of from, noise"),
        (["upcycle.from=it", "ckpt_path=it"], r"ckpt_path='it': upcycle.from already says which weights to start from"),
    ):
        with pytest.raises(InputError, match=message):
            from_mapping(RunConfig, composed("experiment=upcycle", *overrides))
    config = from_mapping(RunConfig, composed("experiment=upcycle", "upcycle.from=it"))
    assert config.upcycle == UpcycleConfig("it")
    assert to_mapping(config)["upcycle"] == {"from": "it", "noise": 0.0}


def test_the_arms_of_the_study_can_be_upcycled_and_have_equal_active_width(composed: Composed) -> None:
    base = composed("experiment=study_upcycling", config="study")
    study = from_mapping(StudyConfig, base.pop("study"), "study")
    base = {key: base[key] for key in to_mapping(RunConfig())}
    configs = {}
    for name, overrides in {**study.arms, "dense": study.prepare["dense"].train or {}}.items():
        model = apply_overrides(base, overrides, name)["model"]
        configs[name] = from_mapping(DecoderConfig, {**model, "vocab_size": 50}, name)
    dense = build_decoder(configs["dense"])
    flops = account(configs["dense"], 32).matmul_flops
    for name, config in configs.items():
        routers = 0 if config.dense_twin or config.moe is None else 2 * config.dim * config.moe.num_experts * 2
        assert account(config, 32).matmul_flops == flops + routers, name
        if study.arms.get(name, {}).get("upcycle"):
            upcycle(dense, config)


@pytest.mark.slow
def test_what_cannot_be_upcycled_is_refused_before_anything_is_written(upcycled: Composed, dense: Path) -> None:
    name = f"upcycle.from={dense}: "
    for overrides, message in (
        (["upcycle.from=/nowhere"], "checkpoint /nowhere: no such file"),
        (["model.moe.hidden_dim=100"], f"{name}model.moe.hidden_dim=100: must divide 284, the width 384 of the dense"),
        (["model.dim=32"], f"{name}a dense model of another shape: model.dim: 16 there, 32 now"),
        (["model.dense_twin=true"], f"{name}model: no layer of it is MoE"),
    ):
        config = upcycled("name=refused", *overrides)
        with pytest.raises(InputError) as refused:
            run(config)
        assert message in str(refused.value)
        assert not (Path(config["output_dir"]) / "refused").exists()
