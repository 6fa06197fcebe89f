"""The kit on our layer, on Hugging Face's and on a user's own; its reports, its errors, its manners."""

import json
import os
import re
import subprocess
import sys
import unittest
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rigged import (
    ExpertInputDetached,
    ExpertsAsModules,
    Good,
    NoiseInEvaluation,
    OneRankFails,
    RowsNeverWritten,
    describe,
)
from torch import Tensor, distributed, nn

import moesaic
from moesaic.errors import InputError
from moesaic.layers import ROUTERS, Experts, MoE, TopKRouter
from moesaic.testing import (
    MoEUnderTest,
    Report,
    check_moe,
    check_part,
    comparison_table,
    dense_moe,
    gated_expert,
    moe_checks,
)
from moesaic.testing.hugging_face import BLOCKS, TRANSFORMERS
from moesaic.testing.ours import ROUTED, layer_with_router
from moesaic.testing.peers import PEERS

DIM, HIDDEN = 16, 24
TOP_TWO: dict[str, Any] = {
    "top_k": 2,
    "score_function": "softmax",
    "normalize_scores": True,
    "score_before_experts": False,
    "shared_hidden_dim": 0,
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sigmoid top-1, shared": {},
    "softmax top-2 normalized": TOP_TWO,
    "softmax top-2, bias": TOP_TWO | {"expert_bias": True},
    "sqrt_softplus, router bias, scale, latent": {
        "router": partial(TopKRouter, DIM, 4, top_k=2, score_function="sqrt_softplus", scale=2.5, bias=True),
        "latent_dim": 8,
    },
    "sigmoid top-2 on the input, shared, bias": {"top_k": 2, "expert_bias": True},
    "gelu": {"activation": "gelu", "normalize_scores": True, "top_k": 3},
    "float64": {"dtype": torch.float64, "expert_bias": True},
    "float16": {"dtype": torch.float16, "top_k": 2},
    "loop": {"backend": "loop", "top_k": 2},
    "padded": {"backend": "padded", "top_k": 2},
    "grouped": {"backend": "grouped", "top_k": 2},
    "grouped, bfloat16": {"backend": "grouped", "top_k": 2, "expert_bias": True, "dtype": torch.bfloat16},
}


def build(name: str) -> MoE:
    arguments = dict(CONFIGURATIONS[name])
    if "router" in arguments:
        arguments["router"] = arguments["router"]()
    return MoE.build(DIM, HIDDEN, 4, **arguments)


CHECKS = {check.name: check for check in moe_checks()}
QUICK = [check for check in moe_checks() if check.name not in ("compile", "expert-parallel")]
REPLAY = {"replay-own", "replay-gradient", "replay-state", "variable-experts"}
BIAS = {name for name in CHECKS if name.startswith("bias")}


def statuses(report: Report, status: str) -> set[str]:
    return {row.check for row in report.rows if row.status == status}


# ---- on our own layer


@pytest.mark.slow_but_for("sigmoid top-1, shared", "softmax top-2 normalized")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ours_passes_everything_that_applies(name: str) -> None:
    arguments = CONFIGURATIONS[name]
    rows = [check.run(lambda: build(name)) for check in QUICK]
    assert {row.check: row.detail for row in rows if row.status == "fail"} == {}
    unbiased = set() if arguments.get("expert_bias") else BIAS | {"replay-state"}
    assert {row.check for row in rows if row.status == "not applicable"} == unbiased


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid top-1, shared", "loop", "padded", "grouped, bfloat16"])
def test_ours_compiles(name: str) -> None:
    row = CHECKS["compile"].run(lambda: build(name))
    assert row.status == "pass", row.detail


@pytest.mark.slow_but_for("softmax top-2 normalized")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ours_on_two_processes(name: str) -> None:
    row = CHECKS["expert-parallel"].run(lambda: build(name))
    assert row.status == "pass", row.detail


class Doubled(Experts):
    def forward(self, rows: Tensor, rows_per_expert: Tensor) -> Tensor:
        return 2 * super().forward(rows, rows_per_expert)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: MoE.build(DIM, HIDDEN, 3), "num_experts=3: must be a multiple of the 2 processes"),
        (
            lambda: MoE(router=TopKRouter(DIM, 4), experts=Doubled(4, DIM, HIDDEN)),
            "Doubled: cannot be spread over processes; must be Experts",
        ),
        (lambda: nn.Linear(DIM, DIM), "no expert_parallel known"),
    ],
)
def test_what_cannot_be_spread_is_said(layer: Any, reason: str) -> None:
    row = CHECKS["expert-parallel"].run(layer)
    assert (row.status, row.detail) == ("not applicable", reason)


