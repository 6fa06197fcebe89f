"""From FLOPs to runs: one rule, whole numbers, equal tokens; what cannot be met is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.checkout import CONFIG_DIR
from moesaic.config import from_mapping
from moesaic.errors import InputError
from moesaic.ladder.config import name_of
from moesaic.ladder.rungs import Rungs, require_fresh_tokens
from moesaic.models import DecoderConfig
from moesaic.models.accounting import account
from moesaic.overrides import apply_overrides
from moesaic.studies.jobs import canonical, run_config_of, validate
from moesaic.studies.plan import plan
from moesaic.training.config import RunConfig

MakeRungs = Callable[..., Rungs]


def model_of(config: dict[str, object]) -> DecoderConfig:
    run = from_mapping(RunConfig, config)
    return from_mapping(DecoderConfig, {**run.model, "vocab_size": 512}, "model")


def test_the_runs_have_the_flops_and_the_tokens_of_their_rung(rungs_of: MakeRungs) -> None:
    rungs = rungs_of()
    study, base = rungs.study()
    for rung, flops in zip(rungs.all, rungs.ladder.rungs, strict=True):
        assert rung.flops == pytest.approx(flops, rel=0.01)
        assert 20 / 1.8 < rung.tokens / rung.parameters < 20 * 1.8, "widths are few where they are small"
        found = {}
        for arm in study.arms:
            cell = study.cell(arm, ("rung", rung.name))
            config = apply_overrides(base, cell.overrides, "test")
            model, training = model_of(config), config["training"]
            assert model.dim == rung.dim and model.head_dim == 8
            assert training["steps"] * training["batch_size"] * training["seq_len"] == rung.tokens
            assert model.hidden_dim == 4 * rung.dim
            assert model.moe is not None and model.moe.hidden_dim == 2 * rung.dim
            found[arm] = 3 * account(model, training["seq_len"]).forward_flops * rung.tokens
        assert found["dense"] == pytest.approx(rung.flops)
        assert found["16 experts"] == pytest.approx(rung.flops, rel=0.02), "the router is all that is more"


def test_the_batch_grows_as_the_square_root_of_the_tokens(rungs_of: MakeRungs) -> None:
    first, *others = rungs_of().all
    assert first.tokens_per_step == 2048
    for rung in others:
        wanted = 2048 * (rung.tokens / first.tokens) ** 0.5
        assert rung.tokens_per_step == pytest.approx(wanted, abs=128.1), "half a sequence"


def test_rates_are_tuned_at_the_lowest_rung_alone_and_that_is_the_base(rungs_of: MakeRungs) -> None:
    rungs = rungs_of()
    study, base = rungs.study()
    first = rungs.all[0]
    assert base["transfer"]["base"] == {
        "dim": first.dim,
        "num_layers": 4,
        "batch": first.tokens_per_step,
        "tokens": first.tokens,
    }
    jobs = plan(study, base, {}).missing
    assert {job.axis for job in jobs} == {f"rung={first.name}"}
    assert {job.purpose for job in jobs} == {"tune"}
    assert plan(study, base, {}).total == 2 * 3 + 2 * 5 * 3


def test_a_rung_of_1e16_flops_composes_and_is_planned(rungs_of: MakeRungs) -> None:
    rungs = rungs_of("ladder.rungs=[1e15,3e15,1e16]", "trainer=gpu", "data=memmap", "data.path=there")
    study, base = rungs.study()
    last = rungs.all[-1]
    assert (last.name, last.dim) == ("1e16", 368)
    assert 1.5e8 < last.tokens < 2.5e8
    jobs = plan(study, base, {}).missing
    assert len(jobs) == 6
    for job in jobs:
        assert canonical(run_config_of(study, base, job))["trainer.precision"] == "bf16-mixed"
    biggest = apply_overrides(base, study.cell("16 experts", ("rung", "1e16")).overrides, "test")
    assert 8e6 < account(model_of(biggest), 256).active_parameters < 1.2e7


def test_widths_of_an_arm_grow_with_the_rung(rungs_of: MakeRungs) -> None:
    rungs = rungs_of("+ladder.arms.fine={model.moe.hidden_dim:32,model.moe.top_k:2,model.moe.shared_hidden_dim:64}")
    study, base = rungs.study()
    for rung in rungs.all:
        config = apply_overrides(base, study.cell("fine", ("rung", rung.name)).overrides, "test")
        moe = model_of(config).moe
        assert moe is not None and (moe.hidden_dim, moe.shared_hidden_dim) == (rung.dim, 2 * rung.dim)


def test_latents_and_widths_of_own_parts_grow_with_the_rung(rungs_of: MakeRungs) -> None:
    rungs = rungs_of("experiment=ladder_routers")
    study, base = rungs.study()
    for rung in rungs.all:
        models = {
            arm: model_of(apply_overrides(base, study.cell(arm, ("rung", rung.name)).overrides, "test"))
            for arm in ("latent experts", "mlp", "soft", "group-limited")
        }
        latent, mlp, groups = (models[arm].moe for arm in ("latent experts", "mlp", "group-limited"))
        assert latent is not None and latent.latent_dim == rung.dim / 2
        assert mlp is not None and isinstance(mlp.router, dict) and mlp.router["router_dim"] == rung.dim // 2
        assert groups is not None and groups.router == {"type": "group_limited", "num_groups": 4, "top_groups": 2}
        widths = {layer.ffn["hidden_dim"] for layer in models["soft"].layers if isinstance(layer.ffn, dict)}
        assert widths == {2 * rung.dim}


def test_a_run_that_would_repeat_a_token_is_refused(rungs_of: MakeRungs) -> None:
    rungs = rungs_of().all
    most = rungs[-1].tokens
    require_fresh_tokens(rungs, most + 2 * 256, 256)
    with pytest.raises(InputError, match=rf"rung 1e13 trains on {most:,} tokens, .* {most - 256:,} in whole windows"):
        require_fresh_tokens(rungs, most + 256, 256)


@pytest.mark.slow_but_for("words11-asymptote=-1.0: must be")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ladder.rungs=[1e11,1e12]"], "too few for a law; must be 3 or more"),
        (["ladder.rungs=[]"], r"rungs=\[\]: too few for a law; must be 3 or more different numbers of FLOPs, such as"),
        (["ladder.rungs=[1e13,1e11]"], r"rungs=\[1e13, 1e11\]: must be different .*, the smallest first"),
        (["ladder.rungs=[0,1e11,1e12]"], r"rungs=\[0, 1e11, 1e12\]: must be different numbers of FLOPs > 0"),
        (["ladder.rungs=[abc]"], r"ladder\.rungs\[0\]: found 'abc'"),
        (["ladder.rungs=[1e12,1e11,1e13]"], "must be different numbers of FLOPs > 0, the smallest first"),
        (["ladder.rungs=[1e7,1e11,1e12]"], r"1e7: at the nearest width, 8, it is .* tokens per parameter; must be"),
        (["ladder.batch=262144"], "1e11: 2 steps of 262,144 tokens; must be 20 or more"),
        (["ladder.targets=[1e12]"], "must be above the largest rung"),
        (["ladder.baseline=sparse"], "unknown arm; must be one of dense, 16 experts"),
        (["+ladder.arms.wide={model.dim:64}"], r"ladder.arms.wide: model.dim=64: must be left to the rungs"),
        (["ladder.asymptote=-1"], "asymptote=-1.0: must be"),
        (["ladder.least=3e12"], r"least=3e12: must be a number of FLOPs >= 0 that leaves 3 or more of rungs="),
        (["ladder.tokens_per_parameter=0"], "must be a number > 0"),
    ],
)
def test_what_is_no_ladder_is_refused(rungs_of: MakeRungs, words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        _ = rungs_of(*words).all


@pytest.mark.slow_but_for("ladder_moe", "ladder_routers")
@pytest.mark.parametrize("file", sorted(CONFIG_DIR.glob("experiment/ladder_*.yaml")), ids=lambda file: file.stem)
def test_every_ladder_of_the_repository_is_one(rungs_of: MakeRungs, file: Path) -> None:
    rungs = rungs_of(f"experiment={file.stem}")
    study, base = rungs.study()
    assert base["name"] == file.stem, "moesaic train tells the command by it"
    validate(study, base)
    tokens = {
        (cell.axis, cell.overrides["training.steps"] * cell.overrides["training.batch_size"]) for cell in study.cells
    }
    assert len(tokens) == len(rungs.all), "all arms of a rung have the same tokens"


def test_names_of_rungs() -> None:
    assert [name_of(x) for x in (1e11, 3e12, 2.5e9, 1e16)] == ["1e11", "3e12", "2.5e9", "1e16"]