def test_experts_that_are_modules_on_some_ranks_alone() -> None:
    row = CHECKS["expert-parallel"].run(lambda: describe(ExpertsAsModules(), reference=None))
    assert row.status == "pass", row.detail


def test_a_rank_that_fails_is_named() -> None:
    row = CHECKS["expert-parallel"].run(lambda: describe(OneRankFails()))
    assert (row.status, row.detail) == ("fail", "rank 1 of 2: MemoryError: no room for its experts")


@pytest.mark.slow_but_for("causality")
@pytest.mark.parametrize("check", moe_checks(), ids=str)
def test_the_documented_use_under_pytest(check: Any) -> None:
    check(lambda: MoE.build(DIM, HIDDEN, 4, **TOP_TWO, expert_bias=True))


class ForgetfulRouter(TopKRouter):
    """Moves its bias whenever it runs, validation included."""

    def forward(self, x: Tensor) -> Any:
        routing = super().forward(x)
        assert self.expert_bias is not None
        self.expert_bias += 0.01 * (routing.tokens_per_expert.float().mean() - routing.tokens_per_expert).sign()
        return routing


def test_a_part_of_ours_exchanged_for_a_bad_one() -> None:
    def factory() -> MoE:
        return MoE(router=ForgetfulRouter(DIM, 4, expert_bias=True), experts=Experts(4, DIM, HIDDEN))

    assert CHECKS["bias-evaluation"].run(factory).status == "fail"
    assert CHECKS["outputs"].run(factory).status == "not applicable"  # another router is another function


@pytest.mark.slow
def test_one_expert_and_more_experts_than_features() -> None:
    one = {check.name: check.run(lambda: MoE.build(DIM, HIDDEN, 1, score_function="softmax")) for check in QUICK}
    assert not [row for row in one.values() if row.status == "fail"]
    assert one["router-gradient"].status == one["balance-gradient"].status == "not applicable"
    many = {check.name: check.run(lambda: MoE.build(8, 8, 12, top_k=3)) for check in QUICK}
    assert not [row for row in many.values() if row.status == "fail"]
    assert "12 experts cannot be told apart by 8 features" in many["perfect-balance"].detail


def test_memory_that_was_never_written_shows() -> None:
    row = CHECKS["dirty-memory"].run(lambda: describe(RowsNeverWritten()))
    assert row.status == "fail"
    assert "nan" in row.detail
    assert torch.get_deterministic_debug_mode() == 0


# ---- on every router


DEPENDENT = {"batch-mates", "causality", "overloaded-expert"}
"""What depends on other tokens: the batch decides, later tokens too, and copies of a token are told apart."""
FAILS: dict[str, set[str]] = {
    # by its quotas the load is even whatever the router says: no balance loss has a gradient, and padding takes part
    "moesaic-expert-choice": DEPENDENT | {"padding", "balance-gradient"},
    # a token's place decides, and the load is even
    "moesaic-uniform": {"permutation", "causality", "overloaded-expert", "balance-gradient"},
    # in training, where a balance loss is asked for, padding takes part in the choice; evaluation is plain top-k
    "moesaic-sinkhorn": {"padding"},
    "moesaic-capacity": {"padding"},
}


@pytest.mark.slow_but_for("expert-choice", "quantile")
@pytest.mark.parametrize("name", ROUTED)
def test_the_kit_on_every_router(name: str) -> None:
    rows = [check.run(ROUTED[name]) for check in QUICK]
    assert {row.check: row.detail for row in rows if row.status == "fail"}.keys() == FAILS.get(name, set())
    passed = {row.check for row in rows if row.status == "pass"}
    assert {"outputs", "gradients", "replay-own", "replay-gradient", "variable-experts", "dirty-memory"} <= passed
    router = ROUTED[name]().router
    assert ("replay-state" in passed) == bool(list(router.buffers()))
    assert ("bias-accumulation" in passed) == (name in {"moesaic-quantile", "moesaic-threshold", "moesaic-relu"})


PART_FAILS = {
    "expert_choice": {"causality", "batch independence", "length independence"},
    "sinkhorn": {"causality", "batch independence", "length independence"},
    # an earlier token is never dropped for a later one, but a longer batch has room for more
    "capacity": {"batch independence", "length independence"},
}


@pytest.mark.slow_but_for("sinkhorn")
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_alone(name: Any) -> None:
    report = check_part(lambda: layer_with_router(name).router, "router", dim=16)
    assert {row.check: row.detail for row in report.failures}.keys() == PART_FAILS.get(name, set())
    assert ("causality" in statuses(report, "pass")) == ROUTERS[name].causal  # in training too
    if name != "uniform":  # its pattern repeats with the length that parts are checked with
        assert ("batch independence" in statuses(report, "fail")) == ROUTERS[name].depends_on_batch


# ---- on Hugging Face's


BEST_TWO = {"single-expert"}
"""A group of experts is scored by its best two."""
NO_SCORE = {"huge-logits"}
"""Sigmoids, or square roots of softplus, of very negative logits are zero, and are divided by their sum."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("llama4", set()),
        ("mixtral", set()),
        ("qwen3", set()),
        ("deepseek-v3", BEST_TWO),
    ],
)
def test_transformers_blocks(name: str, fails: set[str]) -> None:
    pytest.importorskip("transformers")
    report = check_moe(PEERS[f"transformers-{name}"])
    assert {"outputs", "gradients", "scales", "dirty-memory", "batch-mates", "causality", "ddp", "compile"} <= statuses(
        report, "pass"
    )
    assert statuses(report, "fail") == fails, str(report)


@pytest.mark.slow_but_for("muse-spark")
@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("olmoe", set()),
        ("gpt-oss", set()),
        ("deepseek-v4", NO_SCORE),
        ("longcat-flash", set()),
        ("nemotron-h", BEST_TWO),
        ("muse-spark", set()),
        ("qwen3-next", set()),
        ("hy-v4", BEST_TWO),
        ("step3p7", NO_SCORE),
    ],
)
def test_transformers_blocks_of_each_kind(name: str, fails: set[str]) -> None:
    pytest.importorskip("transformers")
    rows = [check.run(PEERS[f"transformers-{name}"]) for check in QUICK]
    assert {row.check: row.detail for row in rows if row.status == "fail"}.keys() == fails
    passed = {row.check for row in rows if row.status == "pass"}
    assert {"outputs", "gradients", "scales", "dirty-memory", "causality"} <= passed


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_every_transformers_block_can_be_made_small_and_equals_its_reference(name: str) -> None:
    pytest.importorskip("transformers")
    row = CHECKS["outputs"].run(TRANSFORMERS[f"transformers-{name}"])
    assert row.status == ("not applicable" if BLOCKS[name].score is None else "pass"), row.detail
    # a view where a transpose is wanted gives tokens the experts of others
    assert CHECKS["causality"].run(TRANSFORMERS[f"transformers-{name}"]).status == (
        "fail" if name == "doge" else "pass"
    )


def test_a_transformers_block_is_recognized_without_description() -> None:
    pytest.importorskip("transformers")
    from transformers.models.mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=DIM, intermediate_size=HIDDEN, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    rows = {check.name: check.run(lambda: MixtralSparseMoeBlock(config)).status for check in QUICK}
    passed = {name for name, status in rows.items() if status == "pass"}
    assert passed == set(rows) - BIAS - REPLAY - {"z-gradient"}


def test_a_missing_package_is_named() -> None:
    if "st_moe_pytorch" in sys.modules:
        pytest.skip("st-moe-pytorch is installed here")
    with pytest.raises(InputError, match=r"st_moe_pytorch cannot be imported .*pip install st-moe-pytorch==0\.1\.8"):
        check_moe(PEERS["st-moe-pytorch"])


# ---- on a user's own


class Own(nn.Module):
    """Nobody tells the kit anything about it."""

    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_experts)
        self.experts = nn.ModuleList([nn.Linear(DIM, DIM) for _ in range(num_experts)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(dim=-1)
        best = scores.argmax(dim=-1, keepdim=True)
        out = torch.stack([expert(x) for expert in self.experts], dim=-1)
        chosen = out.gather(-1, best[..., None, :].expand(*x.shape, 1)).squeeze(-1)
        return chosen * scores.gather(-1, best), scores.mean()


class Flat(Own):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # as Llama 4's block of transformers does
        y, loss = super().forward(x)
        return y.flatten(0, 1), loss


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Own, Flat])
def test_a_plain_module_needs_no_description(kind: type[Own]) -> None:
    report = check_moe(kind)
    assert report.ok, str(report)
    assert statuses(report, "pass") == {
        "deterministic",
        "permutation",
        "batch-mates",
        "causality",
        "empty-experts",
        "single-expert",
        "overloaded-expert",
        "zero-init",
        "huge-logits",
        "dirty-memory",
        "ddp",
        "compile",
    }
    for row in report.rows:
        assert row.detail, f"{row.check} says nothing"


@pytest.mark.slow
def test_more_is_checked_when_more_is_said() -> None:
    def factory() -> MoEUnderTest:
        return MoEUnderTest(Own(), router_weight=lambda module: module.gate.weight, top_k=1)

    assert check_moe(factory)["router-gradient"].status == "pass"


@pytest.mark.slow
def test_a_layer_that_trains_with_noise_is_not_called_wrong_for_it() -> None:
    class Noisy(NoiseInEvaluation):
        def logits(self, x: Tensor) -> Tensor:
            return super().logits(x) if self.training else Good.logits(self, x)

    report = check_moe(lambda: describe(Noisy()))
    assert report.ok, str(report)
    assert {"padding", "bias-accumulation"} <= statuses(report, "not applicable")


# ---- what cannot be checked


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: 3, r"the factory made int: must be an nn\.Module or a MoEUnderTest"),
        (lambda: None, r"the factory made NoneType"),
        (lambda: 1 / 0, r"the factory raised ZeroDivisionError: division by zero"),
        (lambda: nn.Linear(8, 9), r"Linear maps no \(2, 3, D\) to itself.*\(2, 3, 8\) gave \(2, 3, 9\)"),
        (lambda: nn.Sequential(), r"Sequential has no parameters: give dim"),
        (lambda: nn.LayerNorm(8, elementwise_affine=False), r"no parameters: give dim"),
        (
            lambda: MoEUnderTest(nn.Linear(8, 9), dim=8),
            r"output of shape \(2, 3, 9\) for an input of shape \(2, 3, 8\)",
        ),
        (nn.Linear(8, 8), r"Linear is a layer: must be a function that returns one"),
        (lambda: MoEUnderTest(nn.Linear(8, 8), dim=8, forward=lambda module, x: module(x).sum()), r"shape \(\)"),
    ],
)
def test_what_is_no_layer_is_refused(factory: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_moe(factory)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> str:
            return "hello"

    with pytest.raises(InputError, match="returned str: must be a tensor"):
        check_moe(lambda: MoEUnderTest(Says(), dim=3))


def test_a_width_that_is_not_unique_is_asked_for() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.other = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    with pytest.raises(InputError, match=r"several widths fit \(\[1, 5\]\): give dim"):
        check_moe(Scale)


def test_a_layer_that_raises_gets_rows_that_say_so() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    report = check_moe(lambda: MoEUnderTest(Broken(8, 8), dim=8))
    assert report["causality"].status == "fail"
    assert report["causality"].detail == "RuntimeError: out of order"
    assert len(report.rows) == len(CHECKS)


# ---- reports


def bad() -> MoEUnderTest:
    return describe(ExpertInputDetached())


@pytest.mark.slow
def test_a_report() -> None:
    report = check_moe(bad)
    assert not report.ok
    lines = report.table().splitlines()
    assert len(lines) == len(CHECKS) + 2
    assert all(line.count(" | ") == 3 for line in lines if not line.startswith("|-"))
    assert report.layer == "ExpertInputDetached"
    assert report["gradients"].status == "fail"
    assert "input" in report["gradients"].detail  # the gradient is named
    with pytest.raises(KeyError):
        report["speed"]
    with pytest.raises(
        AssertionError, match=r"ExpertInputDetached fails 1 of 29 checks:\n  gradients: .*input"
    ) as error:
        report.raise_on_failure()
    assert "huggingface/transformers#48687" in str(error.value)


@pytest.mark.slow
def test_a_good_report_raises_nothing_and_tables_compare() -> None:
    good = check_moe(lambda: describe(Good()))
    good.raise_on_failure()
    table = comparison_table({"good": good, "bad": check_moe(bad)}).splitlines()
    assert table[0] == "| check | good | bad |"
    assert "| gradients | pass | **fail** |" in table
    assert "| single-expert | n/a | n/a |" in table
    assert len(table) == len(CHECKS) + 2


def test_checks_one_by_one_fail_and_skip() -> None:
    with pytest.raises(AssertionError, match=r"gradients of input and every parameter.*input \d\.\de-01"):
        CHECKS["gradients"](bad)
    with pytest.raises(unittest.SkipTest, match="no reference known"):
        CHECKS["gradients"](Own)
    CHECKS["outputs"](bad)


@pytest.mark.slow
def test_pytest_reports_what_does_not_apply_as_skipped(tmp_path: Path) -> None:
    path = tmp_path / "test_own.py"
    path.write_text(
        "import pytest\nfrom torch import nn\nfrom moesaic.testing import moe_checks\n"
        "@pytest.mark.parametrize('check', moe_checks()[:3], ids=str)\n"
        "def test_own(check):\n    check(lambda: nn.Linear(8, 8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed, 2 skipped" in done.stdout, done.stdout + done.stderr


def test_every_check_names_a_public_bug() -> None:
    for check in moe_checks():
        assert re.search(r"\b[\w.-]+/[\w.-]+#\d+", check.bug), check.name
        assert check.statement
    assert len(CHECKS) == len(moe_checks()), "two checks of one name"


@pytest.mark.slow
def test_where_the_graph_breaks_is_said() -> None:
    from rigged import CountsAsPythonNumbers

    detail = CHECKS["compile"].run(lambda: describe(CountsAsPythonNumbers())).detail
    assert re.search(r"breaks at rigged\.py:\d+ in mix", detail), detail


# ---- manners


@pytest.mark.slow
def test_nothing_of_the_caller_is_disturbed() -> None:
    layer = MoE.build(DIM, HIDDEN, 4, expert_bias=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    generator, filters, hook = torch.get_rng_state(), list(warnings.filters), sys.excepthook
    with torch.no_grad():
        report = check_moe(lambda: layer)
        assert not torch.is_grad_enabled()
    assert report.ok, str(report)
    assert torch.equal(torch.get_rng_state(), generator)
    assert warnings.filters == filters
    assert sys.excepthook is hook
    assert layer.training
    assert not distributed.is_initialized()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_process_group_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=(tmp_path / "group").as_uri(), rank=0, world_size=1)
    try:
        row = CHECKS["ddp"].run(lambda: MoE.build(DIM, HIDDEN, 4))
        assert row.status == "not applicable"
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_runs_agree() -> None:
    rows = [[check.run(bad) for check in QUICK] for _ in range(2)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_importing_the_kit_loads_torch_only() -> None:
    program = """
import json, sys
import torch, torch.utils.checkpoint, einops, moesaic.losses
before = {name.split(".")[0] for name in sys.modules}
import moesaic.testing, moesaic.testing.peers
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} - before)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(moesaic.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) <= set(sys.stdlib_module_names)


# ---- the reference


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_the_reference_equals_token_by_token(score_function: Any, before: bool, normalize: bool, biased: bool) -> None:
    num_experts, top_k = 5, 2
    x, router = torch.randn(7, 6, dtype=torch.float64), torch.randn(num_experts, 6, dtype=torch.float64)
    gate_up = torch.randn(num_experts, 6, 8, dtype=torch.float64)
    down = torch.randn(num_experts, 4, 6, dtype=torch.float64)
    bias = torch.randn(num_experts, dtype=torch.float64) if biased else None

    def ffn(e: int, token: Tensor) -> Tensor:
        gate, up = token @ gate_up[e][:, :4], token @ gate_up[e][:, 4:]
        return (gate / (1 + torch.exp(-gate)) * up) @ down[e]

    expected = []
    for token in x:
        z = router @ token
        scores = 1 / (1 + torch.exp(-z)) if score_function == "sigmoid" else torch.exp(z) / torch.exp(z).sum()
        ranking = scores if bias is None else scores + bias
        chosen = sorted(range(num_experts), key=lambda e: -ranking[e].item())[:top_k]
        total = sum(scores[e] for e in chosen) if normalize else 1.0
        y = 2 * token
        for e in chosen:
            score = scores[e] / total
            y = y + (ffn(e, score * token) if before else score * ffn(e, token))
        expected.append(y)
    found = dense_moe(
        x,
        router,
        gated_expert(gate_up, down),
        top_k=top_k,
        score_function=score_function,
        normalize_scores=normalize,
        score_before_experts=before,
        expert_bias=bias,
        shared_expert=lambda x: 2 * x,
    )
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_experts_with_biases_add_nothing_where_they_are_not_chosen() -> None:
    x, router = torch.randn(4, 3), torch.eye(3)
    y = dense_moe(x, router, lambda e, rows: rows + 100.0 * e, top_k=1, score_before_experts=True)
    best = x.argmax(dim=-1)
    score = x.softmax(dim=-1).gather(1, best[:, None])
    torch.testing.assert_close(y, x * score + 100.0 * best[:, None])


# ---- the documentation


def test_the_documentation_has_every_check_its_bug_and_its_results() -> None:
    text = (Path(moesaic.__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    for check in moe_checks():
        rows = [line for line in text.splitlines() if line.startswith(f"| {check.name} |")]
        assert len(rows) >= 2, check.name  # a check of parts alone may have the same name
        for bug in re.findall(r"[\w.-]+/[\w.-]+#\d+", check.bug):
            assert any(bug in row for row in rows), f"{check.name}: {bug}"
